"""When an action is due, and how one chunk follows another."""

import numpy as np
import pytest
from message_toys import MS
from toys import small_spec

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.chunk_scheduler import METHODS, ChunkScheduler


def test_late_actions_are_dropped_and_the_rest_keep_their_place_in_time():
    scheduler = ChunkScheduler(small_spec(), min_lead_s=0.01)
    chunk = np.arange(12.0).reshape(6, 2)
    scheduler.join(chunk, stamp=800 * MS, now=800 * MS)
    rest = scheduler.join(chunk, stamp=1000 * MS, now=1000 * MS + 95 * MS)
    # Due at 50, 100, 150, ... ms: the first is past, the second is closer than the lead.
    assert (rest.due - 1000 * MS).tolist() == [150 * MS, 200 * MS, 250 * MS, 300 * MS]
    assert np.array_equal(rest.positions, chunk[2:])
    assert scheduler.join(chunk, 0, 10_000 * MS) is None


@pytest.mark.parametrize("joining", METHODS)
def test_a_run_begins_with_the_first_action_however_long_its_inference_took(joining):
    """Nothing is in force: the robot stands where it was seen, and would have to jump to a later action."""
    spec = small_spec(prefix_horizon=2)
    chunk = np.arange(12.0).reshape(6, 2)
    first = ChunkScheduler(spec, joining=joining).join(chunk, 1000 * MS, 1200 * MS)
    assert first.due[0] == 1250 * MS
    assert np.allclose(first.positions[:4], chunk[:4])
    late = None if joining != "sync" else 1550 * MS
    over = ChunkScheduler(spec, joining=joining).join(chunk, 1000 * MS, 1500 * MS)
    assert (over.due[0] if over else None) == late


def ramp(start: float, slope: float) -> np.ndarray:
    """Chunk (6, 2) of two equal joints."""
    return np.repeat((start + slope * np.arange(1, 7))[:, None], 2, axis=1)


@pytest.mark.parametrize("joining", ["replace", "crossfade", "ensemble"])
@pytest.mark.parametrize(("now", "past"), [(105, 0), (165, 2)])
def test_chunks_that_agree_join_without_a_seam(joining, now, past):
    scheduler = ChunkScheduler(small_spec(), joining=joining)
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    joined = scheduler.join(ramp(0.2, 0.1), 100 * MS, now * MS)
    assert np.allclose(joined.positions, ramp(0.2, 0.1)[past:])
    assert np.allclose(joined.seam_jump, 0, atol=1e-9)


@pytest.mark.parametrize("joining", ["replace", "crossfade", "ensemble", "sync"])
@pytest.mark.parametrize("lead_s", [0.01, 0.05, 0.2])
def test_no_target_is_due_before_the_plan_may_change(joining, lead_s):
    """Also of the first chunk of a run, which may begin while the arm still comes to rest, at any rate of a policy."""
    scheduler = ChunkScheduler(small_spec(), lead_s, joining)
    for now in (0, 400 * MS):
        targets = scheduler.join(ramp(0.0, 0.1), now, now)
        assert targets.due[0] >= now + (lead_s + 0.2 * 0.05) * 1e9 - 1
        if now == 0:
            assert targets.due[0] <= now + (lead_s + 0.05) * 1e9
        assert (np.diff(targets.due) == 50 * MS).all()


