"""The driver itself: what poll() does and costs, and the kernel's arithmetic against the package's."""

from __future__ import annotations

import json

import pytest

from tests.guest import page
from tests.guest.figures import CONTINUED_S, RESTORED_S, SLACK, keep
from tests.guest.scenarios import Lab, wheel

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

POLL = """
import os, select
device = os.open("/dev/vmclock0", os.O_RDONLY)
poll = select.poll()
poll.register(device, select.POLLIN)
poll.poll(0)
os.pread(device, 112, 0)
print([list(event) for event in poll.poll(200)])
"""
POLLHUP = 16


@pytest.mark.parametrize(
    ("name", "flag", "notification", "watch"),
    [
        ("flag 9 clear", 0, False, "0.001"),
        ("flag 9 clear", 0, False, None),
        ("flag 9 set, never notified", page.NOTIFICATION_PRESENT, False, "0.001"),
        ("notified", page.NOTIFICATION_PRESENT, True, "0.001"),
    ],
)
def test_poll(name: str, flag: int, notification: bool, watch: str | None) -> None:
    """Whether the daemon wakes by it, and does not spin."""
    with Lab(watch=watch, notification=notification) as lab:
        lab.boot(flags=flag | page.TAI_OFFSET_VALID | page.TIME_ESTERROR_VALID | page.TIME_MAXERROR_VALID)
        events = [event for _, event in json.loads(lab.guest.python(POLL))]
        assert events == ([] if flag else [POLLHUP])
        lab.warm()
        before = lab.cpu()
        if notification:
            lab.guest.save()
            event = lab.guest.restore(lost_s=20)
        else:
            event = lab.guest.migrate(lost_s=0.1, frequency_ppm=20)
        row = lab.row(f"poll: {name}", event, poll=events, **before)
        after = lab.cpu()
        keep({"name": f"poll: {name}, after", "watch": lab.watch or "default", **after})
        # A look at every `watch`, or none; a sample each 50 ms; chronyd's answers.
        looks = 0 if flag else 1000 if watch else 100
        assert max(before["wakeups_per_s"], after["wakeups_per_s"]) <= looks * 1.1 + 60
        # Without a notification it is the next sample that finds it.
        assert row["detected_s"] <= (RESTORED_S if notification else 0.060 if flag else CONTINUED_S) * SLACK


#: Pairs from the ioctl, and brackets: one JSON object a line.
PAIRS = """
import ctypes, fcntl, json, os, struct, sys, time
from refclock.page import Page, pair, read_counter, time_ns
PRECISE = 0xC0403D08
CLOCK = struct.Struct("qII")
phc = os.open("/dev/ptp0", os.O_RDONLY)
vmclock = Page("/dev/vmclock0")
count, period = int(sys.argv[1]), float(sys.argv[2])
buffer = bytearray(64)
for _ in range(count):
    before = read_counter()
    fcntl.ioctl(phc, PRECISE, buffer)
    after = read_counter()
    exact = [s * 10**9 + n for s, n, _ in CLOCK.iter_unpack(bytes(buffer[:48]))]
    bracket = pair(8, period)
    print(json.dumps([before, after, *exact, *bracket]))
"""
JUDGE = """
import sys
from refclock.page import Page, time_ns
snapshot = Page("/dev/vmclock0").read()
for counter in sys.stdin:
    print(time_ns(snapshot, int(counter)))
"""
SAMPLES = 10_000


def test_arithmetic_and_bracket() -> None:
    """The kernel's PTP clock and this package agree on the time at one counter value; and how well brackets do.

    The kernel does not say at which counter value it read its clocks. A page on which a tick counts a microsecond makes
    the PTP clock say it. That gives the line of CLOCK_MONOTONIC_RAW in the counter, exactly, which then says it for
    readings on an honest page.
    """
    with Lab() as lab:
        guest = lab.guest
        guest.install_wheel(wheel())
        honest = guest.host_line()
        guest.publish(honest)
        guest.load_driver()
        period_ns = honest.period / 2 ** (64 + honest.shift) * 1e9

        def pairs(count: int) -> list[list[int]]:
            said = guest.python(PAIRS, str(count), repr(period_ns), timeout_s=120)
            return [json.loads(line) for line in said.splitlines()]

        origin = honest.counter
        revealing = page.Line(origin, 10**9 << 64, (1 << 64) // 10**6, 0)
        guest.publish(revealing)
        pairs(100)  # cold
        revealed = []
        for before, after, device, system, raw, counter, paired, half in pairs(SAMPLES):
            ticks, rest = divmod(device - 37 * 10**9 - 10**18 + 500, 1000)
            assert 480 <= rest <= 520, "a whole number of ticks"
            at = origin + ticks
            assert before <= at <= after
            revealed.append((at, system, raw, counter, paired, half))
        raw_line = fit([(at - origin, raw) for at, _, raw, *_ in revealed])
        system_line = fit([(at - origin, system - revealed[0][1]) for at, system, *_ in revealed])
        residual = max(abs(raw - at_line(raw_line, at - origin)) for at, _, raw, *_ in revealed)

        biases = sorted(
            paired - revealed[0][1] - at_line(system_line, counter - origin) for _, _, _, counter, paired, _ in revealed
        )
        exact = sorted(system - revealed[0][1] - at_line(system_line, at - origin) for at, system, *_ in revealed)

        guest.publish(honest)
        judged = pairs(SAMPLES)
        slope, intercept = raw_line
        counters = [origin + round((raw + 0.5 - intercept) / slope) for _, _, _, _, raw, *_ in judged]
        ours = guest.python(JUDGE, stdin="\n".join(map(str, counters)).encode(), timeout_s=60).split()
        differences = sorted(int(time) - device for time, (_, _, device, *_) in zip(ours, judged, strict=True))
        row = keep(
            {
                "name": "arithmetic against the PTP clock",
                "samples": len(judged),
                "least_ns": differences[0],
                "median_ns": differences[len(differences) // 2],
                "most_ns": differences[-1],
                "raw_line_residual_ns": residual,
                "bracket_bias_median_ns": biases[len(biases) // 2],
                "bracket_bias_1st_99th_ns": [biases[len(biases) // 100], biases[len(biases) * 99 // 100]],
                "bracket_uncertainty_median_ns": sorted(half for *_, half in revealed)[len(revealed) // 2],
                "exact_pairs_1st_99th_ns": [exact[len(exact) // 100], exact[len(exact) * 99 // 100]],
            }
        )
        assert row["least_ns"] >= -2 and row["most_ns"] <= 2


def fit(points: list[tuple[int, int]]) -> tuple[float, float]:
    """The line (slope, intercept) that is the centre of all readings, each of which is rounded down to 1 ns."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    return slope, mean_y - slope * mean_x


def at_line(line: tuple[float, float], x: int) -> float:
    return line[0] * x + line[1]
