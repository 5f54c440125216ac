"""What the guest's clock was worth: the sampler's records against the true time, and figures from that.

True time is what the published pages say: a line in the guest's own counter, exact by definition. The page's sequence
number in each record tells which line was in force. Signs are the project's: offset = truth - system clock.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from tests.guest.page import NANOSECONDS, Line

HEADER = struct.Struct("<8sQQ40x")
RECORD = struct.Struct("<QQQQQQIIIIIBBH")
MAGIC = b"VMSAMPLE"
UNSYNCHRONISED = 3
NO_ANSWER = 255
TAI_MINUS_UTC_NS = 37 * NANOSECONDS


class Sample(NamedTuple):
    """One look at the guest's clock; `utc_ns` is true time, `offset_ns` true time less the clock's.

    `uncertainty_ns` is half the bracket, or 1 where the PTP clock names the counter value. `leap`, `stratum` and
    `root_dispersion_s` are of chronyd's last answer; leap is 255 before the first.
    """

    counter: int
    utc_ns: int
    offset_ns: int
    uncertainty_ns: int
    sequence: int
    leap: int
    stratum: int
    root_dispersion_s: float


class Truth:
    """The true time lines, by the sequence number of the page with which each began."""

    def __init__(self) -> None:
        self.lines: dict[int, Line] = {}

    @property
    def last(self) -> Line:
        return next(reversed(self.lines.values()))

    def declare(self, sequence: int, line: Line) -> None:
        # A restore takes the sequence number back, so one can come twice; the last one declared comes last.
        self.lines.pop(sequence, None)
        self.lines[sequence] = line

    def samples(self, records: bytes) -> list[Sample]:
        """The sampler's records, judged. Left out: those during which the page changed, or without a line."""
        found = []
        for record in RECORD.iter_unpack(records):
            # With the number odd the update is under way: the line before it is in force.
            line = self.lines.get(record[8] & ~1)
            if line and record[8] == record[9]:
                found.append(self._judge(record, line))
        return found

    def _judge(self, record: tuple, line: Line) -> Sample:
        counter, system_ns, pair_counter, pair_system_ns, pair_device_ns = record[:5]
        width, pair_width, sequence, _, root_dispersion, leap, stratum, _ = record[6:]
        uncertainty_ns = round(line.seconds(0, width) * NANOSECONDS / 2)
        counter += width // 2
        if pair_system_ns:
            # While a new host has not published, the PTP clock follows an old line: try all.
            for followed in (line, *reversed(self.lines.values())):
                exact = followed.counter_at(pair_device_ns - TAI_MINUS_UTC_NS)
                if pair_counter <= exact <= pair_counter + pair_width:
                    counter, system_ns, uncertainty_ns = exact, pair_system_ns, 1
                    break
        utc_ns = line.ns(counter)
        return Sample(
            counter, utc_ns, utc_ns - system_ns, uncertainty_ns, sequence, leap, stratum, root_dispersion / 65536
        )


class Reaction(NamedTuple):
    """What followed a disruption, in true seconds since the guest went on. None: not while it was watched."""

    blind_s: float
    "Until the first sample; the last one before it counts as the moment of the disruption."
    watched_s: float
    jump_ns: int
    "The first sample's offset."
    over_1ms_until_s: float | None
    over_10us_until_s: float | None
    over_1us_until_s: float | None
    over_1ms_while_normal_s: float
    "How long in all the clock was off by more than 1 ms while chronyd called itself synchronised."
    over_1us_while_normal_s: float
    unsynchronised_s: float
    "How long in all chronyd said leap 3."
    normal_for_good_s: float | None
    "From when on chronyd called itself synchronised and kept to it."
    worst_after_20ms_ns: int | None
    worst_at_end_ns: int
    "In the last tenth of the time watched."


def react(samples: Sequence[Sample], sequence: int, line: Line) -> Reaction:
    """The figures of the disruption that began with the page `sequence`; seconds are those of `line`.

    Each sample stands for the time since the one before it. Raises ValueError without samples on both sides.
    """
    first = next((i for i, sample in enumerate(samples) if _reached(sample.sequence, sequence)), None)
    if not first:
        raise ValueError(f"no sample before, or none after, the page's sequence number {sequence}")
    moment = samples[first - 1].counter
    after = samples[first:]
    times = [line.seconds(moment, sample.counter) for sample in after]
    spans = [now - before for before, now in zip([0.0, *times], times, strict=False)]

    def until(wrong: list[bool]) -> float | None:
        last = max((i for i, is_wrong in enumerate(wrong) if is_wrong), default=-1)
        if last + 1 == len(wrong):
            return None
        return times[last + 1] if last >= 0 else 0.0

    def over(bound_ns: int) -> list[bool]:
        return [abs(sample.offset_ns) > bound_ns for sample in after]

    def total(chosen: list[bool]) -> float:
        return sum(span for span, is_chosen in zip(spans, chosen, strict=True) if is_chosen)

    normal = [sample.leap < UNSYNCHRONISED for sample in after]
    settled = [abs(sample.offset_ns) for sample, time in zip(after, times, strict=True) if time > 0.02]
    return Reaction(
        blind_s=times[0],
        watched_s=times[-1],
        jump_ns=after[0].offset_ns,
        over_1ms_until_s=until(over(1_000_000)),
        over_10us_until_s=until(over(10_000)),
        over_1us_until_s=until(over(1_000)),
        over_1ms_while_normal_s=total([a and b for a, b in zip(over(1_000_000), normal, strict=True)]),
        over_1us_while_normal_s=total([a and b for a, b in zip(over(1_000), normal, strict=True)]),
        unsynchronised_s=total([sample.leap == UNSYNCHRONISED for sample in after]),
        normal_for_good_s=until([not is_normal for is_normal in normal]),
        worst_after_20ms_ns=max(settled, default=None),
        worst_at_end_ns=max(abs(sample.offset_ns) for sample in after[-max(1, len(after) // 10) :]),
    )


def _reached(sequence: int, wanted: int) -> bool:
    return (sequence - wanted) & 0xFFFFFFFF < 1 << 31