def test_a_crossfade_begins_with_the_old_chunk_and_ends_with_the_new():
    scheduler = ChunkScheduler(small_spec(), joining="crossfade")
    scheduler.join(np.zeros((6, 2)), 0, 0)
    joined = scheduler.join(np.ones((6, 2)), 50 * MS, 50 * MS).positions[:, 0]
    # The old chunk ends at 300 ms, the new one begins at 100 ms with weight 1/5.
    assert np.allclose(joined, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_an_ensemble_is_the_weighted_mean_of_all_predictions_for_a_moment():
    scheduler = ChunkScheduler(small_spec(), joining="ensemble")
    assert scheduler.period == 50 * MS
    scheduler.join(np.zeros((6, 2)), 0, 0)
    scheduler.join(np.ones((6, 2)), 50 * MS, 50 * MS)
    joined = scheduler.join(np.full((6, 2), 4.0), 100 * MS, 100 * MS).positions[:, 0]
    w = np.exp(-0.01 * np.arange(3))
    assert np.allclose(
        joined[:4], (w @ [0, 1, 4]) / w.sum()
    )  # due at 150 to 300 ms: three predictions
    assert np.isclose(joined[4], (w[:2] @ [1, 4]) / w[:2].sum())  # 350 ms: the first chunk is over
    assert joined[5] == 4.0


def test_states_that_jitter_do_not_cost_inferences():
    """100 Hz, stamps up to half a millisecond early or late: one inference per control step, not one per 60 ms."""
    rng = np.random.default_rng(0)
    scheduler = ChunkScheduler(small_spec(), joining="ensemble")
    started = []
    for stamp in 10 * MS * np.arange(1000) + rng.integers(-MS // 2, MS // 2, 1000):
        if scheduler.due(int(stamp)):
            scheduler.started(int(stamp))
            started.append(stamp)
    assert len(started) == 200
    assert np.allclose(np.diff(started), 50 * MS, atol=MS)


def test_sync_executes_then_looks_again():
    scheduler = ChunkScheduler(small_spec(), joining="sync")
    scheduler.started(0)
    assert not scheduler.due(10_000 * MS)  # while the inference runs
    targets = scheduler.join(ramp(0.0, 0.1), 0, 300 * MS)
    assert targets.due.tolist() == [350 * MS, 400 * MS, 450 * MS, 500 * MS]
    assert not scheduler.due(499 * MS)
    assert scheduler.due(500 * MS)


def test_rtc_hands_the_policy_what_will_be_executed_meanwhile():
    with pytest.raises(InputError, match="rtc needs a policy trained with a prefix"):
        ChunkScheduler(small_spec(), joining="rtc")
    scheduler = ChunkScheduler(small_spec(prefix_horizon=2), joining="rtc")
    assert scheduler.prefix(0).delay == 0  # nothing is in force
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    scheduler.join(ramp(0.0, 0.1), 0, 60 * MS)  # a delay of more than one step
    prefix = scheduler.prefix(100 * MS)
    assert prefix.delay == 2
    assert np.allclose(prefix.actions[:, 0], [0.3, 0.4])  # due at 150 and 200 ms
    assert scheduler.prefix(260 * MS).delay == 1  # one action is left of the chunk


@pytest.mark.parametrize("now", [110, 190])
def test_rtc_takes_over_smoothly_from_the_end_of_its_prefix_however_early_it_comes(now):
    scheduler = ChunkScheduler(small_spec(prefix_horizon=2), joining="rtc")
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    scheduler.join(ramp(0.0, 0.1), 0, 60 * MS)
    assert scheduler.prefix(100 * MS).delay == 2
    chunk = np.concatenate([ramp(0.2, 0.1)[:2], np.full((4, 2), 3.0)])  # as told, then elsewhere
    joined = scheduler.join(chunk, 100 * MS, now * MS)
    told = [0.3, 0.4] if now == 110 else []
    # In force is 0.5 at 250 and 0.6 at 300 ms, its end.
    blended = [0.8 * 0.5 + 0.2 * 3.0, 0.6 * 0.6 + 0.4 * 3.0]
    assert np.allclose(joined.positions[:, 0], [*told, *blended, 3.0, 3.0])
    assert np.allclose(joined.seam_jump, (blended[0] - 0.5) / 0.05)


def test_rtc_takes_over_where_its_prefix_ends_though_a_longer_one_would_fit():
    scheduler = ChunkScheduler(small_spec(prefix_horizon=2), joining="rtc")
    scheduler.join(ramp(0.0, 0.1), 0, 0)
    assert scheduler.prefix(100 * MS).delay == 1
    chunk = np.concatenate([ramp(0.2, 0.1)[:1], np.full((5, 2), 3.0)])
    joined = scheduler.join(chunk, 100 * MS, 110 * MS)
    # In force is 0.4 at 200, 0.5 at 250 and 0.6 at 300 ms, its end.
    blended = [0.8 * 0.4 + 0.2 * 3.0, 0.6 * 0.5 + 0.4 * 3.0, 0.4 * 0.6 + 0.6 * 3.0]
    assert np.allclose(joined.positions[:, 0], [0.3, *blended, 3.0, 3.0])
    assert np.allclose(joined.seam_jump, (blended[0] - 0.4) / 0.05)


def test_a_seam_is_what_the_new_chunk_adds_and_not_the_motion_itself():
    """Velocity of both chunks changes by 2 per step; one of them is 0.1 off."""
    scheduler = ChunkScheduler(small_spec())
    curve = lambda start: np.repeat((np.arange(start, start + 6) ** 2 * 0.05)[:, None], 2, axis=1)  # noqa: E731
    scheduler.join(curve(1), 0, 0)
    assert np.allclose(scheduler.join(curve(3), 100 * MS, 100 * MS).seam_jump, 0)
    off = scheduler.join(curve(4) + 0.1, 150 * MS, 150 * MS)
    assert np.allclose(off.seam_jump, 0.1 / 0.05)


def test_unknown_joining_names_the_methods():
    with pytest.raises(InputError, match="replace, crossfade, ensemble, rtc, sync"):
        ChunkScheduler(small_spec(), joining="blend")


def test_inference_is_due_once_per_executed_horizon_and_again_after_a_jump():
    scheduler = ChunkScheduler(small_spec())
    assert scheduler.due(0)
    scheduler.started(0)
    assert not scheduler.due(198 * MS)
    assert scheduler.due(200 * MS)
    scheduler.started(200 * MS)
    assert not scheduler.due(200 * MS)  # the same state again
    assert scheduler.due(0)
