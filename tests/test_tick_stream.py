"""Positions one at a time: what the receiver sees however late ticks are."""

import numpy as np
import pytest
from commander_toys import HERE, MS, START, chunk, make_commander
from hypothesis import given, settings
from hypothesis import strategies as st

from flow_policy_rl.serving.tick_stream import TickStream

PERIOD_MS = 10
LONGEST_MS = 15  # that a plan advances from tick to tick
STANDS_MS = 200
FULL_SPEED = 2.0


def ticks(stream: TickStream, times_ms) -> np.ndarray:
    """Positions (n, 3) at times of both clocks."""
    return np.array([stream.next(START + round(t * MS), t / 1e3, True) for t in times_ms])


def test_ticks_in_time_are_the_plan():
    one = make_commander()
    stream = TickStream(one, PERIOD_MS / 1e3)
    plan = one.accept(chunk(0.5), START, START, HERE).plan
    times = np.arange(0, 600, PERIOD_MS)
    found = ticks(stream, times)
    assert np.array_equal(found, [plan.at(START + int(t) * MS).position for t in times])


@pytest.mark.parametrize("late_ms", [16, 40, 199])
def test_a_late_tick_delays_the_plan_and_leaves_nothing_out(late_ms):
    """After it the same curve, later by what is beyond one and a half ticks."""
    one = make_commander()
    stream = TickStream(one, PERIOD_MS / 1e3)
    plan = one.accept(chunk(0.5), START, START, HERE).plan
    before = np.arange(0, 150, PERIOD_MS)
    after = before[-1] + late_ms + np.arange(0, 500, PERIOD_MS)
    found = ticks(stream, np.concatenate([before, after]))
    lost = late_ms - LONGEST_MS
    expected = [plan.at(START + round(t * MS)).position for t in [*before, *(after - lost)]]
    assert np.allclose(found, expected, atol=1e-9)


def test_after_a_longer_stall_a_run_begins_at_rest_where_the_last_tick_was():
    one = make_commander(soft_start_s=0.5)
    stood = []
    stream = TickStream(one, PERIOD_MS / 1e3, lambda: stood.append(True))
    one.accept(chunk(0.5), START, START, HERE)
    there = ticks(stream, np.arange(0, 310, PERIOD_MS))[-1]
    assert not stood
    later = 300 + STANDS_MS + 1
    at = START + later * MS
    stream.hold_back(at, later / 1e3)
    assert stood == [True]
    assert np.array_equal(one.plan.at(at).position, there)
    assert not one.plan.at(at).velocity.any()
    fresh = make_commander(soft_start_s=0.5)
    new = one.accept(there + chunk(0.3), at, at, there).plan
    alone = fresh.accept(there + chunk(0.3), at, at, there).plan
    lead = one.scheduler.min_lead
    assert np.allclose(
        new.at(at + lead + 100 * MS).position, alone.at(at + 100 * MS).position, atol=5e-3
    )


@pytest.mark.parametrize("jump_ms", [-40_000, 40_000])
def test_a_clock_that_jumps_moves_nobody(jump_ms):
    one = make_commander()
    stream = TickStream(one, PERIOD_MS / 1e3)
    one.accept(chunk(0.5), START, START, HERE)
    there = ticks(stream, np.arange(0, 110, PERIOD_MS))[-1]
    for k in range(1, 50):
        now = START + (100 + jump_ms + 10 * k) * MS
        assert np.array_equal(stream.next(now, 0.1 + 0.01 * k, True), there)


@pytest.mark.parametrize("rate", [0.1, 1.0, 5.0])
def test_simulated_time_at_any_rate_is_followed(rate):
    one = make_commander()
    stream = TickStream(one, PERIOD_MS / 1e3)
    plan = one.accept(chunk(0.5), START, START, HERE).plan
    for k in range(100):
        now = START + round(k * PERIOD_MS * rate * MS)
        found = stream.next(now, k * PERIOD_MS / 1e3, True)
        assert np.array_equal(found, plan.at(now).position)


def test_when_a_run_is_over_a_few_ticks_say_where_and_then_none():
    one = make_commander()
    stream = TickStream(one, PERIOD_MS / 1e3)
    one.accept(chunk(0.5), START, START, HERE)
    ticks(stream, np.arange(0, 100, PERIOD_MS))
    plan = one.stop(START + 100 * MS)
    times = np.arange(100, 1000, PERIOD_MS)
    found = [stream.next(START + int(t) * MS, t / 1e3, False) for t in times]
    number = next(k for k, position in enumerate(found) if position is None)
    assert all(position is None for position in found[number:])
    resting = [p for p in found[:number] if np.array_equal(p, plan.spline.positions[-1])]
    assert 3 <= len(resting) <= 5
    assert stream.next(START + 1000 * MS, 1.0, True) is not None  # a run that is not over goes on


@settings(max_examples=100)
@given(
    gaps=st.lists(
        st.one_of(st.floats(1, 15), st.floats(1, 15), st.floats(15, 600)),
        min_size=20,
        max_size=120,
    ),
    seed=st.integers(0, 2**31),
)
def test_no_stall_makes_a_tick_jump(gaps, seed):
    """Chunks that come at any time between ticks, stops, stalls of any length, jumps of the clock: never further from
    one tick to the next than full speed goes in one and a half."""
    rng = np.random.default_rng(seed)
    one = make_commander(soft_start_s=rng.choice([0.0, 0.3]))
    stream = TickStream(one, PERIOD_MS / 1e3)
    clock, time_ms, at = START, 0.0, HERE
    for gap in gaps:
        share = np.sort(rng.uniform(size=rng.integers(0, 3)))
        for part in share:  # something changes between two ticks
            now, steady = clock + round((time_ms + part * gap) * MS), (time_ms + part * gap) / 1e3
            stream.hold_back(now, steady)
            if rng.random() < 0.1:
                one.stop(now)
            else:
                one.accept(at + chunk(rng.uniform(-1, 1)), now, now, at)
        if rng.random() < 0.02:
            clock += rng.integers(-1000, 1000) * MS
            stream.stand(clock + round(time_ms * MS), time_ms / 1e3)
        time_ms += gap
        found = stream.next(clock + round(time_ms * MS), time_ms / 1e3, True)
        if found is None:
            continue
        assert np.abs(found - at).max() <= FULL_SPEED * LONGEST_MS / 1e3 + 1e-5
        at = found
