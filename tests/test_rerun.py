"""Files for the Rerun viewer: what is read back is what was recorded and planned, at its time."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bag_toys import IMAGE, MS, ROBOT, motion, picture, recorded, write
from onnx_toys import holding_policy
from toys import small_spec

from flow_policy_rl import cli, replay
from flow_policy_rl.spec import ObservationField

needs_rerun = pytest.mark.skipif(
    importlib.util.find_spec("rerun") is None, reason="rerun-sdk is not installed"
)


def read(path: Path, clock: str) -> dict[str, tuple[np.ndarray, list]]:
    """By entity: times in s, sorted, and the scalar or JPEG at each; of a file that Rerun's own check passes."""
    from rerun.chunk import RrdReader

    check = [sys.executable, "-m", "rerun", "rrd", "verify", str(path)]
    assert subprocess.run(check, capture_output=True, text=True).returncode == 0
    found: dict[str, list] = {}
    for chunk in RrdReader(path).stream().to_chunks():
        batch = chunk.to_record_batch()
        for name in batch.schema.names:
            if name in ("Scalars:scalars", "EncodedImage:blob"):
                times = batch.column(clock).cast("int64").to_numpy() / 1e9
                rows = zip(times, (row[0] for row in batch.column(name).to_pylist()), strict=True)
                found.setdefault(chunk.entity_path.strip("/"), []).extend(rows)
    for rows in found.values():
        rows.sort(key=lambda row: row[0])
    return {
        entity: (np.array([time for time, _ in rows]), [value for _, value in rows])
        for entity, rows in found.items()
    }


@pytest.fixture
def bag_and_policy(tmp_path) -> tuple[Path, Path]:
    """A robot that moves as `motion` and sees a brightening wall, and a policy that holds still."""
    (tmp_path / "robot.yaml").write_text(ROBOT)
    spec = small_spec(robot=str(tmp_path / "robot.yaml"))
    camera = ObservationField("wall", "image", (), "", source="front", resolution=(16, 24))
    spec = type(spec)(**vars(spec) | {"observations": (*spec.observations, camera)})
    messages = recorded(4.0)
    for k in range(40):
        ns = 1_000_000_000 + k * 100 * MS
        messages.append(("/front", IMAGE, ns + MS, picture(ns, 32, 48, 50 + 5 * k)))
    messages.sort(key=lambda message: message[2])
    write(tmp_path / "bag", messages)
    return tmp_path / "bag", holding_policy(tmp_path / "policy.onnx", spec)


@needs_rerun
def test_a_replay_reads_back(bag_and_policy, tmp_path):
    """Joints by the closed form of their motion, plans by the table of steps, pictures by their brightness."""
    import cv2

    bag, policy = bag_and_policy
    result = replay.main(
        replay.Config(bag, policy, compare=policy, out=tmp_path / "out", rerun=tmp_path / "a.rrd")
    )
    found = read(Path(result["rerun"]), "bag_time")
    numbers = {"measured", "truth", "planned", "beyond", "planned_2", "beyond_2"}
    wanted = {f"joints/{joint}/{name}" for joint in "ab" for name in numbers}
    wanted |= {"camera/wall", "error", "error_2", "latency_ms/inference", "latency_ms/inference_2"}
    assert set(found) == wanted
    times, measured = found["joints/a/measured"]
    assert len(times) == result["chunks"]
    assert np.allclose(measured, motion(times - 1.0)[0], atol=0.02)  # of the sample before
    with (tmp_path / "out/steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    for name, wanted in (("planned", "1"), ("beyond", "0")):
        rows = sorted(
            (float(r["due_s"]), float(r["policy/b"])) for r in steps if r["executed"] == wanted
        )
        for suffix in ("", "_2"):
            times, values = found[f"joints/b/{name}{suffix}"]
            assert np.allclose(times, [t for t, _ in rows], atol=1e-6)
            assert np.allclose(sorted(values), sorted(v for _, v in rows), atol=1e-6)
    times, truth = found["joints/b/truth"]
    assert np.allclose(truth, motion(times - 1.0)[1], atol=0.01)
    times, jpegs = found["camera/wall"]
    for time, jpeg in zip(times, jpegs, strict=True):
        pixels = cv2.imdecode(np.array(jpeg, np.uint8), cv2.IMREAD_COLOR)
        assert pixels.shape == (16, 24, 3)
        newest = np.floor((time - 1.0) / 0.1 + 1e-6)
        assert abs(pixels.mean() - (50 + 5 * newest)) < 6  # or one frame before
    assert len(found["latency_ms/inference"][0]) == result["chunks"]
    assert np.mean(found["error"][1]) == pytest.approx(result["mae"], rel=0.02)  # of whole chunks


@needs_rerun
def test_an_evaluation_reads_back(tmp_path, capsys):
    path = tmp_path / "deep" / "eval.rrd"
    code = cli.main(f"eval --policy lift --episodes 2 --rerun {path} --json".split())
    assert code == 0, capsys.readouterr().err
    found = read(path, "episode_time")
    films = [name for name in found if name.endswith("/film")]
    assert len(films) == 2
    for name in films:
        times, _ = found[name]
        assert np.allclose(np.diff(times), 0.05)
        joints, positions = found[name.replace("film", "joints/panda_joint2")]
        assert np.array_equal(times, joints)
        assert np.ptp(positions) > 0.1


def test_where_it_is_missing_or_misnamed_one_line_says_so(
    bag_and_policy, tmp_path, capsys, monkeypatch
):
    bag, policy = bag_and_policy
    command = f"replay --bag {bag} --policy {policy} --out {tmp_path}/out --rerun {tmp_path}/a"
    assert cli.main([*command.split()]) == 2
    assert "must end in .rrd" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "rerun", None)
    assert cli.main([*command.split()[:-1], f"{tmp_path}/a.rrd"]) == 2
    error = capsys.readouterr().err
    assert "pip install 'flow_policy_rl[rerun]'" in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "a.rrd").exists()
