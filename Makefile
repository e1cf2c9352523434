# The README's commands. `make demo` and `make test` work on a fresh clone.
.PHONY: help setup demo test test-all test-kilted lint format types licences docs docs-serve wheel clean
STAMP := .venv/.installed

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## build .venv from constraints.txt

$(STAMP): constraints.txt setup.py scripts/setup.sh ros_ws/src/flow_policy_ros/setup.py
	@scripts/setup.sh
	@touch $@

demo: $(STAMP)  ## the whole product, from demonstrations to a ROS 2 arm and a report
	@.venv/bin/flow-policy demo $(DEMO_ARGS)

# What listens to the clock has the machine for itself; everything else shares it, a process per core.
ROS_TESTS := ros_ws/src/flow_policy_ros/test
test: lint  ## lint and every quick test
	@.venv/bin/python -m pytest -m "not slow" -n logical --maxprocesses 8 tests
	@.venv/bin/python -m pytest -m "not slow" $(ROS_TESTS)

test-all: lint types  ## the slow tests as well, and properties on examples that no run had before
	@.venv/bin/python -m pytest --hypothesis-profile explore -n logical --maxprocesses 8 tests
	@.venv/bin/python -m pytest $(ROS_TESTS)

test-kilted: $(STAMP)  ## the quick ROS tests on the Kilted wheels, in a second environment
	@scripts/kilted.sh -m "not slow"

lint: $(STAMP)  ## ruff
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: $(STAMP)  ## let ruff write the code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

types: $(STAMP)  ## check the types of the public API
	@.venv/bin/mypy

licences: $(STAMP)  ## licence of every package that is installed with this one
	@.venv/bin/python scripts/licences.py

docs: $(STAMP)  ## the documentation site, into site/; warnings are errors
	@.venv/bin/pip install -q -c constraints.txt -e '.[docs]'
	@.venv/bin/mkdocs build --strict

docs-serve: $(STAMP)  ## the same, live at http://127.0.0.1:8000
	@.venv/bin/pip install -q -c constraints.txt -e '.[docs]'
	@.venv/bin/mkdocs serve

wheel: $(STAMP)  ## wheel and source distribution, into dist/
	@.venv/bin/python scripts/build.py dist

clean:  ## remove .venv and what runs left
	rm -rf .venv runs build dist site install log *.egg-info ros_ws/build ros_ws/install ros_ws/log
