"""What a controller's reference does whose period and transport the plans know nothing of: why `LEAD_S`."""

import numpy as np
import pytest
from commander_toys import HERE, make_commander

from flow_policy_rl.serving.chunk_scheduler import LEAD_S
from flow_policy_rl.serving.trajectory_controller import TrajectoryController

LIMIT = 20.0  # rad/s^2, of the toy's arm
SECONDS = 8.0
TRANSPORT_S = (0.001, 0.003)


def strongest(lead_s: float, cycle_s: float, seed: int) -> float:
    """Largest acceleration of the reference (as a share of the limit) from one controller cycle to the next, while
    chunks along a smooth way come and are obeyed at the first cycle after their arrival."""
    rng, one = np.random.default_rng(seed), make_commander(lead_s=lead_s)
    names = one.safety.joint_names
    controller, arrived, reference = TrajectoryController(names, HERE), [], []
    cycle, observed = rng.uniform(0, cycle_s), 0.0
    while cycle < SECONDS:
        while observed <= cycle:
            stamp, now = round((100 + observed) * 1e9), round((100.004 + observed) * 1e9)
            ahead = observed + one.scheduler.control_dt * np.arange(1, 7)
            chunk = np.tile(0.5 * (1 - np.cos(np.pi * ahead))[:, None], 3)
            plan = one.accept(chunk, stamp, now, HERE).plan
            arrived.append((observed + 0.004 + rng.uniform(*TRANSPORT_S), plan.points(now)))
            observed += 0.2 + rng.uniform(0, 0.01)
        while arrived and arrived[0][0] <= cycle:
            controller.accept(names, *arrived.pop(0)[1], cycle)
        reference.append(controller.sample(cycle)[0][:2])
        cycle += cycle_s
    return float(np.abs(np.diff(reference, n=2, axis=0)).max()) / cycle_s**2 / LIMIT


@pytest.mark.parametrize("cycle_s", [0.01, 0.002, 0.001])
def test_a_late_message_costs_little_with_the_usual_lead_and_much_with_a_short_one(cycle_s):
    worst = {lead: max(strongest(lead, cycle_s, k) for k in range(3)) for lead in (0.01, LEAD_S)}
    print({lead: round(share, 1) for lead, share in worst.items()})
    assert worst[LEAD_S] < 2
    assert worst[0.01] > 2 * worst[LEAD_S]
