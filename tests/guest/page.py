"""The vmclock page as a hypervisor writes it, and the time line that it stands for."""

from __future__ import annotations

import dataclasses
import struct
from typing import NamedTuple, Protocol

LAYOUT = struct.Struct("<IIHBBIQQ2xBBhBBQQQQQQQQQ")
SEQ_COUNT = struct.Struct("<I")
SEQ_OFFSET = 0x0C
BODY_OFFSET = 0x10

MAGIC = 0x4B4C4356
COUNTER_TSC = 1
COUNTER_NONE = 0xFF
UTC, TAI, MONOTONIC = 0, 1, 2
UNKNOWN, INITIALIZING, SYNCHRONIZED, FREERUNNING, UNRELIABLE = range(5)
TAI_OFFSET_VALID = 1 << 0
PERIOD_MAXERROR_VALID = 1 << 4
TIME_ESTERROR_VALID = 1 << 5
TIME_MAXERROR_VALID = 1 << 6
VM_GEN_COUNTER_PRESENT = 1 << 8
NOTIFICATION_PRESENT = 1 << 9

SECOND = 1 << 64  # the unit of time here: 2^-64 s
NANOSECONDS = 1_000_000_000


class Line(NamedTuple):
    """True UTC as a function of the guest's counter.

    `utc` (in 2^-64 s since 1970) at `counter`, and from there `period` (in 2^-(64+shift) s) a tick.
    """

    counter: int
    utc: int
    period: int
    shift: int

    @classmethod
    def through(cls, counter: int, utc_ns: int, frequency_hz: int) -> Line:
        """The line through a point. The shift leaves the period all of its 64 bits."""
        shift = frequency_hz.bit_length() - 1
        return cls(counter, utc_ns * SECOND // NANOSECONDS, (SECOND << shift) // frequency_hz, shift)

    def at(self, counter: int) -> int:
        """UTC in 2^-64 s."""
        return self.utc + ((counter - self.counter) * self.period >> self.shift)

    def ns(self, counter: int) -> int:
        """UTC in nanoseconds, rounded."""
        return (self.at(counter) * NANOSECONDS + SECOND // 2) // SECOND

    def counter_at(self, utc_ns: int) -> int:
        """The counter's value at a moment of UTC, rounded: the inverse of `ns`."""
        elapsed = utc_ns * SECOND // NANOSECONDS - self.utc
        return self.counter + ((elapsed << self.shift) + self.period // 2) // self.period

    def seconds(self, first: int, last: int) -> float:
        """True seconds between two counter values."""
        return ((last - first) * self.period >> self.shift) / SECOND

    def moved(self, counter: int, lost_s: float = 0.0, frequency_ppm: float = 0.0) -> Line:
        """The line after a migration at `counter`: `lost_s` ahead, and gaining `frequency_ppm` on this one.

        A clock that was right until then falls behind by both: they have the project's signs.
        """
        lost = round(lost_s * NANOSECONDS) * SECOND // NANOSECONDS
        period = self.period + self.period * round(frequency_ppm * 1e6) // 10**12
        return Line(counter, self.at(counter) + lost, period, self.shift)


@dataclasses.dataclass(frozen=True)
class Page:
    """The page's fields, by their names in the ABI."""

    magic: int = MAGIC
    size: int = 4096
    version: int = 1
    counter_id: int = COUNTER_NONE
    time_type: int = UTC
    seq_count: int = 0
    disruption_marker: int = 0
    flags: int = 0
    clock_status: int = UNKNOWN
    leap_second_smearing_hint: int = 0
    tai_offset_sec: int = 0
    leap_indicator: int = 0
    counter_period_shift: int = 0
    counter_value: int = 0
    counter_period_frac_sec: int = 0
    counter_period_esterror_rate_frac_sec: int = 0
    counter_period_maxerror_rate_frac_sec: int = 0
    time_sec: int = 0
    time_frac_sec: int = 0
    time_esterror_nanosec: int = 0
    time_maxerror_nanosec: int = 0
    vm_generation_counter: int = 0

    @classmethod
    def unpack(cls, content: bytes) -> Page:
        return cls(*LAYOUT.unpack_from(content))

    def pack(self) -> bytes:
        return LAYOUT.pack(*dataclasses.astuple(self))

    def telling(self, line: Line, tai_offset_sec: int = -37) -> Page:
        """This page with a time line: TAI, synchronized, within 1 µs, surely within 10 µs."""
        seconds, fraction = divmod(line.utc - tai_offset_sec * SECOND, SECOND)
        return dataclasses.replace(
            self,
            counter_id=COUNTER_TSC,
            time_type=TAI,
            flags=self.flags | TAI_OFFSET_VALID | TIME_ESTERROR_VALID | TIME_MAXERROR_VALID,
            clock_status=SYNCHRONIZED,
            tai_offset_sec=tai_offset_sec,
            counter_period_shift=line.shift,
            counter_value=line.counter,
            counter_period_frac_sec=line.period,
            time_sec=seconds,
            time_frac_sec=fraction,
            time_esterror_nanosec=1_000,
            time_maxerror_nanosec=10_000,
        )


class Memory(Protocol):
    """Where a page lies: machine.Machine is one."""

    def read_page(self, size: int) -> bytes: ...

    def write_page(self, offset: int, content: bytes) -> None: ...


def read(memory: Memory) -> Page:
    """The page as it is. Nobody but QEMU (restoring) and this module writes it, so no sequence lock is needed."""
    return Page.unpack(memory.read_page(LAYOUT.size))


def write(memory: Memory, page: Page) -> int:
    """Publishes a page under the sequence lock, with the next sequence number, which is returned."""
    sequence = read(memory).seq_count & ~1
    content = page.pack()
    write_sequence(memory, sequence + 1)
    memory.write_page(0, content[:SEQ_OFFSET])
    memory.write_page(BODY_OFFSET, content[BODY_OFFSET:])
    return write_sequence(memory, sequence + 2)


def write_sequence(memory: Memory, sequence: int) -> int:
    """The sequence number alone: left odd, a writer that died."""
    sequence &= 0xFFFFFFFF
    memory.write_page(SEQ_OFFSET, SEQ_COUNT.pack(sequence))
    return sequence
