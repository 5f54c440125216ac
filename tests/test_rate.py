"""refclock.rate: the constant of the boot out of samples that chronyd's corrections are in, and slopes."""

from __future__ import annotations

import random

import pytest

from refclock.rate import FEWEST, LONGEST_NS, MOST, SHORTEST_NS, SystemRate, frequency_ppm, slope_ppm

MSEC = 1_000_000
SEC = 1_000_000_000
TICKS_PER_NS = 2.5
#: Nanoseconds a tick without corrections: the counter's true period, and 37 ppm of the kernel's own idea of it.
UNCORRECTED_NS = 0.4 * (1 + 37e-6)


class Clock:
    """A system clock that runs on a counter, by UNCORRECTED_NS a tick times the kernel's rate."""

    def __init__(self, noise_ns: float = 0.0) -> None:
        self.counter = 1 << 50
        self.system_ns = 1.7e18 // 1
        self._fine_ns = 0.0
        self.kernel_rate = 1.0
        self._random = random.Random(5)
        self._noise_ns = noise_ns

    def run(self, ns: int) -> None:
        ticks = round(ns * TICKS_PER_NS)
        self.counter += ticks
        self._fine_ns += ticks * UNCORRECTED_NS * self.kernel_rate

    def pair(self) -> tuple[int, int, float]:
        noise_ns = self._random.gauss(0, self._noise_ns)
        return self.counter, int(self.system_ns) + round(self._fine_ns + noise_ns), self.kernel_rate


def error_ppm(rate: SystemRate) -> float:
    found_ns = rate.uncorrected_ns()
    assert found_ns is not None
    return abs(found_ns / UNCORRECTED_NS - 1) * 1e6


def test_a_steady_clock() -> None:
    clock, rate = Clock(noise_ns=1.0), SystemRate()
    clock.kernel_rate = 1 - 80e-6
    for number in range(100):
        assert (rate.uncorrected_ns() is None) == (number <= FEWEST)
        rate.add(*clock.pair())
        clock.run(50 * MSEC)
    assert error_ppm(rate) < 0.01


@pytest.mark.parametrize("poll_ns", [62_500_000, SEC])
def test_chronyd_changes_the_frequency_at_every_poll(poll_ns: int) -> None:
    """Slews of up to a tenth of the clock's rate: only intervals of one frequency count."""
    clock, rate = Clock(noise_ns=1.0), SystemRate()
    numbers = random.Random(3)
    next_poll_ns = poll_ns
    for now_ns in range(0, 20 * SEC, 2_500_000):
        if now_ns >= next_poll_ns:
            next_poll_ns += poll_ns
            clock.kernel_rate = 1 + numbers.uniform(-0.1, 0.1)
        if now_ns % (50 * MSEC) == 0:
            rate.add(*clock.pair())
        clock.run(2_500_000)
    assert error_ppm(rate) < 0.02


def test_what_lies_between_two_frequencies_never_counts() -> None:
    clock, rate = Clock(), SystemRate()
    for number in range(1000):
        rate.add(*clock.pair())
        clock.run(50 * MSEC)
        clock.kernel_rate = 1 + number * 1e-6
    assert rate.uncorrected_ns() is None


def test_a_step_of_the_clock_spoils_nothing() -> None:
    clock, rate = Clock(), SystemRate()
    for number in range(60):
        rate.add(*clock.pair())
        clock.run(50 * MSEC)
        if number % 3 == 0:
            clock.system_ns += 20 * SEC
            rate.interrupt()
    assert error_ppm(rate) < 0.01


def test_a_step_that_nobody_told_of_is_outvoted() -> None:
    clock, rate = Clock(), SystemRate()
    for number in range(60):
        rate.add(*clock.pair())
        clock.run(50 * MSEC)
        if number % 5 == 0:
            clock.system_ns += 3 * MSEC
    assert error_ppm(rate) < 0.01


def test_samples_in_quick_succession_are_put_together() -> None:
    clock, rate = Clock(noise_ns=2.0), SystemRate()
    for _ in range(200):
        rate.add(*clock.pair())
        clock.run(SHORTEST_NS // 4)
    assert error_ppm(rate) < 0.5


def test_what_is_no_interval() -> None:
    clock, rate = Clock(), SystemRate()
    for _ in range(50):
        rate.add(*clock.pair())
        clock.run(LONGEST_NS + 100 * MSEC)
    for _ in range(50):
        counter, system_ns, kernel_rate = clock.pair()
        rate.add(counter, system_ns, kernel_rate)
        rate.add(counter, system_ns + 50 * MSEC, kernel_rate)  # a counter that stands still
        rate.add(counter - 1000, system_ns + 100 * MSEC, kernel_rate)  # and one that goes back
    assert rate.uncorrected_ns() is None


def test_a_kernel_that_does_not_say() -> None:
    clock, rate = Clock(), SystemRate()
    for _ in range(50):
        rate.add(*clock.pair()[:2], None)
        clock.run(50 * MSEC)
    assert rate.uncorrected_ns() is None


def test_it_forgets() -> None:
    """A clock source that was changed is followed within MOST intervals."""
    clock, rate = Clock(), SystemRate()
    for _ in range(1000):
        rate.add(*clock.pair())
        clock.run(50 * MSEC)
    clock.kernel_rate = 1.001  # stands for another constant
    for _ in range(MOST // 2 + 2):
        counter, system_ns, _ = clock.pair()
        rate.add(counter, system_ns, 1.0)
        clock.run(50 * MSEC)
    assert error_ppm(rate) == pytest.approx(1000, abs=1)


def test_the_sign_of_a_frequency() -> None:
    """The reference gains on a clock that runs slow."""
    assert frequency_ppm(1.0001, 1.0) == pytest.approx(100)
    assert frequency_ppm(0.4, 0.4 * (1 + 50e-6)) == pytest.approx(-50, abs=0.01)


@pytest.mark.parametrize("ppm", [-250.0, -0.3, 0.0, 0.1, 100.0])
@pytest.mark.parametrize("base_ns", [0, 1_700_000_000 * SEC])
def test_a_slope_and_its_error(ppm: float, base_ns: int) -> None:
    numbers = random.Random(round(ppm * 10))
    within = 0
    for _ in range(200):
        times = [base_ns + number * MSEC for number in range(50)]
        points = [(t, round(20e9 + ppm * 1e-6 * (t - base_ns) + numbers.gauss(0, 10))) for t in times]
        slope, error = slope_ppm(points)
        assert error == pytest.approx(10 / (50**3 / 12) ** 0.5, rel=0.5)
        within += abs(slope - ppm) < 3 * error
    assert within >= 190


def test_a_slope_without_noise_has_no_error() -> None:
    points = [(number * MSEC, number * 100) for number in range(5)]
    assert slope_ppm(points) == (pytest.approx(100), pytest.approx(0, abs=1e-9))
