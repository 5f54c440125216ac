"""The C conversion from counter to time and error, against exact rational arithmetic, to the last bit."""

from __future__ import annotations

import math
import random
import subprocess
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from refclock import model
from refclock.model import Snapshot, encode
from refclock.page import error_ns, time_ns

MOST = 2**64 - 1
SANITIZED = ("-g", "-O1", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")


# ---- The model: facts/vmclock.md section 2 in numbers without a limit ---------------------------------------


def signed_ticks(counter: int, reference: int) -> int:
    """counter - reference in two's complement of 64 bits."""
    ticks = (counter - reference) % 2**64
    return ticks - 2**64 if ticks >= 2**63 else ticks


def model_time_ns(fields: dict[str, int], counter: int) -> int:
    """The page's time, rounded half to even."""
    unit = Fraction(1, 2 ** (64 + fields["counter_period_shift"]))
    elapsed = signed_ticks(counter, fields["counter_value"]) * fields["counter_period_frac_sec"] * unit
    return round((fields["time_sec"] + Fraction(fields["time_frac_sec"], 2**64) + elapsed) * 10**9)


def model_error_ns(fields: dict[str, int], counter: int, error: int, rate: int) -> int:
    """An error, rounded up."""
    ticks = abs(signed_ticks(counter, fields["counter_value"]))
    growth = Fraction(ticks * rate, 2 ** (64 + fields["counter_period_shift"]))
    return error + math.ceil(growth * 10**9)


def page(**fields: int) -> tuple[dict[str, int], Snapshot]:
    sound = {
        "magic": model.MAGIC,
        "size": 112,
        "version": 1,
        "counter_value": 0,
        "counter_period_shift": 0,
        "counter_period_frac_sec": 0,
        "time_sec": 0,
        "time_frac_sec": 0,
    }
    return sound | fields, Snapshot(encode(sound | fields))


def agrees(counter: int, **fields: int) -> None:
    values, snapshot = page(**fields)
    assert time_ns(snapshot, counter) == model_time_ns(values, counter)


# ---- Time ---------------------------------------------------------------------------------------------------

powers = st.builds(lambda bit, more: max(0, min(MOST, 2**bit + more)), st.integers(0, 64), st.integers(-2, 2))
words = st.one_of(st.integers(0, MOST), powers, st.sampled_from([0, 1, MOST, 2**63, 10**9]))
shifts = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 63, 64, 65, 127, 128, 191, 192, 193, 254, 255]))


@settings(max_examples=2000, deadline=None)
@given(words, words, shifts, words, words, words)
@example(2**63, 0, 0, MOST, MOST, MOST)
@example(0, 2**63, 0, MOST, 0, 0)
@example(2**63 - 1, 0, 0, MOST, MOST, MOST)
@example(MOST, 0, 0, MOST, 0, 0)
@example(0, 1, 255, 1, 0, 0)
def test_time_is_exact(counter: int, reference: int, shift: int, period: int, sec: int, frac: int) -> None:
    agrees(
        counter,
        counter_value=reference,
        counter_period_shift=shift,
        counter_period_frac_sec=period,
        time_sec=sec,
        time_frac_sec=frac,
    )


@settings(max_examples=1000, deadline=None)
@given(words, st.integers(-(10**12), 10**12), st.integers(0, 255), words, st.integers(0, 2**34), words)
def test_time_near_the_reference_is_exact(
    reference: int, ticks: int, shift: int, period: int, sec: int, frac: int
) -> None:
    """As in the field: the counter moments before or after its reference, also across its wrap."""
    agrees(
        (reference + ticks) % 2**64,
        counter_value=reference,
        counter_period_shift=shift,
        counter_period_frac_sec=period,
        time_sec=sec,
        time_frac_sec=frac,
    )


# m * 2^-10 s is m * 976562.5 ns: for odd m exactly half-way.
odd = st.integers(0, 511).map(lambda half: 2 * half + 1)


@given(odd, st.integers(0, 2**34), st.sampled_from([-1, 0, 1]), st.integers(0, 255), st.integers(0, 3))
def test_ties_go_to_even_and_the_least_bit_breaks_them(m: int, sec: int, ticks: int, shift: int, period: int) -> None:
    """Half a nanosecond, exactly; and beside it by as little as 2^-319 s."""
    fields = {"time_sec": sec, "time_frac_sec": m << 54, "counter_period_shift": shift}
    values, snapshot = page(**fields, counter_value=100, counter_period_frac_sec=period)
    told = time_ns(snapshot, 100 + ticks)
    half = (Fraction(sec) + Fraction(m, 2**10)) * 10**9
    assert half.denominator == 2
    if ticks * period == 0:
        assert told % 2 == 0 and abs(told - half) == Fraction(1, 2)
    else:
        assert told == (math.floor(half) if ticks < 0 else math.ceil(half))
    assert told == model_time_ns(values, 100 + ticks)


@given(odd, st.integers(0, 2**34), st.booleans(), st.integers(0, 53), st.integers(0, 53))
def test_ties_out_of_the_span_go_to_even(m: int, sec: int, before: bool, bits: int, shift: int) -> None:
    """The half comes out of ticks * period, on either side of the reference."""
    ticks, period = m << bits, 1 << (54 - bits) << shift
    assume(period <= MOST)
    counter = (2**40 - ticks if before else 2**40 + ticks) % 2**64
    fields = {"time_sec": sec, "counter_value": 2**40, "counter_period_shift": shift}
    values, snapshot = page(**fields, counter_period_frac_sec=period)
    told = time_ns(snapshot, counter)
    assert told % 2 == 0
    assert told == model_time_ns(values, counter)


