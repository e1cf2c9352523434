"""Is the policy plugged in right? Most failures of deployed policies are names, units, rates and pictures."""

from dataclasses import asdict, dataclass

import numpy as np

from flow_policy_rl.offline.metrics import OUTLIER_STD, out_of_distribution
from flow_policy_rl.offline.recording import Recording
from flow_policy_rl.offline.truth import GAP_S
from flow_policy_rl.serving.robot import Robot
from flow_policy_rl.serving.streams import topics_of
from flow_policy_rl.spec import PolicySpec

MAX_SHARE_OUT = 0.05
MAX_DELAY_S = 60.0  # stamps further than this from reception are of another clock
NODE_AGE_S = 0.2  # `max_input_age_s` of the policy node, unless it is set
DEGREES = 57.29577951308232


@dataclass(frozen=True)
class Check:
    """One question: `level` is ok, note, warning or error."""

    name: str
    level: str
    detail: str


def check(recording: Recording, spec: PolicySpec, robot: Robot) -> list[dict]:
    """All questions, the worst answers first."""
    fields = topics_of(spec, robot.topics)
    found = [
        _robot(spec, robot),
        *_joints(recording, spec, robot),
        _units(recording, spec, robot),
        *_rates(recording, spec, fields),
        *_images(recording, fields),
        _clock(recording),
        _distribution(recording, spec),
        _truth(recording, spec),
    ]
    order = ("error", "warning", "note", "ok")
    return [asdict(c) for c in sorted((c for c in found if c), key=lambda c: order.index(c.level))]


def _robot(spec: PolicySpec, robot: Robot) -> Check:
    same = spec.robot == robot.name
    text = f"policy is for '{spec.robot}', robot file is '{robot.name}'"
    return Check("robot", "ok" if same else "error", text)


def _joints(recording: Recording, spec: PolicySpec, robot: Robot) -> list[Check]:
    facts = recording.streams[robot.topics.joint_states]
    checks = []
    if not facts.shapes:
        names = ", ".join(spec.joint_names)
        return [Check("joints", "error", f"no joint state could be used; the policy needs {names}")]
    seen = facts.shapes.most_common(1)[0][0]
    extra = [n for n in seen if n not in spec.joint_names]
    order = tuple(n for n in seen if n in spec.joint_names)
    text = f"all {len(spec.joint_names)} found by name"
    if order != spec.joint_names:
        text += "; the robot lists them in another order, which is handled"
    if extra:
        text += f"; not used: {', '.join(extra)}"
    checks.append(Check("joints", "ok", text))
    if len(facts.shapes) > 1:
        checks.append(
            Check("joint names change", "warning", f"{len(facts.shapes)} different lists of joints")
        )
    return checks


def _units(recording: Recording, spec: PolicySpec, robot: Robot) -> Check | None:
    if not len(recording.measured):
        return None
    low, high = robot.limit_array(spec.joint_names, "position").T
    margin = 0.1 * (high - low)
    outside = (recording.measured < low - margin) | (recording.measured > high + margin)
    share = float(outside.any(axis=1).mean())
    if share == 0:
        return Check("units", "ok", "measured joints are within the limits of the robot file")
    scaled = recording.measured / DEGREES
    degrees = ((scaled >= low - margin) & (scaled <= high + margin)).all(axis=1).mean() > 0.9
    worst = spec.joint_names[int(outside.mean(axis=0).argmax())]
    if share > 0.3 and degrees:
        return Check(
            "units", "error", f"joint positions look like degrees ({worst}); rad is expected"
        )
    text = f"{share:.1%} of the observations have a joint outside its limits (most often {worst})"
    return Check("units", "error" if share > 0.3 else "warning" if share > 0.01 else "note", text)


