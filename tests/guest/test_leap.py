"""Leap seconds in a real kernel: announced by the page, done by chronyd and the kernel, right from the first moment."""

from __future__ import annotations

import calendar
import csv
import io
import time

import pytest

from tests.guest import counter, page
from tests.guest.figures import keep
from tests.guest.page import NANOSECONDS, Line
from tests.guest.scenarios import Lab

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

LOG = "/tmp/samples.csv"
PRE_POS, PRE_NEG, POST_POS, POST_NEG = 1, 2, 4, 5
#: How long the kernel may take to begin the leap: its timer's tick, emulated.
LATE_NS = 60_000_000


@pytest.mark.parametrize(
    ("name", "announced", "done", "inserted"), [("positive", PRE_POS, POST_POS, 1), ("negative", PRE_NEG, POST_NEG, -1)]
)
def test_leap(name: str, announced: int, done: int, inserted: int) -> None:
    june = calendar.timegm((2027, 7, 1, 0, 0, 0)) * NANOSECONDS
    with Lab() as lab:
        guest = lab.guest
        host = guest.host_line()
        began_ns = june - 45 * NANOSECONDS
        line = Line.through(host.counter, began_ns, counter.frequency_hz())
        guest.run("date", "-s", f"@{began_ns // NANOSECONDS}")
        lab.boot("--log-samples", LOG, line=line, leap_indicator=announced)
        lab.wait()
        # POSIX time leaves 23:59:60 out, or 23:59:59: from `leap_ns` on it is off the line by a second.
        leap_ns = june if inserted > 0 else june - NANOSECONDS
        wait_for(lab, leap_ns + 5 * NANOSECONDS)
        after = line._replace(utc=line.utc - inserted * page.SECOND).moved(guest.samples()[-1].counter)
        seconds, offset = after.utc >> 64, -37 - inserted
        event = guest.publish(after, leap_indicator=done, tai_offset_sec=offset, time_sec=seconds - offset)
        wait_for(lab, event.line.ns(after.counter) + 5 * NANOSECONDS)

        samples = guest.samples()
        log = list(csv.DictReader(io.StringIO(guest.read(LOG).decode())))
        status = lab.status()

        before = [s for s in samples if leap_ns - 5 * NANOSECONDS < s.utc_ns < leap_ns and s.sequence != event.sequence]
        around = [s for s in samples if leap_ns + LATE_NS < s.utc_ns and s.sequence != event.sequence]
        later = [s for s in samples if s.sequence == event.sequence]
        wrong_before = max(abs(s.offset_ns) for s in before)
        wrong_after = max(abs(s.offset_ns - inserted * NANOSECONDS) for s in around)
        wrong_later = max(abs(s.offset_ns) for s in later)
        begun = next(
            s.utc_ns for s in samples if s.utc_ns > leap_ns - NANOSECONDS // 2 and abs(s.offset_ns) > NANOSECONDS // 2
        )
        fed = [(int(row["reference_ns"]), int(row["leap"])) for row in log]
        row = keep(
            {
                "name": f"leap second, {name}",
                "kernel_began_after_ns": begun - leap_ns,
                "worst_5s_before_ns": wrong_before,
                "worst_5s_after_ns": wrong_after,
                "worst_with_the_new_page_ns": wrong_later,
                # Within 5 s chronyd drops all samples, and says so to its clients.
                "announced_to_ntp_clients": sorted(
                    {s.leap for s in samples if s.utc_ns < june - 6 * NANOSECONDS} - {255, 3}
                ),
                "unsynchronised_s": sum(s.leap == 3 for s in samples if s.utc_ns > june - 6 * NANOSECONDS) / 1000,
                "leaps_fed": sorted({leap for _, leap in fed}),
                "last_fed_before_s": (max(at for at, leap in fed if leap) - june) / NANOSECONDS,
                "first_fed_after_s": (min(at for at, leap in fed if not leap and at > june) - june) / NANOSECONDS,
                "disruptions": status["disruptions"],
                "state": status["state"],
            }
        )
        expected = 1 if inserted > 0 else 2
        assert expected in row["announced_to_ntp_clients"]
        assert expected in row["leaps_fed"]
        assert row["last_fed_before_s"] < -2 + (0 if inserted > 0 else -1) and row["first_fed_after_s"] >= 2
        assert 0 <= begun - leap_ns <= LATE_NS
        assert wrong_before <= 10_000 and wrong_after <= 10_000 and wrong_later <= 10_000
        assert (row["disruptions"], row["state"]) == (0, "synchronised")


def wait_for(lab: Lab, utc_ns: int, timeout_s: float = 90.0) -> None:
    """Until the sampler has seen this moment on the line that is the truth."""
    deadline = time.monotonic() + timeout_s
    while lab.guest.samples()[-1].utc_ns < utc_ns:
        assert time.monotonic() < deadline
        time.sleep(0.2)
