"""Numbers about chunks and motions: pure functions of arrays. Nan marks what is not known and is left out.

n inferences, H actions, E of them executed, A joints, control step `dt` in s. Units are those of the joints (rad, m).
"""

from collections.abc import Mapping, Sequence

import numpy as np

SPARC_CUTOFF_HZ = 10.0
SPARC_AMPLITUDE = 0.05
SPARC_PADDING = 4  # the spectrum is sampled 2**4 times finer than the motion is long
OUTLIER_STD = (
    4.0  # further from the training mean than this many standard deviations: out of distribution
)


def mean(values: np.ndarray) -> float | None:
    """Mean of what is known; None without any."""
    return float(np.nanmean(values)) if np.isfinite(values).any() else None


def rms(values: np.ndarray) -> float | None:
    """Root mean square of what is known."""
    return float(np.sqrt(np.nanmean(np.square(values)))) if np.isfinite(values).any() else None


def peak(values: np.ndarray) -> float | None:
    """Largest magnitude of what is known."""
    return float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else None


def percentiles(values: np.ndarray) -> dict[str, float | None]:
    """p50, p95, p99 and max."""
    values = np.asarray(values)[np.isfinite(values)]
    if not len(values):
        return dict.fromkeys(("p50", "p95", "p99", "max"))
    p50, p95, p99 = np.percentile(values, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99), "max": float(values.max())}


# --- accuracy ---


def errors_by_joint(names: Sequence[str], error: np.ndarray) -> dict[str, dict]:
    """Of (n, k, A): mean absolute, root mean square and largest error by joint."""
    return {
        name: {
            "mae": mean(np.abs(error[..., j])),
            "rmse": rms(error[..., j]),
            "max": peak(error[..., j]),
        }
        for j, name in enumerate(names)
    }


def baselines(measured: np.ndarray, before: np.ndarray, truth: np.ndarray) -> tuple:
    """Errors (n, k, A) of holding the measured position (n, A), and of repeating what was commanded before (n, A).

    Where nothing was commanded before, the last command is the measured position.
    """
    last = np.where(np.isfinite(before), before, measured)
    return measured[:, None] - truth, last[:, None] - truth