def _rates(recording: Recording, spec: PolicySpec, fields: dict) -> list[Check]:
    checks = []
    for topic in fields:
        facts = recording.streams[topic]
        if facts.periods.count == 0:
            checks.append(Check(f"rate of {topic}", "error", f"{facts.count} messages"))
            continue
        rate, wanted = facts.rate_hz(), 1 / spec.control_dt
        image = all(f.kind == "image" for f in fields[topic])
        least = 1 / (spec.execute_horizon * spec.control_dt) if image else wanted
        text = f"{rate:.1f} Hz; the policy acts at {wanted:.1f} Hz"
        if image:
            text = f"{rate:.1f} Hz; one observation is needed {least:.1f} times a second"
        gap = facts.periods.max
        if gap > GAP_S:
            text += f"; longest gap {gap:.2f} s at {facts.periods.max_at:.1f} s"
        slow = rate < least * 0.9
        checks.append(
            Check(f"rate of {topic}", "warning" if slow else "note" if gap > GAP_S else "ok", text)
        )
        if facts.backward:
            checks.append(
                Check(f"stamps of {topic}", "warning", f"went back {facts.backward} times")
            )
    return checks


def _images(recording: Recording, fields: dict) -> list[Check]:
    checks = []
    for topic, own in fields.items():
        for f in own:
            if f.kind != "image":
                continue
            shapes = recording.streams[topic].shapes
            listed = ", ".join(f"{s} ({c}x)" for s, c in shapes.most_common(4)) or "none"
            wanted = f"{f.resolution[0]}x{f.resolution[1]}"
            level, text = "ok", f"{listed}; the policy sees {wanted}"
            for shape in shapes:
                size, _, encoding = str(shape).partition(" ")
                if "x" not in size or not encoding:
                    continue
                height, width = (int(v) for v in size.split("x"))
                if abs(height / width - f.resolution[0] / f.resolution[1]) > 0.01:
                    level, text = "warning", f"{text}: another aspect ratio, pictures are distorted"
                elif encoding.startswith("mono"):
                    level, text = "warning", f"{text}: the robot sends grey pictures"
            if len(shapes) > 1:
                level, text = "warning", f"{text}; it changes on the way"
            checks.append(Check(f"images of {topic}", level, text))
    return checks


def _clock(recording: Recording) -> Check | None:
    """Observations are taken by their stamps, whenever they arrived; the live node also judges how late that was."""
    delays = {topic: s.delays for topic, s in recording.streams.items() if s.delays.count}
    if not delays:
        return None
    usual = {topic: d.percentile(0.5) for topic, d in delays.items()}
    if min(usual.values()) > MAX_DELAY_S:
        return Check(
            "clock", "note", "stamps are of another clock than the recorder's (simulation time)"
        )
    late = [f"{topic} ({s:.2f} s)" for topic, s in usual.items() if s > NODE_AGE_S]
    if late:
        text = f"received too late for the live node, which holds on input older than {NODE_AGE_S} s (max_input_age_s)"
        return Check("clock", "error", f"{', '.join(late)}: {text}")
    worst = max(d.percentile(0.95) for d in delays.values())
    level = "warning" if worst > 0.1 else "ok"
    return Check("clock", level, f"from stamp to reception at most {worst * 1e3:.1f} ms (p95)")


def _distribution(recording: Recording, spec: PolicySpec) -> Check | None:
    shares = out_of_distribution(recording.obs, spec.observations)
    if not shares:
        return Check("distribution", "note", "the policy carries no training statistics")
    name, share = max(shares.items(), key=lambda item: item[1])
    text = f"{share:.1%} of the observations of '{name}' are beyond {OUTLIER_STD:g} standard deviations of training"
    return Check("distribution", "warning" if share > MAX_SHARE_OUT else "ok", text)


def _truth(recording: Recording, spec: PolicySpec) -> Check:
    known = np.isfinite(recording.truth[:, : spec.execute_horizon]).all(axis=(1, 2))
    share = float(known.mean()) if len(known) else 0.0
    text = f"known for {share:.0%} of the inferences ({recording.truth_kind})"
    return Check("ground truth", "ok" if share > 0.5 else "warning", text)
