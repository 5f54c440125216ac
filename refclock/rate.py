"""How fast the system clock runs on the counter, from samples of both.  Pure arithmetic.

Between two settings of its frequency word, the kernel advances the clock by a constant amount a tick.  Divided by what
that word says (:meth:`refclock.systemclock.Kernel.rate`), the amount is a constant of the boot: what chronyd does to
the clock meanwhile does not move it, and neither does a migration, since the guest's kernel knows nothing of either.
"""

from __future__ import annotations

#: Intervals that count: long against the noise of a pair, short against the changes of the frequency word.
SHORTEST_NS = 5_000_000
LONGEST_NS = 2_000_000_000

#: How many intervals the median is taken over, and how many make it worth something.
MOST = 63
FEWEST = 5


class SystemRate:
    """The clock's nanoseconds a tick without corrections: the median over the last good intervals."""

    def __init__(self) -> None:
        self._last: tuple[int, int, float] | None = None
        self._rates: list[float] = []

    def add(self, counter: int, system_ns: int, kernel_rate: float | None) -> None:
        """One pair, and the kernel's rate at that moment (None: it does not say)."""
        if kernel_rate is None:
            return
        last, self._last = self._last, (counter, system_ns, kernel_rate)
        if last is None or last[2] != kernel_rate or counter <= last[0]:
            return
        elapsed_ns = system_ns - last[1]
        if not SHORTEST_NS <= elapsed_ns <= LONGEST_NS:
            if 0 <= elapsed_ns < SHORTEST_NS:
                self._last = last
            return
        self._rates.append(elapsed_ns / (counter - last[0]) / kernel_rate)
        if len(self._rates) > MOST:
            del self._rates[0]

    def interrupt(self) -> None:
        """The clock or the counter has jumped: no interval may span this moment."""
        self._last = None

    @property
    def is_settled(self) -> bool:
        """Whether the median is over as many intervals as it ever will be."""
        return len(self._rates) == MOST

    def uncorrected_ns(self) -> float | None:
        """Nanoseconds a tick without corrections; None while too little is known."""
        if len(self._rates) < FEWEST:
            return None
        return sorted(self._rates)[len(self._rates) // 2]


def frequency_ppm(wanted_ns: float, actual_ns: float) -> float:
    """d(reference - system)/dt, when the reference advances ``wanted_ns`` a tick and the system ``actual_ns``."""
    return (wanted_ns / actual_ns - 1) * 1e6


def slope_ppm(points: list[tuple[int, int]]) -> tuple[float, float]:
    """The slope of offset over time, both in nanoseconds, by least squares, and its standard error; in ppm.

    At least three points, not all at one time.
    """
    points = [(t - points[0][0], offset - points[0][1]) for t, offset in points]
    mean_t = sum(t for t, _ in points) / len(points)
    mean_offset = sum(offset for _, offset in points) / len(points)
    spread = sum((t - mean_t) ** 2 for t, _ in points)
    slope = sum((t - mean_t) * (offset - mean_offset) for t, offset in points) / spread
    left = sum((offset - mean_offset - slope * (t - mean_t)) ** 2 for t, offset in points)
    return slope * 1e6, (left / (len(points) - 2) / spread) ** 0.5 * 1e6