def best_of(samples: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Of (n, N, k, A) against (n, k, A): mean error of the best and of all samples, and their spread (std)."""
    error = np.abs(samples - truth[:, None])  # (n, N, k, A)
    known = np.isfinite(error).any(axis=(2, 3))
    by_sample = np.full(error.shape[:2], np.nan)
    if known.any():
        total, count = np.nansum(error, axis=(2, 3)), np.isfinite(error).sum(axis=(2, 3))
        by_sample[known] = total[known] / count[known]
    rows = np.isfinite(by_sample).all(axis=1)
    return {
        "samples": samples.shape[1],
        "best_mae": float(by_sample[rows].min(axis=1).mean()) if rows.any() else None,
        "mean_mae": float(by_sample[rows].mean()) if rows.any() else None,
        "spread": mean(samples.std(axis=1)),
    }


def gripper_agreement(
    predicted: np.ndarray, truth: np.ndarray, low: float, high: float, dt: float
) -> dict[str, float | int | None]:
    """Of two motions (T,) of one gripper joint: open (above the middle) at the same time, and switching when?

    `timing_s` is the mean time from each switch of the truth to the nearest same switch of the prediction.
    """
    known = np.isfinite(predicted) & np.isfinite(truth)
    if not known.any():
        return {"accuracy": None, "f1": None, "switches": 0, "timing_s": None, "missed_switches": 0}
    middle = (low + high) / 2
    ours, theirs = predicted > middle, truth > middle
    both = int((ours & theirs & known).sum())
    wrong = int((ours != theirs)[known].sum())
    pairs = known[1:] & known[:-1]

    def switches(signal: np.ndarray, direction: int) -> np.ndarray:
        return np.flatnonzero((np.diff(signal.astype(int)) == direction) & pairs)

    distances, count, missed = [], 0, 0
    for direction in (1, -1):
        own, wanted = switches(ours, direction), switches(theirs, direction)
        count += len(wanted)
        if len(own):
            distances += [float(np.abs(own - k).min() * dt) for k in wanted]
        else:
            missed += len(wanted)
    return {
        "accuracy": 1 - wrong / int(known.sum()),
        "f1": 2 * both / (2 * both + wrong) if both + wrong else None,
        "switches": count,
        "timing_s": float(np.mean(distances)) if distances else None,
        "missed_switches": missed,
    }


# --- motions: executed parts of chunks one after the other ---


def stitch(
    chunks: np.ndarray, times: np.ndarray, segment: np.ndarray, execute_horizon: int, dt: float
) -> list[np.ndarray]:
    """Motions (T, A) of uninterrupted inferences: the first E actions of each chunk (n, H, A)."""
    if not len(times):
        return []
    on_time = np.abs(np.diff(times) - execute_horizon * dt) < dt / 2
    breaks = np.flatnonzero(~(on_time & (np.diff(segment) == 0))) + 1
    executed = chunks[:, :execute_horizon]
    return [part.reshape(-1, chunks.shape[2]) for part in np.split(executed, breaks)]


def smoothness(motions: Sequence[np.ndarray], dt: float) -> dict[str, float | None]:
    """Velocity, acceleration and jerk (peak and RMS over all joints), path length, and spectral arc length.

    Path length is rad and m added up over all joints. Spectral arc length: Balasubramanian et al. 2015, eq. 5
    ("On the analysis of movement smoothness"), of the joint speed; nearer to zero is smoother.
    """
    result: dict[str, float | None] = {}
    whole = [m for m in map(_known, motions) if len(m) >= 5]
    for order, name in ((1, "velocity"), (2, "acceleration"), (3, "jerk")):
        change = [np.diff(m, order, axis=0) / dt**order for m in whole]
        joined = np.concatenate(change) if change else np.zeros((0, 1))
        result[f"{name}_rms"], result[f"{name}_peak"] = rms(joined), peak(joined)
    result["path_length"] = (
        float(sum(np.abs(np.diff(m, axis=0)).sum() for m in whole)) if whole else None
    )
    arcs = [a for m in whole if (a := spectral_arc_length(m, dt)) is not None]
    result["spectral_arc_length"] = float(np.mean(arcs)) if arcs else None
    return result


def _known(motion: np.ndarray) -> np.ndarray:
    """The longest piece of a motion without nan."""
    good = np.isfinite(motion).all(axis=1)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], good.astype(int), [0]])))
    if not len(edges):
        return motion[:0]
    pieces = edges.reshape(-1, 2)
    begin, end = pieces[np.argmax(pieces[:, 1] - pieces[:, 0])]
    return motion[begin:end]


def spectral_arc_length(motion: np.ndarray, dt: float) -> float | None:
    """Of the speed of a motion (T, A); None when it stands still."""
    speed = np.linalg.norm(np.diff(motion, axis=0), axis=1) / dt
    if len(speed) < 4 or speed.max() < 1e-9:
        return None
    length = 2 ** (int(np.ceil(np.log2(len(speed)))) + SPARC_PADDING)
    spectrum = np.abs(np.fft.rfft(speed, length))
    spectrum /= spectrum.max()
    frequency = np.fft.rfftfreq(length, dt)
    inside = frequency <= SPARC_CUTOFF_HZ
    frequency, spectrum = frequency[inside], spectrum[inside]
    above = np.flatnonzero(spectrum >= SPARC_AMPLITUDE)
    frequency, spectrum = frequency[above[0] : above[-1] + 1], spectrum[above[0] : above[-1] + 1]
    if len(frequency) < 2:
        return None
    steps = np.diff(frequency) / (frequency[-1] - frequency[0])
    return -float(np.hypot(steps, np.diff(spectrum)).sum())


def seams(
    chunks: np.ndarray, times: np.ndarray, segment: np.ndarray, execute_horizon: int, dt: float
) -> dict[str, float | None]:
    """Where one chunk takes over from the other: disagreement about that action, and the step in velocity.

    The position jump needs H > E.
    """
    if len(times) < 2:
        return {
            "position_mean": None,
            "position_max": None,
            "velocity_mean": None,
            "velocity_max": None,
        }
    on_time = np.abs(np.diff(times) - execute_horizon * dt) < dt / 2
    same = on_time & (np.diff(segment) == 0)
    old, new = chunks[:-1][same], chunks[1:][same]
    e = execute_horizon
    position = new[:, 0] - old[:, e] if chunks.shape[1] > e else np.full((1, 1), np.nan)
    if chunks.shape[1] > 1 and e > 1:
        into = (new[:, 0] - old[:, e - 1]) / dt
        velocity = np.maximum(
            np.abs(into - (old[:, e - 1] - old[:, e - 2]) / dt),
            np.abs((new[:, 1] - new[:, 0]) / dt - into),
        )
    else:
        velocity = np.full((1, 1), np.nan)
    return {
        "position_mean": mean(np.abs(position)),
        "position_max": peak(position),
        "velocity_mean": mean(velocity),
        "velocity_max": peak(velocity),
    }


def violations(
    chunks: np.ndarray, before: np.ndarray, limits: Mapping[str, np.ndarray], dt: float
) -> dict:
    """Share of actions of chunks (n, H, A) beyond position, velocity and acceleration limits, from (n, A) on.

    Args:
        limits: position (A, 2), velocity (A,), acceleration (A,).
    """
    if not len(chunks):
        return {"position": None, "velocity": None, "acceleration": None}
    start = np.where(np.isfinite(before), before, chunks[:, 0])
    path = np.concatenate([start[:, None], chunks], axis=1)
    low, high = limits["position"].T
    velocity = np.diff(path, axis=1) / dt
    acceleration = np.diff(velocity, axis=1) / dt

    def share(bad: np.ndarray) -> float:
        return float(bad.any(axis=-1).mean())

    slack = 1 + 1e-6
    return {
        "position": share((chunks < low - 1e-6) | (chunks > high + 1e-6)),
        "velocity": share(np.abs(velocity) > limits["velocity"] * slack),
        "acceleration": share(np.abs(acceleration) > limits["acceleration"] * slack),
    }


def motion_violations(
    motions: Sequence[np.ndarray], limits: Mapping[str, np.ndarray], dt: float
) -> dict:
    """The same of motions (T, A), for what was really commanded."""
    parts = [m for m in map(_known, motions) if len(m) > 3]
    if not parts:
        return {"position": None, "velocity": None, "acceleration": None}
    found = [(len(m) - 1, violations(m[None, 1:], m[:1], limits, dt)) for m in parts]
    total = sum(length for length, _ in found)
    return {
        what: sum(length * shares[what] for length, shares in found) / total
        for what in ("position", "velocity", "acceleration")
    }


def out_of_distribution(obs: Mapping[str, np.ndarray], fields: Sequence) -> dict[str, float]:
    """By field with training statistics: share of observations with an element beyond `OUTLIER_STD` deviations."""
    result = {}
    for f in fields:
        if f.name in obs and len(f.mean) and len(obs[f.name]):
            away = np.abs(obs[f.name] - np.array(f.mean)) / np.maximum(np.array(f.std), 1e-6)
            result[f.name] = float((away > OUTLIER_STD).any(axis=1).mean())
    return result


def compare(one: np.ndarray, other: np.ndarray, seed: int = 0, draws: int = 2000) -> dict:
    """Two policies on the same inferences: difference of mean errors (n,), other minus one, with a 95 % interval
    (bootstrap over inferences), and the share in which the other one is better.
    """
    known = np.isfinite(one) & np.isfinite(other)
    if not known.any():
        return {"inferences": 0, "difference": None, "ci95": None, "share_second_better": None}
    difference = (other - one)[known]
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(difference), size=(draws, min(len(difference), 5000)))
    low, high = np.percentile(difference[picks].mean(axis=1), [2.5, 97.5])
    return {
        "inferences": int(known.sum()),
        "difference": float(difference.mean()),
        "ci95": [float(low), float(high)],
        "share_second_better": float((difference < 0).mean()),
    }
