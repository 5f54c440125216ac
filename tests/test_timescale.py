"""UTC from a page's time: against instants written by hand and against a calendar that is not ours (datetime)."""

from __future__ import annotations

from calendar import timegm
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refclock import model
from refclock.model import Snapshot, encode
from refclock.timescale import odd_tai_sign, timescale, why_no_time, why_no_timescale

S = 10**9
TAI, UTC_TYPE = model.TIME_TAI, model.TIME_UTC
NONE, PRE_POS, PRE_NEG, POS, POST_POS, POST_NEG = range(6)


def page(**fields: int) -> Snapshot:
    sound = {
        "magic": model.MAGIC,
        "size": 112,
        "version": 1,
        "counter_id": 1,
        "time_type": TAI,
        "flags": model.TAI_OFFSET_VALID,
        "clock_status": 2,
        "tai_offset_sec": -37,
    }
    return Snapshot(encode(sound | fields))


def posix(text: str) -> int:
    """`2016-12-31 23:59:59` as POSIX time."""
    return timegm(datetime.strptime(text, "%Y-%m-%d %H:%M:%S").timetuple())


def utc_at(snapshot: Snapshot, page_ns: int) -> tuple[int, int] | None:
    """(UTC in ns, leap) that the page's time `page_ns` comes to."""
    scale = timescale(snapshot)
    assert scale is not None
    told = scale.at(page_ns)
    return None if told is None else (page_ns + told[0], told[1])


# ---- A line of true seconds, made by hand -------------------------------------------------------------------


def seconds_around(month_start: str, leap: int) -> list[tuple[int, int | None]]:
    """True seconds, 30 before to 30 after the end of a month: (TAI - 37 at the month's last minute, POSIX second).

    `leap` is +1, 0 or -1; the POSIX second is None during 23:59:60. The first number goes on through the leap.
    """
    start = posix(month_start)
    true = range(start - 30, start + 30)
    if leap == 0:
        return [(second, second) for second in true]
    if leap > 0:  # ... 23:59:59, 23:59:60, 00:00:00: one more true second than POSIX has
        return [(second, second if second < start else None if second == start else second - 1) for second in true]
    return [(second, second if second < start - 1 else second + 1) for second in true]  # 23:59:58, 00:00:00


MONTHS = tuple(f"{day} 00:00:00" for day in ("2017-01-01", "2025-07-01", "2024-03-01", "2100-03-01", "2028-03-01"))


def cases() -> Iterator[tuple[str, int, int, int]]:
    for month in MONTHS:
        for time_type in (TAI, UTC_TYPE):
            for leap, indicators in ((1, (PRE_POS, POS, POST_POS)), (-1, (PRE_NEG, POST_NEG))):
                for indicator in indicators:
                    yield month, time_type, leap, indicator


