"""What a backend is: physics for N environments at once."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import mujoco
import numpy as np

StopFn = Callable[[np.ndarray], np.ndarray]


class Backend(Protocol):
    """Advances N states by the same number of physics steps. A pure function of (state, controls).

    Attributes:
        any_number: fewer states than in the last call are less work; else they are the work of making new buffers.
    """

    any_number: bool

    def step(
        self,
        state: np.ndarray,
        controls: np.ndarray,
        out: np.ndarray,
        stop: StopFn | None = None,
        models: Sequence[mujoco.MjModel] | None = None,
        steps_per_row: int | None = None,
    ) -> None:
        """Advance by R rows of `steps_per_row` physics steps each.

        Args:
            state: (N, state_size).
            controls: (N, T, A), held for equal shares of the time; T is a multiple of R.
            out: (N, R, state_size), filled with the state at the end of each row.
            stop: says of states (n, state_size) which environments need not go on, (n,) bool. A hint: where it is
                taken, later rows repeat the state in which an environment stopped.
            models: one per environment, of the same layout as the world's; None: the world's for all.
            steps_per_row: None: a control step's, so that R is the number of control steps.
        """

    def close(self) -> None:
        """End the threads, free the memory."""


def default_threads() -> int:
    """One for each core that this process may use."""
    return len(os.sched_getaffinity(0))
