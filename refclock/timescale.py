"""UTC from a page's own time: the TAI offset, and leap seconds before, during and after.

A page's ``tai_offset_sec`` and ``leap_indicator`` hold at its reference time, not now.  What they say of any
other moment is worked out here, once for every update of the page, so that a sample costs one comparison.

UTC means POSIX time.  A positive leap second (23:59:60) has no POSIX time of its own, and consumers disagree
about the seconds next to it, so nothing is fed from two seconds before a leap to two seconds after.

Sources: the VMClock specification (UAPI.13) on ``tai_offset_sec`` and ``leap_indicator``; vmclock-abi.h.
"""

from __future__ import annotations

from .model import (
    COUNTER_NONE,
    LEAP_NONE,
    LEAP_POS,
    LEAP_POST_NEG,
    LEAP_POST_POS,
    LEAP_PRE_NEG,
    LEAP_PRE_POS,
    TAI_OFFSET_VALID,
    TIME_TAI,
    TIME_UTC,
    Snapshot,
    leap_name,
    time_type_name,
)

MARGIN_SEC = 2
NSEC_PER_SEC = 1_000_000_000
SEC_PER_DAY = 86400


class Timescale:
    """How to get from a page's time to UTC, valid for one update of the page.

    UTC is the page's time + ``before_sec`` up to the leap, + ``after_sec`` from it on.  Page times from
    ``withheld_from_sec`` up to, not including, ``withheld_until_sec`` give no sample; both are None without
    a leap.  ``leap`` (0, 1 insert, 2 delete) is what to announce before the leap.
    """

    __slots__ = ("after_sec", "before_sec", "leap", "withheld_from_sec", "withheld_until_sec")

    def __init__(
        self,
        before_sec: int,
        after_sec: int | None = None,
        leap_from_sec: int | None = None,
        leap_until_sec: int | None = None,
        leap: int = 0,
    ) -> None:
        self.before_sec = before_sec
        self.after_sec = before_sec if after_sec is None else after_sec
        self.leap = leap
        self.withheld_from_sec = None if leap_from_sec is None else leap_from_sec - MARGIN_SEC
        self.withheld_until_sec = None if leap_until_sec is None else leap_until_sec + MARGIN_SEC

    def at(self, time_ns: int) -> tuple[int, int] | None:
        """What to add to the page's ``time_ns`` to get UTC, in nanoseconds, and the leap to announce then.

        None where the moment is too near to a leap.
        """
        if self.withheld_from_sec is None or self.withheld_until_sec is None:
            return self.before_sec * NSEC_PER_SEC, self.leap
        if time_ns < self.withheld_from_sec * NSEC_PER_SEC:
            return self.before_sec * NSEC_PER_SEC, self.leap
        if time_ns >= self.withheld_until_sec * NSEC_PER_SEC:
            return self.after_sec * NSEC_PER_SEC, 0
        return None


def why_no_time(page: Snapshot, counter_id: int) -> str | None:
    """Why ``page`` cannot give UTC on a machine whose counter is ``counter_id``; None when it can."""
    if page.counter_id == COUNTER_NONE:
        return "the page has no counter"
    if page.counter_id != counter_id:
        return f"the page is for counter {page.counter_id}, this machine has counter {counter_id}"
    if page.time_frac_sec is None:
        return f"the page's {page.size} bytes do not reach its time"
    if page.time_type not in (TIME_UTC, TIME_TAI):
        return f"the page's time is {time_type_name(page.time_type)}, neither UTC nor TAI"
    if page.time_type == TIME_TAI and not page.has(TAI_OFFSET_VALID):
        return "the page's time is TAI and it does not say the offset to UTC"
    return None


def timescale(page: Snapshot) -> Timescale | None:
    """The timescale of a page that can give UTC (:func:`why_no_time`).

    None for a leap indicator that the ABI does not know, or one that says 23:59:60 at any other time.

    ``tai_offset_sec`` is UTC - TAI, so -37; some producers store +37.  TAI - UTC stays positive for
    centuries, so its magnitude decides.
    """
    assert page.time_sec is not None and page.leap_indicator is not None and page.tai_offset_sec is not None
    tai_sec = -abs(page.tai_offset_sec) if page.time_type == TIME_TAI else 0
    leap = page.leap_indicator
    month_start_sec, month_end_sec = _month_around(page.time_sec + tai_sec)

    if leap == LEAP_NONE:
        return Timescale(tai_sec)
    if leap == LEAP_PRE_POS:
        end = month_end_sec - tai_sec
        return Timescale(tai_sec, tai_sec - 1, end, end + 1, leap=1)
    if leap == LEAP_PRE_NEG:
        end = month_end_sec - tai_sec - 1
        return Timescale(tai_sec, tai_sec + 1, end, end, leap=2)
    if leap == LEAP_POS:
        # The page may count 23:59:60 with the offset from before it (then it reads as the first second
        # of the next month) or with the one from after it (a repeated 23:59:59).
        if page.time_sec + tai_sec == month_start_sec:
            start = month_start_sec - tai_sec
            return Timescale(tai_sec, tai_sec - 1, start, start + 1)
        if page.time_sec + tai_sec == month_end_sec - 1:
            start = month_end_sec - 1 - tai_sec
            return Timescale(tai_sec + 1, tai_sec, start, start + 1)
        return None
    if leap == LEAP_POST_POS:
        start = month_start_sec - tai_sec
        return Timescale(tai_sec + 1, tai_sec, start - 1, start)
    if leap == LEAP_POST_NEG:
        start = month_start_sec - tai_sec
        return Timescale(tai_sec - 1, tai_sec, start, start)
    return None


def why_no_timescale(page: Snapshot) -> str:
    """What to say of a page for which :func:`timescale` is None."""
    leap = leap_name(page.leap_indicator or 0)
    return f"the page's leap indicator is {leap} at {page.time_sec} s: its UTC cannot be told"


def odd_tai_sign(page: Snapshot) -> bool:
    """Whether the page stores TAI - UTC (+37) where the ABI wants UTC - TAI: taken as meant, worth saying."""
    return page.time_type == TIME_TAI and page.has(TAI_OFFSET_VALID) and (page.tai_offset_sec or 0) > 0


def _month_around(posix_sec: int) -> tuple[int, int]:
    """The first second of the month that holds ``posix_sec``, and of the next.  Any year, without limit."""
    day = posix_sec // SEC_PER_DAY
    year, month = _year_and_month(day)
    following = (year + 1, 1) if month == 12 else (year, month + 1)
    return _first_day(year, month) * SEC_PER_DAY, _first_day(*following) * SEC_PER_DAY


def _first_day(year: int, month: int) -> int:
    """Days from 1970-01-01 to the first of a month of the proleptic Gregorian calendar.

    Years are counted from March so that the leap day is a year's last: then a month's first day is a
    linear function of its number, rounded.
    """
    year -= month <= 2
    era_day = year * 365 + year // 4 - year // 100 + year // 400
    return era_day + (153 * ((month + 9) % 12) + 2) // 5 - 719468


def _year_and_month(day: int) -> tuple[int, int]:
    """The month that holds ``day``: an estimate that is at most a month too early, then put right."""
    months = (day * 4800) // 146097  # 400 Gregorian years are 4800 months and 146097 days
    year, month = 1970 + months // 12, months % 12 + 1
    while True:
        following = (year + 1, 1) if month == 12 else (year, month + 1)
        if _first_day(*following) <= day:
            year, month = following
        elif _first_day(year, month) > day:
            year, month = (year - 1, 12) if month == 1 else (year, month - 1)
        else:
            return year, month