def test_the_difference_of_the_counters_is_signed() -> None:
    """A reference that lies ahead, by hand: a counter of 1 GHz, 1.5 s before and after 1000 s."""
    _, snapshot = page(time_sec=1000, counter_value=5 * 10**9, counter_period_frac_sec=2**64 // 10**9)
    assert time_ns(snapshot, 3_500_000_000) == 998_500_000_000
    assert time_ns(snapshot, 6_500_000_000) == 1_001_500_000_000
    assert time_ns(snapshot, 5_000_000_000) == 1_000_000_000_000


def test_many_pages_of_every_shift() -> None:
    generator = random.Random(20260101)

    def word() -> int:
        number = generator.getrandbits(64) >> generator.randrange(64)
        return number if generator.random() < 0.7 else min(MOST, (1 << generator.randrange(64)) + 1)

    for number in range(256 * 60):
        reference = word()
        ticks = word() if number % 2 else -word()
        agrees(
            (reference + ticks) % 2**64,
            counter_value=reference,
            counter_period_shift=number % 256,
            counter_period_frac_sec=word(),
            time_sec=word(),
            time_frac_sec=word(),
        )


# ---- Errors -------------------------------------------------------------------------------------------------

ESTERROR, MAXERROR = model.TIME_ESTERROR_VALID, model.TIME_MAXERROR_VALID
EST_RATE, MAX_RATE = model.PERIOD_ESTERROR_VALID, model.PERIOD_MAXERROR_VALID


@settings(max_examples=1500, deadline=None)
@given(words, words, shifts, words, words, words, words, st.integers(0, 1023))
@example(1, 0, 255, 0, 1, 0, 1, 1023)
@example(0, 1, 255, 0, 1, 0, 1, 1023)
@example(2**63, 0, 0, MOST, MOST, MOST, MOST, 1023)
def test_errors_are_exact(
    counter: int, reference: int, shift: int, esterror: int, est_rate: int, maxerror: int, max_rate: int, flags: int
) -> None:
    """Rounded up, growing to both sides of the reference, each only where its flag is set."""
    fields, snapshot = page(
        counter_value=reference,
        counter_period_shift=shift,
        counter_period_esterror_rate_frac_sec=est_rate,
        counter_period_maxerror_rate_frac_sec=max_rate,
        time_esterror_nanosec=esterror,
        time_maxerror_nanosec=maxerror,
        flags=flags,
    )
    expected_est = model_error_ns(fields, counter, esterror, est_rate if flags & EST_RATE else 0)
    expected_max = model_error_ns(fields, counter, maxerror, max_rate if flags & MAX_RATE else 0)
    assert error_ns(snapshot, counter) == (
        expected_est if flags & ESTERROR else None,
        expected_max if flags & MAXERROR else None,
    )


def test_the_least_growth_counts_a_whole_nanosecond() -> None:
    for shift in range(256):
        fields = {"counter_period_shift": shift, "counter_period_maxerror_rate_frac_sec": 1, "counter_value": 1000}
        _, snapshot = page(time_maxerror_nanosec=7, flags=MAXERROR | MAX_RATE, **fields)
        assert error_ns(snapshot, 999) == error_ns(snapshot, 1001) == (None, 8)
        assert error_ns(snapshot, 1000) == (None, 7)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0x58, (None, None)), (0x60, (5, None)), (0x68, (5, 7))],
)
def test_errors_that_the_size_does_not_cover_are_not_there(size: int, expected: tuple[int | None, int | None]) -> None:
    _, snapshot = page(size=size, time_esterror_nanosec=5, time_maxerror_nanosec=7, flags=ESTERROR | MAXERROR)
    assert error_ns(snapshot, 0) == expected


# ---- The C itself -------------------------------------------------------------------------------------------


def _ask_c(program: Path, count: int, seed: int) -> int:
    done = subprocess.run([program, str(count), str(seed)], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    shifts_seen = set()
    for line in done.stdout.splitlines():
        counter, value, shift, period, rate, sec, frac, error, *results = (int(word, 16) for word in line.split())
        fields = {
            "counter_value": value,
            "counter_period_shift": shift,
            "counter_period_frac_sec": period,
            "time_sec": sec,
            "time_frac_sec": frac,
        }
        time_high, time_low, error_high, error_low = results
        expected_time = model_time_ns(fields, counter) % 2**128
        assert (time_high << 64 | time_low) == expected_time, line
        assert (error_high << 64 | error_low) == model_error_ns(fields, counter, error, rate), line
        shifts_seen.add(shift)
    return len(shifts_seen)


@pytest.mark.parametrize("flags", [SANITIZED, ("-O3",), ("-O0", "-fwrapv")], ids=["sanitized", "O3", "O0"])
def test_random_pages_in_c(native: Callable[..., Path], flags: tuple[str, ...]) -> None:
    """The header on its own: no undefined behaviour with any shift, and the same numbers with any optimisation."""
    assert _ask_c(native("conversion", *flags), 400_000, 4242) == 256
