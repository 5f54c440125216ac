"""The daemon never makes it worse: random sequences of events, on two guests at once, one of which has no daemon.

The other one has the best that chronyd alone can: `refclock PHC` on the vmclock PTP clock, poll -2, and a makestep
that never ends. Set VMCLOCK_GUEST_SEED to repeat a run.
"""

from __future__ import annotations

import os
import random
import time
from bisect import bisect_right
from itertools import pairwise

import pytest

from tests.guest.guest import Event, Guest
from tests.guest.scenarios import Lab, keep

pytestmark = [pytest.mark.guest]

ALONE = ("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 -1", "rtcsync", "maxupdateskew 100.0")
#: What the comparison forgives: the step's own moment, which is the emulator's, and chronyd's noise at rest.
LATE_S, NOISE_NS = 0.100, 1_000
EVENTS = 3


@pytest.mark.timeout(300)
def test_a_few_sequences() -> None:
    play(2)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_sequences() -> None:
    play(50)


def play(sequences: int) -> None:
    seed = int(os.environ.get("VMCLOCK_GUEST_SEED") or time.time_ns())
    print(f"VMCLOCK_GUEST_SEED={seed}")
    chance = random.Random(seed)
    with Lab() as lab, Guest() as alone:
        lab.boot()
        alone.publish(alone.host_line())
        alone.load_driver()
        alone.sample_clock()
        alone.chronyd(*ALONE)
        lab.wait()
        alone.wait_normal()
        time.sleep(10)
        for sequence in range(sequences):
            pairs = []
            for _ in range(EVENTS):
                lost_s = chance.choice([0.0, 0.0005, 0.01, 0.1, 1, 20, 3600]) * chance.choice([1, 1, -1])
                event = {"lost_s": lost_s, "frequency_ppm": chance.uniform(-50, 50)}
                pairs.append((event, lab.guest.migrate(**event), alone.migrate(**event)))
                time.sleep(chance.choice([0.3, 1, 3]))
            time.sleep(5)
            for event, with_daemon, without in pairs:
                compare(seed, sequence, event, errors(lab.guest, with_daemon), errors(alone, without))


def errors(guest: Guest, event: Event) -> list[tuple[float, int, bool]]:
    """Seconds since the event, |error| in ns and whether chronyd called itself synchronised; until the next event."""
    samples = [sample for sample in guest.samples() if sample.sequence == event.sequence]
    first = samples[0].counter
    return [(event.line.seconds(first, s.counter), abs(s.offset_ns), s.leap < 3) for s in samples]


def compare(
    seed: int,
    sequence: int,
    event: dict[str, float],
    ours: list[tuple[float, int, bool]],
    theirs: list[tuple[float, int, bool]],
) -> None:
    times = [at for at, _, _ in ours]
    worse = [
        (at, error, ours[max(0, bisect_right(times, at) - 1)][1])
        for at, error, _ in theirs
        if LATE_S < at < times[-1] and ours[max(0, bisect_right(times, at) - 1)][1] > error + NOISE_NS
    ]
    end = min(times[-1], theirs[-1][0])
    lied = [
        sum(
            until - at
            for (at, error, normal), (until, *_) in pairwise(side)
            if normal and error > 1_000_000 and at < end
        )
        for side in (ours, theirs)
    ]
    row = keep(
        {
            "name": "never worse",
            "seed": seed,
            "sequence": sequence,
            **event,
            "worse_moments": len(worse),
            "worst_of_them": max(worse, key=lambda moment: moment[2] - moment[1], default=None),
            "over_1ms_while_normal_s": lied[0],
            "over_1ms_while_normal_without_s": lied[1],
        }
    )
    assert not worse, f"VMCLOCK_GUEST_SEED={seed}"
    assert row["over_1ms_while_normal_s"] <= lied[1] + LATE_S, f"VMCLOCK_GUEST_SEED={seed}"
