"""The numbers of an offline evaluation, against closed forms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_policy_rl.offline import metrics
from flow_policy_rl.offline.durations import BLOCK, Durations, StreamFacts
from flow_policy_rl.offline.truth import Pending, SampledTruth
from flow_policy_rl.spec import ObservationField


def test_baselines_seams_and_errors():
    truth = np.arange(4.0)[None, :, None] + 1  # (1, 4, 1): 1 2 3 4
    hold, copied = metrics.baselines(np.array([[0.0]]), np.array([[1.0]]), truth)
    assert np.abs(hold).mean() == 2.5
    assert np.abs(copied).mean() == 1.5
    _, unknown = metrics.baselines(np.array([[0.0]]), np.array([[np.nan]]), truth)
    assert np.array_equal(unknown, hold)
    chunks = np.array([[[0.0], [1.0], [2.0]], [[2.5], [3.5], [4.5]]])
    jumps = metrics.seams(chunks, np.array([0.0, 0.2]), np.zeros(2, int), 2, 0.1)
    assert jumps["position_max"] == pytest.approx(0.5)  # 2.5 instead of 2.0
    assert jumps["velocity_max"] == pytest.approx(5.0)  # 15 instead of 10 per second
    assert metrics.seams(chunks, np.array([0.0, 0.2]), np.arange(2), 2, 0.1)["position_max"] is None


def test_smoothness_of_a_known_motion():
    dt, t = 0.01, np.arange(0, 2 * np.pi, 0.01)
    result = metrics.smoothness([np.sin(t)[:, None]], dt)
    for order in ("velocity", "acceleration", "jerk"):
        assert result[f"{order}_peak"] == pytest.approx(1.0, abs=0.01)
        assert result[f"{order}_rms"] == pytest.approx(np.sqrt(0.5), abs=0.01)
    assert result["path_length"] == pytest.approx(4.0, abs=0.01)
    jerk = t**3 * (10 - 15 * t / 3 + 6 * t**2 / 9)
    rng = np.random.default_rng(0)
    smooth = metrics.spectral_arc_length(jerk[:300, None], dt)
    rough = metrics.spectral_arc_length(jerk[:300, None] + rng.normal(0, 0.3, (300, 1)), dt)
    assert rough < smooth < 0
    assert metrics.spectral_arc_length(np.zeros((50, 2)), dt) is None


def test_motions_are_the_executed_parts_of_inferences_that_follow_each_other():
    """A late inference and another segment begin a motion anew."""
    chunks = np.arange(15.0).reshape(5, 3, 1)
    times, segment = np.array([0.0, 0.2, 0.4, 0.9, 1.1]), np.array([0, 0, 0, 0, 1])
    motions = metrics.stitch(chunks, times, segment, 2, 0.1)
    assert [m.ravel().tolist() for m in motions] == [[0, 1, 3, 4, 6, 7], [9, 10], [12, 13]]


def test_smoothness_is_that_of_the_longest_piece_without_a_gap():
    """0.1 and 0.2 per step of 0.1 s, of which 13 points remain where one joint is unknown at the seventh of 20."""
    motion = np.arange(20.0)[:, None] * [0.1, 0.2]
    motion[6, 1] = np.nan
    result = metrics.smoothness([motion], 0.1)
    assert result["path_length"] == pytest.approx(12 * 0.3)
    assert result["velocity_peak"] == pytest.approx(2.0)
    assert metrics.smoothness([motion[:5]], 0.1)["path_length"] == pytest.approx(4 * 0.3)
    assert metrics.smoothness([motion[:4]], 0.1)["path_length"] is None


def test_spectral_arc_length_is_of_a_shape_alone_below_ten_hertz():
    """Balasubramanian et al., eq. 5, by a loop; neither size nor, beyond 10 Hz, shaking changes it."""
    dt = 0.01
    t = np.arange(0, 1 + dt / 2, dt)
    reach = (t**3 * (10 - 15 * t + 6 * t**2))[:, None]
    found = metrics.spectral_arc_length(reach, dt)
    speed = np.diff(reach[:, 0]) / dt
    spectrum = np.abs(np.fft.fft(speed, 2048)) / speed.sum()
    last = max(k for k in range(int(10 * 2048 * dt) + 1) if spectrum[k] >= 0.05)
    arc = sum(np.hypot(1 / last, spectrum[k + 1] - spectrum[k]) for k in range(last))
    assert found == pytest.approx(-arc, rel=1e-9)
    assert metrics.spectral_arc_length(7 * reach, dt) == pytest.approx(found)
    shaken = reach + 2e-3 * np.sin(2 * np.pi * 20 * t)[:, None]
    assert metrics.spectral_arc_length(shaken, dt) == pytest.approx(found, rel=0.05)


def test_a_seam_is_the_larger_of_the_two_steps_in_velocity_around_it():
    for new in (
        [2.5, 4.0],
        [2.0, 3.5],
    ):  # 10 per second before; the step is into the chunk, or in it
        chunks = np.array([[[0.0], [1.0], [2.0]], [[new[0]], [new[1]], [4.5]]])
        jumps = metrics.seams(chunks, np.array([0.0, 0.2]), np.zeros(2, int), 2, 0.1)
        assert jumps["velocity_max"] == pytest.approx(5.0)
        late = metrics.seams(chunks, np.array([0.0, 0.3]), np.zeros(2, int), 2, 0.1)
        assert late["velocity_max"] is None


def test_best_of_several_samples_counts_what_is_known():
    """Two inferences with three samples each, of which the last inference has no truth."""
    samples = np.array([[[1.0, 3.0], [2.0, 0.0], [0.0, 0.0]]] * 2)[..., None]
    truth = np.array([[[1.0], [1.0]], [[np.nan], [np.nan]]])
    result = metrics.best_of(samples, truth)
    assert (result["samples"], result["best_mae"], result["mean_mae"]) == (3, 1.0, 1.0)
    truth[0, 1] = np.nan  # of the first action alone: 0, 1 and 1
    result = metrics.best_of(samples, truth)
    assert result["best_mae"] == 0.0
    assert result["mean_mae"] == pytest.approx(2 / 3)
    spread = (np.std([1, 2, 0]) + np.std([3, 0, 0])) / 2
    assert result["spread"] == pytest.approx(spread)


def test_what_was_never_seen_in_training_is_counted_by_observation():
    """Five standard deviations away in one element of two, and within four."""
    field = ObservationField("q", "state", ("a", "b"), "m", mean=(1.0, -1.0), std=(0.1, 0.5))
    obs = {"q": np.array([[1.0, -1.0], [1.5, -1.0], [1.0, -2.9], [1.39, 0.9]])}
    assert metrics.out_of_distribution(obs, [field]) == {"q": 0.25}


def test_errors_and_percentiles_are_by_joint_and_of_what_is_known():
    error = np.array([[[1.0, -4.0], [-3.0, np.nan]]])
    result = metrics.errors_by_joint(["a", "b"], error)
    assert result["a"] == {"mae": 2.0, "rmse": pytest.approx(5**0.5), "max": 3.0}
    assert result["b"] == {"mae": 4.0, "rmse": 4.0, "max": 4.0}
    found = metrics.percentiles(np.array([*range(101), np.nan]))
    assert found == {"p50": 50, "p95": 95, "p99": 99, "max": 100}


def test_gripper_timing():
    t = np.arange(100)
    truth = np.where((t >= 30) & (t < 70), 0.04, 0.0)
    late = np.where((t >= 33) & (t < 75), 0.04, 0.0)
    result = metrics.gripper_agreement(late, truth, 0.0, 0.04, dt=0.1)
    assert result["timing_s"] == pytest.approx(0.4)
    assert result["accuracy"] == pytest.approx(0.92)
    assert (result["switches"], result["missed_switches"]) == (2, 0)
    assert result["f1"] == pytest.approx(2 * 37 / (40 + 42))
    raised = metrics.gripper_agreement(late + 1, truth + 1, 1.0, 1.04, dt=0.1)
    assert raised == result
    hidden = np.where(t < 50, np.nan, late)  # one switch of the truth can be judged
    half = metrics.gripper_agreement(hidden, truth, 0.0, 0.04, dt=0.1)
    assert (half["switches"], half["timing_s"]) == (1, pytest.approx(0.5))
    assert half["f1"] == pytest.approx(2 * 20 / (20 + 25))
    never = metrics.gripper_agreement(np.zeros(100), truth, 0.0, 0.04, 0.1)
    assert (never["missed_switches"], never["timing_s"]) == (2, None)


def test_violations_and_comparison():
    limits = {
        "position": np.array([[-1.0, 1.0]]),
        "velocity": np.array([1.0]),
        "acceleration": np.array([100.0]),
    }
    chunks = np.array([[[0.05], [0.1], [0.3], [1.2]]])
    share = metrics.violations(chunks, np.array([[0.0]]), limits, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    soft = limits | {"acceleration": np.array([50.0])}  # 0, 15 and 70 per second squared
    share = metrics.violations(chunks, np.array([[0.0]]), soft, 0.1)
    assert share["acceleration"] == pytest.approx(1 / 3)
    # Nothing was commanded before; then the other way, beyond the other limit and in one of two joints.
    share = metrics.violations(chunks, np.array([[np.nan]]), limits, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    twice = {name: limit.repeat(2, axis=0) for name, limit in limits.items()}
    back = np.concatenate([-chunks, 0 * chunks], axis=2)
    share = metrics.violations(back, np.zeros((1, 2)), twice, 0.1)
    assert share == {"position": 0.25, "velocity": 0.5, "acceleration": 0.0}
    # A motion counts by its length: 3 of 4 actions in one, none of 8 in the other; a short one does not.
    fast, slow = 0.2 * np.arange(5.0)[:, None], np.zeros((9, 1))
    fast[4:] = fast[3]
    share = metrics.motion_violations([fast, slow, 9 * fast[:3]], limits, 0.1)
    assert share == {"position": 0.0, "velocity": pytest.approx(3 / 12), "acceleration": 0.0}
    one = np.array([1.0, 2.0, 3.0, np.nan])
    result = metrics.compare(one, one - 0.5)
    assert result["share_second_better"] == 1.0
    assert result["difference"] == -0.5
    assert result["ci95"] == [-0.5, -0.5]
    assert result["inferences"] == 3


def test_the_interval_of_a_comparison_is_that_of_its_mean():
    """Differences of spread 2: the mean of 400 of them is known to 1.96 x 2 / 20 on both sides."""
    rng = np.random.default_rng(0)
    other = rng.normal(1.0, 2.0, 400)
    result = metrics.compare(np.zeros(400), other)
    low, high = result["ci95"]
    assert high - low == pytest.approx(2 * 1.96 * other.std() / 20, rel=0.06)
    assert (low + high) / 2 == pytest.approx(result["difference"], abs=0.03)
    assert result["share_second_better"] == (other < 0).mean()


def test_durations_over_many_blocks():
    """The longest of all with its time, counts before they are sorted in, and milliseconds."""
    durations = Durations()
    for i in range(2 * BLOCK + 10):
        durations.add(5.0 if i == 100 else 0.1 + 0.8 * i / (2 * BLOCK), at=float(i))
    assert durations.count == 2 * BLOCK + 10
    assert (durations.max, durations.max_at) == (5.0, 100.0)
    found = durations.summary_ms()
    assert found == {
        "p50": pytest.approx(500, rel=0.06),
        "p95": pytest.approx(860, rel=0.06),
        "p99": pytest.approx(892, rel=0.06),
        "max": 5000.0,
    }
    assert durations.count == 2 * BLOCK + 10
    facts = StreamFacts(periods=durations)
    assert facts.rate_hz() == pytest.approx(2.0, rel=0.06)
    one = Durations()
    one.add(0.98)  # the middle of its bin is at 1
    assert max(one.summary_ms().values()) == pytest.approx(980)


@given(st.lists(st.floats(1e-5, 100), min_size=5, max_size=300))
@settings(max_examples=30)
def test_streamed_percentiles_are_within_a_bin(values):
    durations = Durations()
    for v in values:
        durations.add(v)
    assert durations.max == max(values)
    for share in (0.5, 0.95):
        exact = np.sort(values)[max(0, int(np.ceil(share * len(values))) - 1)]
        assert durations.percentile(share) == pytest.approx(exact, rel=0.06)


def test_sampled_truth_and_pending_agree_with_interpolation():
    rng = np.random.default_rng(1)
    times = np.cumsum(rng.uniform(0.005, 0.02, 300))
    values = rng.normal(size=(300, 2))
    truth, found = SampledTruth(0.5), {}
    pending = Pending(lambda row, step, v: found.__setitem__((row, step), v))
    due = {}
    for i, (t, v) in enumerate(zip(times, values, strict=True)):
        truth.push(t, v)
        pending.resolve(t, truth.at)
        if i % 40 == 5:
            due[i] = t + np.arange(1, 60) * 0.01
            pending.add(i, due[i])
    for (row, step), v in found.items():
        exact = [np.interp(due[row][step], times, values[:, j]) for j in range(2)]
        assert np.allclose(v, exact)
    assert len(found) > 300
    assert truth.at(times[-1] + 1) is None
