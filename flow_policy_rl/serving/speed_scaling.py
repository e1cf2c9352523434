"""How fast the robot executes what it is told: a speed slider below 100 % slows the controller's time down."""

FULL_PERCENT = 99.0  # from here on it is full speed
SILENT_S = 1.0  # the drivers that say it do so a hundred times per second


class SpeedScaling:
    """What was said of it, and why nothing may be commanded now.

    A controller in slowed time is behind every plan, so that what is sent then begins with a jump. What it was told
    before, it executes to the end: after all of it at full speed, the arm is at rest for certain.

    Args:
        topic: where it is said; for the texts.
    """

    def __init__(self, topic: str):
        self.topic = topic
        self._percent: float | None = None
        self._heard = 0.0  # steady time, s
        self._length = 0  # of what was sent last, ns
        self._full_since = self._wait = 0  # ns

    def told(self, seconds: float) -> None:
        """A trajectory of this length went out."""
        self._length = round(seconds * 1e9)

    def hear(self, percent: float, now: int, steady: float) -> bool:
        """A message: percent of full speed, at a time (ns) of the controller's clock and a steady one (s).

        Returns:
            Whether it slows the robot down that was at full speed, as far as is known, until now.
        """
        was_full, silent = self._is_full, steady - self._heard > SILENT_S
        self._percent, self._heard = percent, steady
        if self._is_full and (silent or not was_full):
            self._full_since, self._wait = now, self._length
        return was_full and not self._is_full

    @property
    def _is_full(self) -> bool:
        return self._percent is not None and self._percent >= FULL_PERCENT

    def problem(self, now: int, steady: float) -> str:
        """Why nothing may be commanded at these times, see `hear`; empty when it may."""
        if self._percent is None or steady - self._heard > SILENT_S:
            return (
                f"nobody says on {self.topic} how fast the robot executes: is the driver's broadcaster active? "
                "(a robot without one: leave topics.speed_scaling out of the robot file)"
            )
        if not self._is_full:
            return f"the robot is at {self._percent:.0f} % of its speed ({self.topic}): policies run at 100 %"
        if 0 <= now - self._full_since < self._wait:
            return "back at full speed: the arm finishes what it was told before"
        return ""
