"""Imitation of the shortest demonstrations: a module with `Config` and `main`, as every command is."""

import dataclasses

from flow_policy_rl import train
from flow_policy_rl.data import demonstrations


@dataclasses.dataclass(frozen=True)
class Config(train.TrainBC):
    """Imitation of the shortest demonstrations.

    Example: flow-policy train bc_shortest --task point --demos demos.hdf5 --keep 0.5

    Attributes:
        keep: share of the demonstrations that is used.
    """

    keep: float = 0.5


def main(config: Config) -> dict:
    demos = demonstrations.load(config.demos)
    episodes = sorted(demos.episodes, key=lambda e: len(e.actions))
    few = episodes[: max(2, round(config.keep * len(episodes)))]
    kept = config.run_dir / "kept.hdf5"
    demonstrations.save(kept, dataclasses.replace(demos, episodes=few))
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(train.TrainBC)}
    return train.main(train.TrainBC(**settings | {"demos": kept}))
