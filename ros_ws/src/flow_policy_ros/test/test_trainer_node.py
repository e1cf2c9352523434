"""Training under ROS: starts, tells, stops, exports, and says why where it cannot."""

import pytest
from diagnostic_msgs.msg import DiagnosticArray
from std_srvs.srv import Trigger

from flow_policy_rl.serving.onnx_policy import OnnxPolicy


def newest(received: list, name: str) -> tuple[str, dict]:
    found = [s for msg in received for s in msg.status if s.name == name]
    return (found[-1].message, {p.key: p.value for p in found[-1].values}) if found else ("", {})


@pytest.mark.slow
def test_training_tells_its_progress_and_exports(start, peer, tmp_path):
    from flow_policy_rl import cli

    demos, run_dir = tmp_path / "demos.hdf5", tmp_path / "run"
    assert cli.main(f"collect --task lift --episodes 3 --out {demos} --json".split()) == 0
    status = peer.listen(DiagnosticArray, "/diagnostics")
    metrics = peer.listen(DiagnosticArray, "/trainer_node/metrics")
    nodes = start(
        trainer_node={
            "demos": str(demos),
            "run_dir": str(run_dir),
            "args": "--bc.num-steps 100000 --bc.batch-size 32 --network.width 32",
        }
    )
    call = lambda name: peer.call(Trigger, f"/trainer_node/{name}", Trigger.Request())  # noqa: E731
    refused = call("export")
    assert not refused.success
    assert "policy.safetensors yet" in refused.message
    assert call("start").success
    assert "under way" in call("start").message
    peer.until(lambda: metrics, "metrics", 60.0)
    _, values = newest(metrics, "/trainer_node: metrics")
    assert any("loss" in key for key in values)
    assert call("stop").success
    peer.until(lambda: "training stopped" in newest(status, "/trainer_node")[0], "stopped", 30.0)

    assert (
        cli.main(
            f"train bc --task lift --demos {demos} --run-dir {run_dir} --bc.num-steps 20 --bc.batch-size 32 "
            "--network.width 32 --json".split()
        )
        == 0
    )
    assert call("export").success
    peer.until(lambda: "export finished" in newest(status, "/trainer_node")[0], "exported", 90.0)
    assert OnnxPolicy(run_dir / "policy.onnx").spec.task == "lift"
    nodes["trainer_node"].signal(2)
    assert nodes["trainer_node"].wait(60.0) == 0


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"args": "--preset 'paper"}, "parameter args: No closing quotation"),
        ({"run_dir": "{here}/file/run"}, "cannot be made: a file is in the way"),
    ],
)
def test_a_start_that_cannot_be_is_refused_and_the_node_goes_on(start, peer, tmp_path, wrong, says):
    (tmp_path / "file").write_text("")
    given = {"run_dir": "{here}/run"} | wrong
    start(trainer_node={k: v.format(here=tmp_path) for k, v in given.items()})
    for _ in range(2):
        answer = peer.call(Trigger, "/trainer_node/start", Trigger.Request())
        assert not answer.success
        assert says in answer.message


@pytest.mark.slow
def test_a_training_that_cannot_start_says_why(start, peer, tmp_path):
    status = peer.listen(DiagnosticArray, "/diagnostics")
    start(
        trainer_node={
            "demos": str(tmp_path / "none.hdf5"),
            "run_dir": str(tmp_path / "run"),
            "autostart": True,
        }
    )
    peer.until(
        lambda: "training failed: error: demonstrations" in newest(status, "/trainer_node")[0],
        "diagnostics say why",
        60.0,
    )
