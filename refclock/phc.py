"""A PTP clock as the fallback for pages without time: /dev/ptp_kvm and its kin.

Such a clock says UTC or TAI, and does not say which (ptp_kvm: UTC; the driver of vmclock itself: UTC before Linux 7.0,
TAI from then on).  While the system clock is good the two are told apart by their distance from it.
"""

from __future__ import annotations

import os
import time

from .errors import PageInvalid, from_os

READINGS = 8
NSEC_PER_SEC = 1_000_000_000

#: TAI - UTC since 2017; by how much it may have grown, or shrunk, when you read this.
TAI_OFFSET_S = 37
TAI_TOLERANCE_S = 5
#: How far the system clock may be from UTC and the distance still tell which of the two it is.
PLAUSIBLE_NS = NSEC_PER_SEC // 10


class Phc:
    """An open PTP clock.  Raises a RefclockError when it cannot be opened or read."""

    def __init__(self, path: str) -> None:
        self.path = path
        #: What to add to its time to get UTC; None until it was compared with a good system clock.
        self.utc_offset_ns: int | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise from_os(
                error, f"cannot open the fallback {path}", "load its driver, or name another PTP clock"
            ) from None
        # FD_TO_CLOCKID of clock_getres(2).
        self._clock = (~self._fd << 3) | 3
        try:
            self.compare()
        except OSError as error:
            os.close(self._fd)
            raise PageInvalid(f"the fallback {path} is no PTP clock: {error.strerror}") from None

    def compare(self) -> tuple[int, int, int]:
        """Its time - the system clock, the system clock at that moment, half the bracket; nanoseconds.

        Raises OSError.
        """
        best: tuple[int, int, int] | None = None
        for _ in range(READINGS):
            before_ns = time.time_ns()
            phc_ns = time.clock_gettime_ns(self._clock)
            after_ns = time.time_ns()
            half_ns = (after_ns - before_ns + 1) // 2
            if best is None or half_ns < best[2]:
                best = (phc_ns - before_ns - half_ns, before_ns + half_ns, half_ns)
        assert best is not None
        return best

    def learn(self) -> str:
        """Finds out, from a system clock that is good, whether it says UTC or TAI; what, in words.  Raises OSError."""
        distance_ns, _, _ = self.compare()
        seconds = round(distance_ns / NSEC_PER_SEC)
        near = abs(distance_ns - seconds * NSEC_PER_SEC) < PLAUSIBLE_NS
        if near and (seconds == 0 or abs(seconds - TAI_OFFSET_S) <= TAI_TOLERANCE_S):
            self.utc_offset_ns = -seconds * NSEC_PER_SEC
            return f"TAI, {seconds} s ahead" if seconds else "UTC"
        return "neither UTC nor TAI"

    def offset(self) -> tuple[int, int, int] | None:
        """UTC - the system clock, the system clock at that moment, half the bracket; None while UTC is not known.

        Raises OSError.
        """
        if self.utc_offset_ns is None:
            return None
        distance_ns, system_ns, half_ns = self.compare()
        return distance_ns + self.utc_offset_ns, system_ns, half_ns

    def close(self) -> None:
        os.close(self._fd)
