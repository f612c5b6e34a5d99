"""How long a run will still take, from the work that it has done."""

import time
from collections.abc import Callable
from dataclasses import dataclass

MINUTE = 60
HOUR = 60 * MINUTE
DAY = 24 * HOUR
SHORTEST = 1  # second; less is not told


@dataclass
class Work:
    """One kind of work of a run, counted in units of similar duration."""

    left: float  # units that are still to be done
    weight: float = 1.0  # duration of a unit relative to other kinds, used until a unit has been timed
    done: float = 0.0  # units that have been timed
    seconds: float = 0.0  # the time that they took


class Clock:
    """Counts the work of a run and estimates how long the rest will take.

    `add` counts units with the time that has passed since the last call of `start` or `add`. What
    runs in between without being counted, such as the writing of files, is not in the estimate.
    `when_known` is called once with the estimate for the whole run, in seconds, after a minute of
    counted work. It is not called if less than another minute is left.
    """

    def __init__(self, when_known: Callable[[float], None] | None = None, **work: Work) -> None:
        self.work = work
        self.when_known = when_known
        self.last = time.perf_counter()

    def start(self) -> None:
        """Begin to time the next units."""
        self.last = time.perf_counter()

    def add(self, kind: str, units: float) -> None:
        """Count units of one kind, which have taken the time since the last call."""
        now = time.perf_counter()
        work = self.work[kind]
        work.done += units
        work.seconds += now - self.last
        work.left = max(work.left - units, 0)
        self.last = now
        if self.when_known and self.seconds_timed() >= MINUTE:
            if self.seconds_left() >= MINUTE:
                self.when_known(self.seconds_timed() + self.seconds_left())
            self.when_known = None

    def skip(self, kind: str, units: float) -> None:
        """Take units out of what is left, without timing: they were not needed, or done before."""
        self.work[kind].left = max(self.work[kind].left - units, 0)

    def seconds_left(self) -> float | None:
        """Return the estimate in seconds, None before anything has been timed.

        A kind that has not been timed takes its weight times the mean of the timed kinds.
        """
        weighted = sum(work.weight * work.done for work in self.work.values())
        if not weighted:
            return None
        unit = sum(work.seconds for work in self.work.values()) / weighted
        return sum(
            work.left * (work.seconds / work.done if work.done else work.weight * unit) for work in self.work.values()
        )

    def seconds_timed(self) -> float:
        """Return the time that all counted units have taken."""
        return sum(work.seconds for work in self.work.values())

    def text(self) -> str:
        """Return the estimate for a log line or a bar, such as "about 3 h left".

        It is "" without an estimate, and if less than a second is left.
        """
        left = self.seconds_left()
        return f"about {duration(left)} left" if left and left >= SHORTEST else ""


class EveryMinute:
    """Says when a minute has passed since the last time that it said so."""

    def __init__(self) -> None:
        self.last = time.perf_counter()

    def due(self) -> bool:
        """Return whether a minute has passed, and if so, begin the next one."""
        if time.perf_counter() - self.last < MINUTE:
            return False
        self.last = time.perf_counter()
        return True


def duration(seconds: float) -> str:
    """Return a duration in words, to two digits or so: "40 s", "25 min", "3.4 h", "9 days"."""
    for unit, name in ((DAY, "days"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= 2 * unit:
            value = seconds / unit
            return f"{value:.1f} {name}" if value < 9.5 else f"{value:.0f} {name}"
    return f"{seconds:.0f} s"
