"""The rules of `serving.safety` written down plainly, in numpy, joint vector by joint vector: what the fast code is
compared with. Slow, and without the tool's box."""

import math
from dataclasses import dataclass

import numpy as np

from flow_policy_rl.serving.safety import Motion, Rejected, SafetyFilter

TOLERANCE, AT_REST, SCALES = 1e-6, 1e-9, (0.75, 0.5, 0.25)  # as documented, not as coded


@dataclass
class Plain:
    """Some joints of a filter, limited together: (A,) each."""

    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    dt: float
    stop_steps: int

    def brake(self, velocity, before, h):
        speed, jerk_step = np.abs(velocity), self.jerk * min(h, self.dt)
        m = ramp_steps(speed, jerk_step * h)
        most = np.minimum(self.acceleration, np.where(m >= 1, jerk_step * m, speed / h))
        moving = speed > AT_REST
        share = min([1 / h, *(most[moving] / speed[moving])])
        wanted = np.clip(-share * velocity, before - jerk_step, before + jerk_step)
        return np.clip(wanted, -self.acceleration, self.acceleration)

    def stop(self, q, v, a, h):
        """Knots [(h, q, v)] after a motion until rest, in steps of h."""
        knots = []
        while (np.abs(v) > AT_REST).any() and len(knots) <= self.stop_steps:
            a = self.brake(v, a, h)
            ahead = v + a * h
            ahead[np.abs(ahead) < AT_REST] = 0.0
            q, v = q + (v + ahead) / 2 * h, ahead
            knots.append((h, q, v))
        return knots

    def can_stop(self, q, v, a, h, low, high, speed):
        """Every knot and every turning point on the way to rest."""
        ahead = v + a * h
        knots = [(0.0, q, v), (h, q + (v + ahead) / 2 * h, ahead)]
        if not within_box(*knots[1][1:], low, high, speed):
            return False
        knots += self.stop(knots[1][1], ahead, a, max(h, self.dt))
        times, positions, velocities = (np.array(part) for part in zip(*knots, strict=True))
        p0, v0, p1, v1 = positions[:-1], velocities[:-1], positions[1:], velocities[1:]
        turning, h = v0 * v1 < 0, times[1:, None]
        turn = np.where(turning, p0 - v0**2 * h / (2 * np.where(turning, v1 - v0, 1)), p1)
        furthest = np.minimum(p1, turn), np.maximum(p1, turn)
        at_rest = np.abs(v1[-1]).max() <= AT_REST
        return at_rest and all(within_box(p, v1, low, high, speed) for p in furthest)

    def govern(self, start, steps, targets, low, high, speeds):
        q, v, before = start.position, start.velocity, start.acceleration
        knots = []
        for k, (h, target) in enumerate(zip(steps, targets, strict=True)):
            last, speed = k + 1 == len(targets), speeds[k]
            slope = np.zeros_like(q) if last else (targets[k + 1] - target) / steps[k + 1]
            error = target - q - (v + slope) / 2 * h
            most = self.acceleration * h * ramp_steps(np.abs(error), self.acceleration * h**2)
            off = np.abs(error) > AT_REST
            share = min([1 / h, *(most[off] / np.abs(error[off]))]) if off.any() else 0.0
            change = together(slope + share * error, speed) - v
            change = together(change, self.acceleration * h)
            jerk_step = self.jerk * min(h, self.dt)
            a = np.clip(change / h, before - jerk_step, before + jerk_step)
            if not self.can_stop(q, v, a, h, low, high, speed):
                braking = self.brake(v, before, h)
                mixed = [braking + s * (a - braking) for s in SCALES]
                fine = (m for m in mixed if self.can_stop(q, v, m, h, low, high, speed))
                a = next(fine, braking)
            ahead = v + a * h
            q, v, before = q + (v + ahead) / 2 * h, ahead, a
            knots.append((h, q, v))
        return knots + self.stop(q, v, before, self.dt)

    def follow(self, start, steps, targets):
        points = np.vstack([start.position, targets])
        slopes = np.diff(points, axis=0) / steps[:, None]
        velocities = [start.velocity]
        for k in range(len(targets) - 1):  # of the parabola through three points
            h0, h1 = steps[k], steps[k + 1]
            velocities.append((h1 * slopes[k] + h0 * slopes[k + 1]) / (h0 + h1))
        velocities.append(slopes[-1])
        arrival = (2 * velocities[-2] + 4 * velocities[-1] - 6 * slopes[-1]) / steps[-1]
        return [
            *zip(steps, targets, velocities[1:], strict=True),
            *self.stop(targets[-1], velocities[-1], arrival, self.dt),
        ]

    def within(self, start, knots, low, high, speed):
        """Every limit over every segment, from the derivative's roots."""
        if not knots or np.abs(knots[-1][2]).max() > AT_REST:
            return False
        before, p0, v0 = start.acceleration, start.position, start.velocity
        jerk_step = self.jerk * self.dt * (1 + TOLERANCE) + 1e-6
        acceleration = self.acceleration * (1 + TOLERANCE) + 1e-6
        too_fast = speed * (1 + TOLERANCE) + 1e-9
        for h, p1, v1 in knots:
            slope = (p1 - p0) / h
            first, last = (6 * slope - 4 * v0 - 2 * v1) / h, (2 * v0 + 4 * v1 - 6 * slope) / h
            if (np.abs(first - before) > jerk_step).any():
                return False
            if (np.abs(last - first) > jerk_step).any():
                return False
            if (np.maximum(np.abs(first), np.abs(last)) > acceleration).any():
                return False
            for j in range(len(p0)):
                path, rate, fastest = between(h, p0[j], v0[j], first[j], last[j])
                if min(path) < low[j] - 1e-6 or max(path) > high[j] + 1e-6:
                    return False
                if max(map(abs, (rate, v0[j], v1[j], fastest))) > too_fast[j]:
                    return False
            before, p0, v0 = last, p1, v1
        return bool((np.abs(before) <= jerk_step).all())


