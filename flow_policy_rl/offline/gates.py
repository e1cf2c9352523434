"""Thresholds for CI of robots: a YAML file of limits on the numbers of a replay.

mae: {max: 0.02}
joints.panda_joint2.mae: {max: 0.05}
smoothness.ratio.jerk_rms: {max: 2.0}
beats_baselines: {equals: true}
wiring_errors: {max: 0}
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flow_policy_rl.errors import InputError, existing_file, unknown_name
from flow_policy_rl.nesting import flat

TESTS = {
    "max": lambda value, limit: value <= limit,
    "min": lambda value, limit: value >= limit,
    "equals": lambda value, limit: value == limit,
}


def load(path: Path) -> dict[str, dict[str, Any]]:
    """Limits by name of a number.

    Raises:
        InputError: not such a file.
    """
    existing_file(path, "gates file")
    try:
        raw = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"gates file '{path}' is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(raw, dict) or not raw:
        raise InputError(
            f"gates file '{path}' must map names of numbers to limits, as in mae: {{max: 0.02}}"
        )
    for name, limits in raw.items():
        where = f"gates file '{path}': {name}"
        if not isinstance(limits, dict) or not limits:
            raise InputError(f"{where} must be a mapping of {', '.join(TESTS)}")
        for test, limit in limits.items():
            if test not in TESTS:
                raise unknown_name(f"key in {where}:", str(test), TESTS)
            number = isinstance(limit, int | float) and not isinstance(limit, bool)
            if (number or test != "equals") and not (number and math.isfinite(limit)):
                raise InputError(f"{where}.{test} must be a finite number, not {limit!r}")
    return {str(name): limits for name, limits in raw.items()}


def judge(result: Mapping, gates: Mapping[str, Mapping[str, Any]]) -> dict[str, dict]:
    """Each gate with its value and whether it passed; a value that is not known fails.

    Raises:
        InputError: a gate names a number that there is not.
    """
    numbers = {
        name: value
        for name, value in flat(result, ".").items()
        if value is None or isinstance(value, bool | int | float)
    }
    judged = {}
    for name, limits in gates.items():
        if name not in numbers:
            raise unknown_name("number in the gates file", name, numbers)
        value = numbers[name]
        # Nothing compares with NaN, so that it fails by itself.
        passed = value is not None and all(
            TESTS[test](value, limit) for test, limit in limits.items()
        )
        judged[name] = {"value": value, **limits, "passed": passed}
    return judged
