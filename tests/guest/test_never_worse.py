"""The daemon never makes it worse: random sequences of events, on two guests at once, one of which has no daemon.

The other one has the best that chronyd alone can: `refclock PHC` on the vmclock PTP clock, poll -2, and a makestep
that never ends. Set VMCLOCK_GUEST_SEED to repeat a run, and VMCLOCK_GUEST_SLACK=1 to forgive no more than must be.
"""

from __future__ import annotations

import os
import random
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import pytest

from tests.guest import page
from tests.guest.figures import CONTINUED_S, NEVER_WORSE, RESTORED_S, SLACK, Row, keep
from tests.guest.guest import Event, Guest
from tests.guest.scenarios import DEBIAN, REFCLOCK, Lab
from tests.guest.truth import UNSYNCHRONISED

pytestmark = [pytest.mark.guest]

ALONE = ("refclock PHC /dev/ptp0 poll -2 tai", "makestep 0.001 -1", "rtcsync", "maxupdateskew 100.0")
#: What the comparison forgives: noise at rest (more of it on a machine that does other things too), a thousandth of an
#: error that is there anyway, and that two guests do not go on at the same moment.
NOISE_NS, PART, APART_S = round(2_000 * SLACK), 0.001, 0.005
#: How fast a clock may run away while nobody can know: the frequencies of all events together, at worst.
ASTRAY_PPM = 200
EVENTS = 3


class Side:
    """One of the two guests, and its chronyd."""

    def __init__(self, guest: Guest, *configuration: str) -> None:
        self.guest = guest
        self._configuration = configuration
        self.start_chronyd()

    def start_chronyd(self) -> None:
        self._chronyd = self.guest.chronyd(*self._configuration)

    def end_chronyd(self) -> None:
        self._chronyd.kill()
        self._chronyd.wait()


class Happening(NamedTuple):
    """Something that happens to both guests alike; what it does to one, in steps between which time may pass."""

    what: str
    pauses_s: tuple[float, ...]
    steps: Callable[[Side], Iterator[Event]]
    blind: int = 0
    "So many of the steps leave a page that gives no time: the clock must not get worse, but cannot be put right."
    reaction_s: float = CONTINUED_S
    "The promised time within which chronyd, by chance, may be the first to do something."


def migration(chance: random.Random) -> dict[str, float]:
    lost_s = chance.choice([0.0, 0.0005, 0.01, 0.1, 1, 20, 3600]) * chance.choice([1, 1, -1])
    # An offset within the page's bound is left to chronyd: a narrow one, so that it is within the noise.
    return {"lost_s": lost_s, "frequency_ppm": chance.uniform(-50, 50), "time_maxerror_nanosec": 1_000}


def migrate(chance: random.Random) -> Happening:
    new = migration(chance)

    def steps(side: Side) -> Iterator[Event]:
        yield side.guest.migrate(**new)

    return Happening(f"migrate {new}", (), steps)


def publish_late(chance: random.Random) -> Happening:
    """The new host's page has no time at first."""
    new = migration(chance)

    def steps(side: Side) -> Iterator[Event]:
        event = side.guest.migrate(**new, publish=False, counter_id=page.COUNTER_NONE, clock_status=page.UNKNOWN)
        yield event
        yield side.guest.publish(event.line, time_maxerror_nanosec=new["time_maxerror_nanosec"])

    return Happening(f"migrate, publish late {new}", (chance.choice([0.05, 0.3, 1.5]),), steps, blind=1)


def be_unreliable(chance: random.Random) -> Happening:
    """The host does not vouch for its time for a while; it is right all the same."""

    def steps(side: Side) -> Iterator[Event]:
        yield side.guest.publish(clock_status=page.UNRELIABLE)
        yield side.guest.publish(clock_status=page.SYNCHRONIZED)

    return Happening("unreliable", (chance.choice([0.1, 1.0]),), steps, blind=1)


def say_nothing_new(chance: random.Random) -> Happening:
    """The marker moves and nothing else does."""

    def steps(side: Side) -> Iterator[Event]:
        yield side.guest.publish(disruption_marker=side.guest.page().disruption_marker + 1)

    return Happening("marker alone", (), steps)


def migrate_without_chronyd(chance: random.Random) -> Happening:
    new = migration(chance)

    def steps(side: Side) -> Iterator[Event]:
        side.end_chronyd()
        yield side.guest.migrate(**new)
        side.start_chronyd()

    return Happening(f"migrate while chronyd is down {new}", (chance.choice([0.2, 1.0]),), steps)


def restore(chance: random.Random) -> Happening:
    """A snapshot, resumed later in a new process."""
    new = migration(chance) | {"lost_s": chance.choice([1, 20, 86400])}

    def steps(side: Side) -> Iterator[Event]:
        side.guest.save()
        yield side.guest.restore(**new)

    return Happening(f"restore {new}", (), steps, reaction_s=RESTORED_S)


