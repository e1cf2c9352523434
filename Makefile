# The README's commands. `make demo` and `make test` work on a fresh clone.
.PHONY: help setup demo test test-all lint format clean
STAMP := .venv/.installed

help:  ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## build .venv from constraints.txt

$(STAMP): constraints.txt setup.py scripts/setup.sh ros_ws/src/flow_policy_ros/setup.py
	@scripts/setup.sh
	@touch $@

demo: $(STAMP)  ## the whole product, from demonstrations to a ROS 2 arm and a report
	@.venv/bin/flow-policy demo $(DEMO_ARGS)

test: lint  ## lint and every quick test
	@.venv/bin/python -m pytest -m "not slow"

test-all: lint  ## the slow tests as well
	@.venv/bin/python -m pytest

lint: $(STAMP)  ## ruff
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .

format: $(STAMP)  ## let ruff write the code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

clean:  ## remove .venv and what runs left
	rm -rf .venv runs build install log *.egg-info ros_ws/build ros_ws/install ros_ws/log
