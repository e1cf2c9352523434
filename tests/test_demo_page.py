"""What the demo says at its end, and the commands that its page prints."""

import pytest

from flow_policy_rl import demo


def test_a_demo_ends_well_where_messages_have_no_numbers():
    """Humble and Cyclone DDS number none, so that nobody knows how long a command took."""
    from flow_policy_rl import demo_page

    row = {"policy": "base", "success": "50 %", "95 % interval": "40 to 60 %"}
    unknown = dict.fromkeys(("p50", "p95", "p99", "max"))
    said = demo.text(
        {
            "table": [row],
            "latency_ms": {"end_to_end": unknown},
            "ros": {"emergency_stops": 0},
            "parity_max_abs_error": 1e-6,
            "seconds": {"total": 60.0},
            "policy": "policy.onnx",
            "bag": "bag",
            "report": "report.html",
        }
    )
    assert "latency over ROS: not measured" in said
    assert demo_page.latency(unknown | {"p50": 2.5, "p99": 7.25}) == "p50 2.50 ms, p99 7.25 ms"


@pytest.mark.parametrize(("algorithm", "cameras"), [("score_flow", True), ("rldt", False)])
def test_commands_in_the_demo_report_are_the_demo(algorithm, cameras, tmp_path, capsys):
    """Every printed command parses back to the config that ran."""
    import tyro

    from flow_policy_rl import collect, demo_page, demo_stages, train_config

    run = demo_stages.Demo(
        demo.Config(algorithm, cameras=cameras, run_dir=tmp_path / "run", seed=3)
    )
    lines = {line.split()[1]: line.split() for line in demo_page.commands(run)[:2]}
    assert tyro.cli(collect.Config, args=lines["collect"][2:]) == run.collect_config
    parsed = tyro.cli(
        train_config.TrainBC,
        args=lines["train"][3:],
        default=train_config.default_config("bc", "lift"),
    )
    assert parsed == run.bc_config
    tuned = demo_page.commands(run)[2].split()
    parsed = tyro.cli(
        train_config.ALGORITHMS[algorithm],
        args=tuned[3:],
        default=train_config.default_config(algorithm, "lift"),
    )
    assert parsed == run.rl_config