KINDS = (migrate, publish_late, be_unreliable, say_nothing_new, migrate_without_chronyd, restore)
WEIGHTS = (8, 3, 2, 1, 2, 2)


@pytest.mark.timeout(300)
def test_a_few_sequences() -> None:
    play(3)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_sequences() -> None:
    play(50)


def play(sequences: int) -> None:
    seed = int(os.environ.get("VMCLOCK_GUEST_SEED") or time.time_ns())
    print(f"VMCLOCK_GUEST_SEED={seed}")
    chance = random.Random(seed)
    rows = []
    with Lab(cpus=1) as lab, Guest() as alone:
        lab.prepare()
        ours = Side(lab.guest, REFCLOCK, *DEBIAN)
        lab.start_daemon()
        alone.publish(alone.host_line())
        alone.load_driver()
        alone.sample_clock()
        theirs = Side(alone, *ALONE)
        lab.wait()
        alone.wait_normal()
        time.sleep(10)
        for sequence in range(sequences):
            played = []
            for happening in (chance.choices(KINDS, WEIGHTS)[0](chance) for _ in range(EVENTS)):
                played.append((happening, happen(happening, ours, theirs)))
                time.sleep(chance.choice([0.3, 1, 3]))
            time.sleep(5)
            for happening, pairs in played:
                name = {"name": NEVER_WORSE, "seed": seed, "sequence": sequence, "what": happening.what}
                for step, (ours_then, theirs_then) in enumerate(pairs):
                    sides = errors(lab.guest, ours_then), errors(alone, theirs_then)
                    rows.append(
                        keep(name | compare(*sides, happening.reaction_s * SLACK, is_blind=step < happening.blind))
                    )
            assert rows[-1]["watched_s"] > 3, "both samplers have seen the last of it"
    assert not [row for row in rows if row["worse_moments"] or row["lied_longer"]], f"VMCLOCK_GUEST_SEED={seed}"


def happen(happening: Happening, *sides: Side) -> list[tuple[Event, ...]]:
    """Each step on all sides, as near to each other as it goes."""
    pauses = iter(happening.pauses_s)
    events = []
    for step in zip(*(happening.steps(side) for side in sides), strict=True):
        events.append(step)
        time.sleep(next(pauses, 0.0))
    return events


Moment = tuple[float, int, bool]


def errors(guest: Guest, event: Event) -> list[Moment]:
    """Seconds since the event, |error| in ns and whether chronyd called itself synchronised; until the next event."""
    samples = [sample for sample in guest.samples() if sample.sequence == event.sequence]
    if not samples:
        return []
    first = samples[0].counter
    return [(event.line.seconds(first, s.counter), abs(s.offset_ns), s.leap < UNSYNCHRONISED) for s in samples]


def compare(ours: list[Moment], theirs: list[Moment], from_s: float, is_blind: bool) -> Row:
    """Whether, and when, the guest with the daemon was worse than the one without.

    Not compared: errors after an event that left the other clock nearer to the truth, since it was still wrong from
    the event before; lies where the other one had not yet come to call itself synchronised again.
    """
    if not ours or not theirs:
        return {"watched_s": 0.0, "worse_moments": 0, "lied_longer": False}
    is_luck = theirs[0][1] + NOISE_NS < ours[0][1] * (1 - PART)
    end = min(ours[-1][0], theirs[-1][0])
    times = [at for at, _, _ in theirs]

    def allowed(at: float) -> float:
        """The greatest error of the other guest about that time, or our own first, and what is forgiven."""
        if is_blind:
            return ours[0][1] * (1 + PART) + NOISE_NS + at * ASTRAY_PPM * 1000
        first, last = bisect_left(times, at - APART_S), bisect_right(times, at + APART_S)
        return max(error for _, error, _ in theirs[max(0, first - 1) : last]) * (1 + PART) + NOISE_NS

    def lied_s(side: list[Moment]) -> float:
        lies = ((at, until) for (at, error, normal), (until, *_) in pairwise(side) if normal and error > 1_000_000)
        return sum(until - at for at, until in lies if at < end)

    worse = [(at, error, allowed(at)) for at, error, _ in ours if from_s <= at < end and error > allowed(at)]
    lied, lied_without = lied_s(ours), lied_s(theirs)
    return {
        "watched_s": end,
        "luck": is_luck,
        "worse_moments": 0 if is_luck else len(worse),
        "worst_of_them": max(worse, key=lambda moment: moment[1] - moment[2], default=None),
        "over_1ms_while_normal_s": lied,
        "over_1ms_while_normal_without_s": lied_without,
        "lied_longer": theirs[0][2] and not is_luck and lied > lied_without + APART_S,
    }
