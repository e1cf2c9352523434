"""Gates of a replay: each limit in all its forms, and files that are none."""

import pytest

from flow_policy_rl.errors import InputError
from flow_policy_rl.offline import gates


@pytest.mark.parametrize(
    ("value", "limits", "passed"),
    [
        (1.0, {"max": 1.0}, True),
        (1.1, {"max": 1.0}, False),
        (1.0, {"min": 1}, True),
        (0.9, {"min": 1}, False),
        (3, {"equals": 3}, True),
        (2, {"equals": 3}, False),
        (True, {"equals": True}, True),
        (False, {"equals": True}, False),
        (0.5, {"min": 0.2, "max": 0.6}, True),
        (0.7, {"min": 0.2, "max": 0.6}, False),
        (0.1, {"min": 0.2, "max": 0.6}, False),
        (None, {"equals": 0}, False),
        (float("nan"), {"min": -1e9}, False),
    ],
)
def test_a_gate_passes_where_all_its_limits_hold(value, limits, passed):
    """Limits themselves are inside; a value that nobody knows passes nothing."""
    judged = gates.judge({"joints": {"a": {"mae": value}}}, {"joints.a.mae": limits})
    found = judged["joints.a.mae"]
    assert found["passed"] is passed
    assert {name: found[name] for name in limits} == limits
    assert found["value"] is value


def test_a_gate_names_a_number_that_there_is():
    result = {"mae": 1.0, "bag": "mea", "joints": {"a": {"mae": 2.0}}}
    with pytest.raises(InputError, match="did you mean 'mae'") as refused:
        gates.judge(result, {"mea": {"max": 1}})
    assert "joints.a.mae" in str(refused.value)
    with pytest.raises(InputError, match="unknown number in the gates file 'bag'"):
        gates.judge(result, {"bag": {"equals": 1}})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "must map names"),
        (b"{}", "must map names"),
        (b"- mae", "must map names"),
        (b"{", "not YAML"),
        (b"\xff\xfe\xff", "not YAML"),
        (b"mae: 3", "must be a mapping of max, min, equals"),
        (b"mae: {}", "must be a mapping of max, min, equals"),
        (b"mae: {above: 3}", "unknown key"),
        (b"mae: {max: x}", "mae.max must be a finite number, not 'x'"),
        (b"mae: {max: true}", "mae.max must be a finite number, not True"),
        (b"mae: {min: .inf}", "mae.min must be a finite number, not inf"),
        (b"mae: {equals: .nan}", "mae.equals must be a finite number, not nan"),
    ],
)
def test_gates_files_that_are_none_are_refused(text, says, tmp_path):
    (tmp_path / "g.yaml").write_bytes(text)
    with pytest.raises(InputError, match=says):
        gates.load(tmp_path / "g.yaml")


def test_a_gates_file_is_read_as_it_stands(tmp_path):
    (tmp_path / "g.yaml").write_text("mae: {max: 2}\nbeats_baselines: {equals: true}\n")
    found = gates.load(tmp_path / "g.yaml")
    assert found == {"mae": {"max": 2}, "beats_baselines": {"equals": True}}
