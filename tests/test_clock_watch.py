"""A clock that is set is told from a thread that was held up, and from a clock that drifts."""

import pytest

from flow_policy_rl.serving.clock_watch import ClockWatch

MS = 1_000_000


class Clocks:
    """Both advance together, the first one by an offset that a test changes."""

    def __init__(self):
        self.steady_ns, self.offset, self.pauses = 5_000 * MS, 10**18, []

    def steady(self) -> int:
        self.steady_ns += self.pauses.pop() if self.pauses else 1000
        return self.steady_ns

    def read(self) -> int:
        self.steady_ns += self.pauses.pop() if self.pauses else 1000
        return self.steady_ns + self.offset


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.mark.parametrize("step_ms", [-3_600_000, -300, -20, 20, 300])
def test_a_step_is_told_once(clocks, step_ms):
    watch = ClockWatch(clocks.read, clocks.steady)
    for _ in range(3):
        assert watch.step() == 0
        clocks.steady_ns += 50 * MS
    clocks.offset += step_ms * MS
    assert watch.step() == pytest.approx(step_ms * MS, abs=0.1 * MS)
    assert watch.step() == 0


@pytest.mark.parametrize("first", [True, False])
def test_a_thread_that_is_held_up_between_its_readings_is_no_step(clocks, first):
    """And the next reading is compared with a good one."""
    watch = ClockWatch(clocks.read, clocks.steady)
    for pause in (300 * MS, 40 * MS, 2000 * MS):
        watch.step()
        clocks.pauses = [pause, 1000, 1000] if first else [1000, pause, 1000]
        assert watch.step() == 0
        clocks.offset += 15 * MS
        assert watch.step() == pytest.approx(15 * MS, abs=0.1 * MS)


def test_a_clock_that_is_slewed_is_followed(clocks):
    watch = ClockWatch(clocks.read, clocks.steady)
    for _ in range(100):
        assert watch.step() == 0
        clocks.offset += 4 * MS
