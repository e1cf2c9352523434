"""Replay of chunk transitions, kept as segments: T consecutive chunks of one environment.

Segments rather than single transitions, because TD(lambda) walks along them. What a chunk is worth is written where it
is collected (`rollout.py`): rewards discounted inside the chunk, `gamma ** executed steps` across it.
"""

import torch
from torch import Tensor

from flow_policy_rl.nesting import flat, nested
from flow_policy_rl.rollout import Rollout

Segments = dict  # name -> Tensor, or dict of them


class ChunkReplay:
    """A ring of segments, allocated once. Fields come in and go out as (T, S, ...), S segments side by side.

    Args:
        capacity: in segments.
        device: where they lie and come in from.
    """

    def __init__(self, capacity: int, device: torch.device | None = None):
        self.capacity, self.device = capacity, device
        self.size = 0
        self.num_fresh = 0  # segments of the latest `add`
        self._next = 0
        self._data: Segments = {}

    def add(self, segments: Segments) -> None:
        """Append; the oldest segments give way.

        Raises:
            ValueError: more segments at once than there is room for.
        """
        rows = {name: value.transpose(0, 1) for name, value in flat(segments).items()}
        count = len(next(iter(rows.values())))
        if count > self.capacity:
            raise ValueError(f"{count} segments do not fit into a replay of {self.capacity}")
        if not self._data:
            self._data = {
                name: value.new_empty(self.capacity, *value.shape[1:])
                for name, value in rows.items()
            }
        where = (self._next + torch.arange(count, device=self.device)) % self.capacity
        for name, value in rows.items():
            self._data[name][where] = value
        self._next = (self._next + count) % self.capacity
        self.size = min(self.size + count, self.capacity)
        self.num_fresh = count

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        fresh_share: float = 0.0,
        balanced: bool = False,
    ) -> Segments:
        """Draw `count` segments, (T, count, ...).

        Args:
            fresh_share: at least this share comes from the latest `add` (its own share of the replay, if larger).
            balanced: older segments are drawn equally often from each value of their (rounded) reward sum, so that
                a sparse task's few successes are half of what the critic sees.
        """
        fresh, old = self.ages()
        num_fresh = round(count * max(fresh_share, len(fresh) / self.size)) if len(old) else count
        strata = [old]
        if balanced and len(old):
            level = self.segment_rewards()[old].round()
            strata = [old[level == value] for value in level.unique()]
        rows = [draw(fresh, num_fresh, generator)]
        # The remainder of the division goes to random strata, so that none is preferred.
        every, rest = divmod(count - num_fresh, len(strata))
        preferred = draw(torch.arange(len(strata), device=generator.device), rest, generator)
        for i, stratum in enumerate(strata):
            rows.append(draw(stratum, every + int(i in preferred), generator))
        return self.get(torch.cat(rows))

    def get(self, rows: Tensor) -> Segments:
        """Segments by their place in the ring."""
        return nested({name: value[rows].transpose(0, 1) for name, value in self._data.items()})

    def ages(self) -> tuple[Tensor, Tensor]:
        """Places of the segments of the latest `add`, and of all others."""
        age = torch.arange(self.size, device=self.device)
        order = (self._next - 1 - age) % self.capacity  # newest first
        return order[: self.num_fresh], order[self.num_fresh :]

    def segment_rewards(self) -> Tensor:
        """Undiscounted rewards of each place of the ring, summed over the segment, (capacity,)."""
        return (self._data["return_after"] - self._data["return_before"]).sum(1)

    def state_dict(self) -> dict:
        """Everything, for an exact resume."""
        data = {name: value[: self.size].clone() for name, value in self._data.items()}
        return {"data": data, "next": self._next, "num_fresh": self.num_fresh}

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`; the capacity must be the same."""
        self._data, self.size = {}, 0
        for name, value in state["data"].items():
            value = value.to(self.device)
            self._data[name] = value.new_empty(self.capacity, *value.shape[1:])
            self._data[name][: len(value)] = value
            self.size = len(value)
        self._next, self.num_fresh = int(state["next"]), int(state["num_fresh"])


def draw(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the rows without repetition as long as they last, with it beyond."""
    device = generator.device
    if count > len(rows):
        return rows[torch.randint(len(rows), (count,), generator=generator, device=device)]
    return rows[torch.randperm(len(rows), generator=generator, device=device)[:count]]


def rollout_segments(rollout: Rollout) -> Segments:
    """What a critic of the action needs of a rollout, (T, N, ...). The trace must hold the executed `action`."""
    names = ("obs", "final_obs", "reward", "discount", "return_before", "return_after")
    segments = {name: getattr(rollout, name) for name in (*names, "terminated", "truncated")}
    return segments | {"action": rollout.trace["action"]}
