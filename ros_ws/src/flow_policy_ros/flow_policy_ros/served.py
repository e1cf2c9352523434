"""What a policy node serves once it is configured, made from its parameters. No ROS in here: numbers in, plans out."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.errors import InputError
from flow_policy_rl.serving.chunk_scheduler import ChunkScheduler
from flow_policy_rl.serving.commander import Commander
from flow_policy_rl.serving.monitor import Familiarity
from flow_policy_rl.serving.onnx_policy import OnnxPolicy
from flow_policy_rl.serving.robot import Robot, load_robot
from flow_policy_rl.serving.safety import EmergencyStop, SafetyFilter
from flow_policy_rl.serving.streams import Snapshot, Streams, with_measured
from flow_policy_rl.spec import PolicySpec

WARM_UP = 20
SAME_AFTER_RELOAD = (
    "robot",
    "joint_names",
    "control_dt",
    "action_horizon",
    "execute_horizon",
    "prefix_horizon",
)

Values = Callable[[str], object]  # a parameter's value by name


@dataclass
class Served:
    """A policy for a robot, and what stands between the two.

    Attributes:
        policy, familiarity: exchanged by `replace`.
        rng: where random noise comes from.
    """

    policy: OnnxPolicy
    robot: Robot
    streams: Streams
    commander: Commander
    familiarity: Familiarity
    rng: np.random.Generator

    @classmethod
    def load(cls, get: Values, emergency: EmergencyStop) -> "Served":
        """Everything that the parameters name, checked and warmed up.

        Raises:
            InputError: a file is missing or broken, or policy, robot file and parameters do not fit.
        """
        policy, robot = OnnxPolicy(get("policy")), load_robot(get("robot"))
        spec = policy.spec
        if spec.robot != robot.name:
            raise InputError(
                f"policy '{policy.path}' is for robot '{spec.robot}', the robot file is '{robot.name}'"
            )
        joining = get("joining")
        if joining == "auto":
            joining = "rtc" if spec.prefix_horizon else "replace"
        scheduler = ChunkScheduler(spec, get("lead_s"), joining)
        safety = _safety(get, robot, spec)
        emergency.max_consecutive_limited = _most_limited(get)
        policy.warm_up(WARM_UP)
        return cls(
            policy,
            robot,
            Streams(with_measured(spec, robot.topics), get("max_input_age_s")),
            Commander(scheduler, safety, emergency, get("soft_start_s"), _tolerance(get)),
            Familiarity(spec, get("max_sigma")),
            np.random.default_rng(get("seed")),
        )

    def apply(self, get: Values) -> None:
        """Take over the numbers that may change while it runs.

        Raises:
            InputError: they do not fit the robot; nothing has changed.
        """
        self.commander.safety = _safety(get, self.robot, self.policy.spec)
        self.streams.max_age = int(get("max_input_age_s") * 1e9)
        self.commander.soft_start_s = get("soft_start_s")
        self.commander.max_tracking_error = _tolerance(get)
        self.familiarity.max_sigma = get("max_sigma")
        self.commander.emergency.max_consecutive_limited = _most_limited(get)

    def replacement(self, path: str) -> OnnxPolicy:
        """A policy that may take the place of the one in service, warmed up.

        Raises:
            InputError: the file is broken, or has another interface.
        """
        policy = OnnxPolicy(path)
        new, old = policy.spec, self.policy.spec
        for what in SAME_AFTER_RELOAD:
            if getattr(new, what) != getattr(old, what):
                raise InputError(
                    f"{what} is {getattr(new, what)} in the new file, {getattr(old, what)} in the old"
                )
        if _interface(new) != _interface(old):
            raise InputError(
                "the new file has other observations: deactivate, clean up and configure again"
            )
        policy.warm_up(WARM_UP)
        return policy

    def replace(self, policy: OnnxPolicy) -> None:
        """Serve this one from now on; the next chunk begins anew."""
        self.familiarity = Familiarity(policy.spec, self.familiarity.max_sigma)
        self.policy = policy
        self.commander.scheduler.reset()

    def inputs(self, snapshot: Snapshot) -> dict[str, np.ndarray]:
        """What the graph takes besides noise, each with a batch of one."""
        prefix = self.commander.prefix_inputs(snapshot.stamp)
        return {n: snapshot.obs[n][None] for n in self.policy.field_names} | prefix

    def noise(self, random: bool) -> np.ndarray:
        """Where the flow starts, (1, H, A)."""
        if random:
            return self.rng.standard_normal((1, *self.policy.chunk_shape), dtype=np.float32)
        return self.policy.zero_noise()


def _safety(get: Values, robot: Robot, spec: PolicySpec) -> SafetyFilter:
    return SafetyFilter(
        robot,
        spec.joint_names,
        spec.control_dt,
        max_start_distance=get("max_start_distance"),
        position_margin=get("position_margin"),
        workspace=get("workspace"),
    )


def _most_limited(get: Values) -> int:
    """Plans in a row that may be limited. In a dry run the arm does not follow, so plans are limited for ever."""
    return get("max_limited_in_a_row") if get("armed") else 0


def _tolerance(get: Values) -> float:
    """How far the arm may be from its command. In a dry run it does not follow."""
    return get("max_tracking_error") if get("armed") else 0.0


def _interface(spec: PolicySpec) -> list[tuple]:
    """What a policy reads."""
    return [(f.name, f.kind, f.elements, f.source, f.resolution) for f in spec.observations]
