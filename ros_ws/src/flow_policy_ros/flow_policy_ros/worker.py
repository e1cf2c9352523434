"""A thread that does the newest piece of work, and never an older one."""

import threading
from collections.abc import Callable


class Worker:
    """Calls `work` with the newest order; one that waits when a newer comes is forgotten.

    Args:
        work: must not raise.
    """

    def __init__(self, work: Callable[[object], None]):
        self._work = work
        self._order: object | None = None
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def give(self, order: object) -> None:
        """An order, in place of one that still waits."""
        with self._wake:
            self._order = order
            self._wake.notify()

    def _run(self) -> None:
        while True:
            with self._wake:
                while self._order is None and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                order, self._order = self._order, None
            self._work(order)

    def close(self, timeout: float) -> None:
        """Forget what waits, and end after what is under way."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout)
