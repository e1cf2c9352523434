"""Starting nodes: domains of their own, and parameter files."""

import re
import subprocess
import sys

import pytest

from flow_policy_rl import cli, ros


def test_two_runs_at_once_take_different_ros_domains():
    code = "from flow_policy_rl.ros import private_domain; print(private_domain(), flush=True); input()"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    domains = [run.stdout.readline() for run in runs]
    for run in runs:
        run.communicate("\n")
    assert len(set(domains)) == 3


PARAMETER_FILES = {
    "another node": (
        "policynode: {ros__parameters: {soft_start_s: 3.0}}",
        r"no section 'policy_node' .did you mean",
    ),
    "no section": ("soft_start_s: 3.0", "no section 'policy_node'; it has: soft_start_s"),
    "empty": ("", "no section 'policy_node'; it has: nothing"),
    "no ros__parameters": (
        "policy_node: {soft_start_s: 3.0}",
        "a section is a name, then ros__parameters",
    ),
    "not YAML": ("policy_node: [", "is not YAML: while parsing"),
    "arms": (
        "policy_node: {ros__parameters: {armed: true}}",
        "sets 'armed', which the flag --armed says",
    ),
    "arms all nodes": (
        "/**: {ros__parameters: {armed: true}}",
        "sets 'armed', which the flag --armed says",
    ),
    "right": ("policy_node: {ros__parameters: {soft_start_s: 3.0}}\nsim_node: {}", None),
    "for all nodes": ("/**: {ros__parameters: {use_sim_time: true}}", None),
}


@pytest.mark.parametrize("case", PARAMETER_FILES)
def test_a_parameter_file_limits_the_node_that_is_started_and_arms_none(
    case, tmp_path, monkeypatch, capsys
):
    """Limits that speak of another node would be none, and a file comes before the flags."""
    text, says = PARAMETER_FILES[case]
    file, started = tmp_path / "careful.yaml", []
    file.write_text(text)
    monkeypatch.setattr(ros, "foreground", lambda *arguments: started.append(arguments))
    code = cli.main(["deploy", "--policy", "lift", "--params-file", str(file)])
    if says is None:
        ((node, parameters, given),) = started
        assert (code, node, given, parameters["armed"]) == (0, "policy_node", file, False)
        # Simulated time is what the file says, unless the flag asks for it.
        assert "use_sim_time" not in parameters
        return
    err = capsys.readouterr().err
    assert (code, started, err.count("\n")) == (2, [], 1)
    assert err.startswith(f"error: parameter file '{file}'")
    assert re.search(says, err)