@pytest.mark.parametrize(("month", "time_type", "leap", "indicator"), list(cases()))
def test_every_second_round_a_leap(month: str, time_type: int, leap: int, indicator: int) -> None:
    """From any reference time at which the indicator may stand, every true second comes out right or not at all."""
    seconds = seconds_around(month, leap)
    start = posix(month)
    # TAI goes on through a leap. A page of UTC counts POSIX seconds at its reference, and goes on from there; during
    # 23:59:60 it may say 23:59:59 again, or the first second of the next month already.
    for reference, (reference_true, reference_posix) in enumerate(seconds):
        is_leap_second = leap > 0 and reference_true == start
        past = reference_true > start if leap > 0 else reference_true >= start - 1
        if (indicator == POS) != is_leap_second or (indicator in (POST_POS, POST_NEG)) != past:
            continue
        offset_sec = -37 - (leap if past else 0)
        counts = [reference_true + 37]
        if time_type == UTC_TYPE:
            counts = [start, start - 1] if reference_posix is None else [reference_posix]
        for count in counts:
            snapshot = page(time_type=time_type, leap_indicator=indicator, tai_offset_sec=offset_sec, time_sec=count)
            for number, (true, expected) in enumerate(seconds):
                leap_begins, leap_ends = (start, start + 1) if leap > 0 else (start - 1, start - 1)
                for fraction in (0, 1, S // 2, S - 1):
                    told = utc_at(snapshot, (count + true - reference_true) * S + fraction)
                    if leap_begins - 2 <= true < leap_ends + 2:
                        assert told is None, (reference, number)
                        continue
                    assert expected is not None
                    announced = {PRE_POS: 1, PRE_NEG: 2}.get(indicator, 0) if true < leap_begins else 0
                    assert told == (expected * S + fraction, announced), (reference, number)


@pytest.mark.parametrize("month", MONTHS)
@pytest.mark.parametrize("time_type", [TAI, UTC_TYPE])
def test_no_leap_leaves_every_second_alone(month: str, time_type: int) -> None:
    ahead = 37 if time_type == TAI else 0
    snapshot = page(time_type=time_type, time_sec=posix(month) - 20 + ahead)
    for true, expected in seconds_around(month, 0):
        assert expected is not None
        assert utc_at(snapshot, (true + ahead) * S + 5) == (expected * S + 5, 0)


# ---- Instants written by hand -------------------------------------------------------------------------------

# The leap second of 2016: TAI - UTC went from 36 to 37. From the IERS's Bulletin C 52:
#   2016 December 31, 23h 59m 59s · 2016 December 31, 23h 59m 60s · 2017 January 1, 0h 0m 0s
# 2017-01-01 00:00:00 UTC is POSIX 1483228800, and TAI 1483228837 counted in the same way.
LEAP_2016 = [
    # leap indicator, offset, reference TAI, asked TAI, UTC or None, announced
    (PRE_POS, -36, 1483228800, 1483228800, 1483228764, 1),  # 23:59:24
    (PRE_POS, -36, 1483228800, 1483228833, 1483228797, 1),  # 23:59:57
    (PRE_POS, -36, 1483228800, 1483228834, None, 0),  # 23:59:58: two seconds before 23:59:60
    (PRE_POS, -36, 1483228800, 1483228836, None, 0),  # 23:59:60
    (PRE_POS, -36, 1483228800, 1483228838, None, 0),  # 00:00:01
    (PRE_POS, -36, 1483228800, 1483228839, 1483228802, 0),  # 00:00:02
    (POS, -36, 1483228836, 1483228836, None, 0),
    (POS, -36, 1483228836, 1483228839, 1483228802, 0),
    (POS, -36, 1483228836, 1483228833, 1483228797, 0),
    (POS, -37, 1483228836, 1483228836, None, 0),  # the offset from after the leap already
    (POS, -37, 1483228836, 1483228839, 1483228802, 0),
    (POS, -37, 1483228836, 1483228833, 1483228797, 0),
    (POST_POS, -37, 1483228837, 1483228839, 1483228802, 0),
    (POST_POS, -37, 1483228900, 1483228838, None, 0),
    (POST_POS, -37, 1483228900, 1483228833, 1483228797, 0),  # a reading from before it, seen after it
]


@pytest.mark.parametrize(("indicator", "offset", "reference", "asked", "utc", "announced"), LEAP_2016)
def test_the_leap_second_of_2016(
    indicator: int, offset: int, reference: int, asked: int, utc: int | None, announced: int
) -> None:
    snapshot = page(leap_indicator=indicator, tai_offset_sec=offset, time_sec=reference)
    assert utc_at(snapshot, asked * S) == (None if utc is None else (utc * S, announced))


#: Reference (UTC), the end of its month (UTC): leap years, centuries, year ends.
MONTH_ENDS = [
    ("1970-01-01 00:00:00", "1970-02-01 00:00:00"),
    ("1972-06-30 23:00:00", "1972-07-01 00:00:00"),
    ("2000-02-29 12:00:00", "2000-03-01 00:00:00"),
    ("2016-12-01 00:00:00", "2017-01-01 00:00:00"),
    ("2023-02-28 23:59:40", "2023-03-01 00:00:00"),
    ("2024-02-28 23:59:59", "2024-03-01 00:00:00"),
    ("2024-02-29 00:00:00", "2024-03-01 00:00:00"),
    ("2024-12-31 23:59:50", "2025-01-01 00:00:00"),
    ("2025-04-30 01:02:03", "2025-05-01 00:00:00"),
    ("2100-02-28 10:00:00", "2100-03-01 00:00:00"),
    ("2400-02-29 10:00:00", "2400-03-01 00:00:00"),
]


@pytest.mark.parametrize(("reference", "end"), MONTH_ENDS)
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_leap_comes_at_the_end_of_the_references_month(reference: str, end: str, sign: int) -> None:
    """Also for one who reads long after a reference that nobody brings up to date; +37 is taken for -37."""
    for leap, shift in ((PRE_POS, -1), (PRE_NEG, 1)):
        snapshot = page(leap_indicator=leap, time_sec=posix(reference) + 37, tai_offset_sec=37 * sign)
        before, after = posix(end) - 4, posix(end) + 4
        if before >= posix(reference):
            assert utc_at(snapshot, (before + 37) * S) == (before * S, leap)
        assert utc_at(snapshot, (after + 37) * S) == ((after + shift) * S, 0)
        assert utc_at(snapshot, (after + 37 + 40 * 86400) * S) == ((after + shift + 40 * 86400) * S, 0)


@given(st.datetimes(datetime(1970, 1, 2), datetime(9990, 1, 1)), st.sampled_from([PRE_POS, PRE_NEG]))
def test_months_end_as_in_the_calendar(moment: datetime, leap: int) -> None:
    moment = moment.replace(microsecond=0)
    following = (moment.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0, second=0)
    scale = timescale(page(time_type=UTC_TYPE, leap_indicator=leap, time_sec=timegm(moment.timetuple())))
    end = timegm(following.timetuple())
    assert scale is not None and scale.withheld_from_sec is not None and scale.withheld_until_sec is not None
    assert scale.withheld_from_sec + 2 == (end if leap == PRE_POS else end - 1)
    assert scale.withheld_until_sec - 2 == (end + 1 if leap == PRE_POS else end - 1)


@given(st.datetimes(datetime(1970, 1, 2), datetime(9990, 1, 1)), st.sampled_from([POST_POS, POST_NEG]))
def test_months_begin_as_in_the_calendar(moment: datetime, leap: int) -> None:
    moment = moment.replace(microsecond=0)
    scale = timescale(page(time_type=UTC_TYPE, leap_indicator=leap, time_sec=timegm(moment.timetuple())))
    start = timegm(moment.replace(day=1, hour=0, minute=0, second=0).timetuple())
    assert scale is not None and scale.withheld_from_sec is not None and scale.withheld_until_sec is not None
    assert scale.withheld_until_sec - 2 == start
    assert scale.withheld_from_sec + 2 == (start - 1 if leap == POST_POS else start)


seconds_of_any_year = st.integers(0, 2**64 - 1)


@given(seconds_of_any_year, st.integers(-(2**15), 2**15 - 1), st.integers(0, 255), st.sampled_from([TAI, UTC_TYPE]))
def test_no_page_of_any_year_is_too_much(second: int, offset: int, leap: int, time_type: int) -> None:
    snapshot = page(time_type=time_type, time_sec=second, tai_offset_sec=offset, leap_indicator=leap)
    scale = timescale(snapshot)
    if scale is None:
        assert leap not in (NONE, PRE_POS, PRE_NEG, POST_POS, POST_NEG)
        assert str(second) in why_no_timescale(snapshot)
        return
    told = scale.at(second * S)
    if time_type == TAI and told is not None:
        assert -abs(offset) - 1 <= told[0] // S <= -abs(offset) + 1


@given(seconds_of_any_year)
def test_every_day_lies_in_one_month(second: int) -> None:
    """The month around any moment: it holds the moment and is 28 to 31 days long."""
    before = timescale(page(time_type=UTC_TYPE, time_sec=second, leap_indicator=PRE_POS))
    after = timescale(page(time_type=UTC_TYPE, time_sec=second, leap_indicator=POST_POS))
    assert before is not None and before.withheld_from_sec is not None
    assert after is not None and after.withheld_until_sec is not None
    start, end = after.withheld_until_sec - 2, before.withheld_from_sec + 2
    assert start <= second < end
    assert (end - start) / 86400 in (28, 29, 30, 31)


# ---- The sign, and what gives no time -----------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "odd"), [(-37, False), (37, True), (0, False), (-1, False), (1, True)])
def test_the_offsets_magnitude_counts(stored: int, odd: bool) -> None:
    """A producer that stores TAI - UTC is 74 s off for who believes its sign."""
    snapshot = page(tai_offset_sec=stored, time_sec=1_800_000_037)
    assert utc_at(snapshot, 1_800_000_037 * S) == ((1_800_000_037 - abs(stored)) * S, 0)
    assert odd_tai_sign(snapshot) is odd


def test_the_sign_of_an_offset_that_is_not_used_is_not_odd() -> None:
    assert not odd_tai_sign(page(tai_offset_sec=37, flags=0))
    assert not odd_tai_sign(page(tai_offset_sec=37, time_type=UTC_TYPE))


def test_a_page_of_utc_takes_no_offset() -> None:
    snapshot = page(time_type=UTC_TYPE, tai_offset_sec=-37, time_sec=1_800_000_000)
    assert utc_at(snapshot, 1_800_000_000 * S) == (1_800_000_000 * S, 0)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"counter_id": 0xFF}, "no counter"),
        ({"counter_id": 0}, "counter 0"),
        ({"counter_id": 7}, "counter 7"),
        ({"time_type": 2}, "monotonic"),
        ({"time_type": 3}, "smeared"),
        ({"time_type": 4}, "maybe-smeared"),
        ({"time_type": 200}, "type-200"),
        ({"flags": 0}, "offset"),
        ({"size": 0x57}, "87"),
    ],
)
def test_what_gives_no_time(fields: dict[str, int], word: str) -> None:
    reason = why_no_time(page(**fields), 1)
    assert reason is not None and word in reason


def test_what_gives_time() -> None:
    assert why_no_time(page(), 1) is None
    assert why_no_time(page(time_type=UTC_TYPE, flags=0), 1) is None
    assert why_no_time(page(counter_id=0), 0) is None
    assert why_no_time(page(size=0x58), 1) is None
    assert why_no_time(page(flags=model.TAI_OFFSET_VALID | 1 << 40), 1) is None


@pytest.mark.parametrize("leap", [6, 7, 100, 255])
def test_a_leap_indicator_that_nobody_knows_gives_none(leap: int) -> None:
    snapshot = page(leap_indicator=leap, time_sec=1_800_000_000)
    assert timescale(snapshot) is None
    assert f"leap-{leap}" in why_no_timescale(snapshot)


def test_a_leap_second_in_the_middle_of_a_month_gives_none() -> None:
    assert timescale(page(leap_indicator=POS, time_sec=posix("2016-12-15 00:00:00") + 37)) is None


def test_the_calendar_of_this_test_is_right() -> None:
    assert posix("2017-01-01 00:00:00") == 1483228800 == datetime(2017, 1, 1, tzinfo=UTC).timestamp()