def plain_check(
    safety: SafetyFilter, start: Motion, due: np.ndarray, targets: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times (n,), positions and velocities (n, A) of the plan that `safety.check` should make, with a share (n,) of the
    velocity limits at each target."""
    low, high = np.minimum(safety.low, start.position), np.maximum(safety.high, start.position)
    speed, steps = safety.limits["velocity"], np.diff(due, prepend=0.0)
    wanted = np.clip(targets, safety.low, safety.high)
    parts = []
    for group in safety._groups:
        joints, c = plain(safety, group), group.columns
        part, limits = group.part(start), (low[c], high[c], speed[c])
        knots = joints.follow(part, steps, wanted[:, c])
        speeds = share[:, None] * speed[c]
        too_fast = share[:, None] * (speed[c] * (1 + TOLERANCE) + 1e-9)
        at_targets = np.abs([v for _, _, v in knots[: len(due)]])
        if (at_targets > too_fast).any() or not joints.within(part, knots, *limits):
            knots = joints.govern(part, steps, wanted[:, c], *limits[:2], speeds)
            if not joints.within(part, knots, *limits):
                raise Rejected("no plan within the limits")
        parts.append((c, part, knots))
    return side_by_side(parts)


def plain(safety: SafetyFilter, group) -> Plain:
    limits = [safety.limits[w][group.columns] for w in ("velocity", "acceleration", "jerk")]
    return Plain(*limits, safety.control_dt, group.stop_steps)


def side_by_side(parts):
    """The parts of a plan in one; a shorter one stays where it ends."""
    longest = max((knots for _, _, knots in parts), key=len)
    width = sum(len(columns) for columns, _, _ in parts)
    positions, velocities = np.zeros((2, len(longest) + 1, width))
    for columns, start, knots in parts:
        rows = [(0.0, start.position, start.velocity), *knots]
        rows += [(0.0, rows[-1][1], 0 * start.velocity)] * (len(positions) - len(rows))
        positions[:, columns] = [q for _, q, _ in rows]
        velocities[:, columns] = [v for _, _, v in rows]
    return np.cumsum([0.0, *(h for h, _, _ in longest)]), positions, velocities


def between(h: float, p: float, v: float, first: float, last: float):
    """Positions at the ends of a cubic segment and where it turns, velocity at its end and its extreme between, from
    its start and its accelerations."""
    jerk = (last - first) / h
    position = lambda t: p + t * (v + t * (first / 2 + t * jerk / 6))  # noqa: E731
    velocity = lambda t: v + t * (first + t * jerk / 2)  # noqa: E731
    turns = [-v / first] if first else []
    if jerk and (root := first**2 - 2 * v * jerk) >= 0:
        turns += [(-first + s * math.sqrt(root)) / jerk for s in (1, -1)]
    flat = -first / jerk if jerk else 0.0
    path = [position(t) for t in (0.0, h, *(t for t in turns if 0 < t < h))]
    return path, velocity(h), velocity(flat if 0 < flat < h else 0.0)


def within_box(q, v, low, high, speed):
    """Positions and velocities (..., A) within the bounds, rounding aside."""
    inside = (q >= low - AT_REST) & (q <= high + AT_REST)
    return bool((inside & (np.abs(v) <= speed * (1 + TOLERANCE / 2))).all())


def together(values, most):
    """Scaled down as one."""
    return values / max(1.0, (np.abs(values) / most).max())


def ramp_steps(distance, unit):
    """m with unit * m (m + 1) / 2 = distance, linear between whole m."""
    e = 2 * distance / unit
    whole = np.floor((np.sqrt(1 + 4 * e) - 1) / 2)
    return whole + (e - whole * (whole + 1)) / (2 * whole + 2)
