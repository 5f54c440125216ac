"""Plays the hypervisor on a plain file: for demonstrations, drills and tests.

True time is the system clock's plus an offset, drifting from it by a frequency from the moment at which that
frequency was set.  The page is brought up to date as a hypervisor would, and disrupted on command.
"""

from __future__ import annotations

import os
import select
import sys
import time

from .errors import RefclockError, UsageError, from_os
from .hypervisor import PageWriter
from .model import (
    CLOCK_STATUSES,
    COUNTER_NONE,
    FLAGS,
    LEAPS,
    MAGIC,
    TAI_OFFSET_VALID,
    TIME_ESTERROR_VALID,
    TIME_MAXERROR_VALID,
    TIME_TAI,
    TIME_UTC,
    UNKNOWN,
    VERSION,
    VM_GEN_COUNTER_PRESENT,
    encode,
)
from .page import LOCAL_COUNTER_ID, counter_period_ns, pair

NSEC_PER_SEC = 1_000_000_000
READINGS = 16
PAGE_SIZE = 4096

#: How long the counter is compared with the system clock before the first page, and at the most.
FIRST_BASELINE_NS = 200_000_000
LONGEST_BASELINE_NS = 60 * NSEC_PER_SEC
#: A system clock this far from where its rate says was stepped: the comparison starts over.
STEPPED_NS = 20_000

#: What true time may be told to be: the page's fields hold it in any case.
MOST_OFFSET_S = 1e9
MOST_FREQUENCY_PPM = 1e5
LONGEST_STALL_S = 3600


class CounterRate:
    """The counter's period against the system clock, over an ever longer baseline, until the clock steps."""

    def __init__(self) -> None:
        self.period_ns = counter_period_ns()
        self._counter, self._system_ns, _ = pair(READINGS, self.period_ns)
        while self.pair()[1] - self._system_ns < FIRST_BASELINE_NS:
            time.sleep(0.01)

    def pair(self) -> tuple[int, int]:
        """The counter and the system clock at it, now; brings the period up to date."""
        counter, system_ns, _ = pair(READINGS, self.period_ns)
        elapsed_ns = system_ns - self._system_ns
        expected_ns = (counter - self._counter) * self.period_ns
        stepped = elapsed_ns < 0 or (elapsed_ns > 2 * FIRST_BASELINE_NS and abs(elapsed_ns - expected_ns) > STEPPED_NS)
        if stepped:
            self._counter, self._system_ns = counter, system_ns
        elif elapsed_ns >= FIRST_BASELINE_NS:
            self.period_ns = elapsed_ns / (counter - self._counter)
        if elapsed_ns > LONGEST_BASELINE_NS:
            self._counter, self._system_ns = counter, system_ns
        return counter, system_ns


class Simulation:
    """The page's fields, and true time.  ``publish`` writes them as they are now."""

    def __init__(
        self,
        path: str,
        *,
        offset_s: float = 0.0,
        frequency_ppm: float = 0.0,
        time_type: int = TIME_TAI,
        status: int = 2,
        leap: int = 0,
        tai_offset_sec: int = -37,
        maxerror_ns: int = 10_000,
        esterror_ns: int = 1_000,
        no_time: bool = False,
    ) -> None:
        self.fields = {
            "magic": MAGIC,
            "size": PAGE_SIZE,
            "version": VERSION,
            "counter_id": COUNTER_NONE if no_time else LOCAL_COUNTER_ID,
            "time_type": time_type,
            "disruption_marker": 1,
            "flags": VM_GEN_COUNTER_PRESENT,
            "clock_status": UNKNOWN if no_time else status,
            "vm_generation_counter": 1,
        }
        if not no_time:
            self.fields["flags"] |= TAI_OFFSET_VALID | TIME_ESTERROR_VALID | TIME_MAXERROR_VALID
            self.fields.update(
                tai_offset_sec=tai_offset_sec,
                leap_indicator=leap,
                time_esterror_nanosec=esterror_ns,
                time_maxerror_nanosec=maxerror_ns,
            )
        self._tells_time = not no_time
        _check_truth(offset_s, frequency_ppm)
        try:
            encode(self.fields)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self._rate = CounterRate()
        self._set_truth(offset_s, frequency_ppm)
        self._writer = _new_page(path, self._encode())

    def _set_truth(self, offset_s: float | None, frequency_ppm: float | None) -> None:
        _check_truth(offset_s, frequency_ppm)
        _, system_ns = self._rate.pair()
        self._offset_ns = self._offset_at(system_ns) if offset_s is None else round(offset_s * NSEC_PER_SEC)
        if frequency_ppm is not None:
            self._frequency_ppm = frequency_ppm
        self._since_ns = system_ns

    def _offset_at(self, system_ns: int) -> int:
        return self._offset_ns + round((system_ns - self._since_ns) * self._frequency_ppm * 1e-6)

    def _encode(self) -> bytes:
        if self._tells_time:
            counter, system_ns = self._rate.pair()
            page_ns = system_ns + self._offset_at(system_ns) + self._epoch_ns()
            period_s = self._rate.period_ns * (1 + self._frequency_ppm * 1e-6) / NSEC_PER_SEC
            # The most precise period that a 64-bit field can say: its highest bit set.
            shift = 0
            while period_s * 2.0 ** (65 + shift) < 2.0**64:
                shift += 1
            self.fields["counter_value"] = counter
            self.fields["counter_period_shift"] = shift
            self.fields["counter_period_frac_sec"] = int(period_s * 2.0 ** (64 + shift))
            self.fields["time_sec"] = page_ns // NSEC_PER_SEC
            self.fields["time_frac_sec"] = (page_ns % NSEC_PER_SEC << 64) // NSEC_PER_SEC
        return encode(self.fields)

    def _epoch_ns(self) -> int:
        """What the page's own time is ahead of UTC."""
        if self.fields["time_type"] == TIME_UTC:
            return 0
        if self.fields["time_type"] == TIME_TAI:
            return abs(self.fields["tai_offset_sec"]) * NSEC_PER_SEC
        return time.clock_gettime_ns(time.CLOCK_MONOTONIC) - time.clock_gettime_ns(time.CLOCK_REALTIME)

    def publish(self) -> None:
        """One update of the page, with a new reference time."""
        self._writer.publish(self._encode())

    def disrupt(
        self, offset_s: float | None = None, frequency_ppm: float | None = None, generation: bool = False
    ) -> None:
        """A new marker; in the same update, true time set as given."""
        self._set_truth(offset_s, frequency_ppm)
        self._count("disruption_marker")
        if generation:
            self._count("vm_generation_counter")
        self.publish()

    def generation(self) -> None:
        """The generation counter alone moves: a copy on the same host."""
        self._count("vm_generation_counter")
        self.publish()

    def _count(self, field: str) -> None:
        self.fields[field] = (self.fields[field] + 1) % 2**64

    def begin_stall(self) -> None:
        """The sequence turns odd, as if the hypervisor had died while writing."""
        self._writer.begin_update()

    def end_stall(self) -> None:
        """The update comes to its end after all."""
        self._writer.end_update()


def _check_truth(offset_s: float | None, frequency_ppm: float | None) -> None:
    if offset_s is not None and not abs(offset_s) <= MOST_OFFSET_S:
        raise UsageError(f"offset {offset_s:g}: seconds, at most {MOST_OFFSET_S:g} either way")
    if frequency_ppm is not None and not abs(frequency_ppm) <= MOST_FREQUENCY_PPM:
        raise UsageError(f"frequency {frequency_ppm:g}: ppm, at most {MOST_FREQUENCY_PPM:g} either way")


def _new_page(path: str, raw: bytes) -> PageWriter:
    """A page at ``path``, whole from the moment at which it is there.  Replaces a page, and nothing else."""
    try:
        with open(path, "rb") as existing:
            start = existing.read(4)
            if start and start != MAGIC.to_bytes(4, "little"):
                raise UsageError(f"{path} holds something else than a page; name a new file")
    except FileNotFoundError:
        pass
    except OSError as error:
        raise from_os(error, f"cannot use {path}") from None
    hidden = f"{path}.{os.getpid()}"
    try:
        writer = PageWriter(hidden)
        try:
            writer.publish(raw)
            os.rename(hidden, path)
        except BaseException:
            os.unlink(hidden)
            raise
    except OSError as error:
        raise from_os(error, f"cannot write {path}") from None
    return writer


class Commands:
    """The simulator's command lines.  ``answer`` returns what to print; ``done`` is set by ``quit``."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.stalled_until = 0.0
        self.done = False

    def answer(self, line: str) -> str:
        words = line.split()
        if not words:
            return "error: no command"
        command = getattr(self, f"_do_{words[0]}", None)
        if command is None:
            known = " ".join(sorted(name[4:] for name in dir(self) if name.startswith("_do_")))
            return f"error: no command {words[0]!r}; there are: {known}"
        try:
            command(*words[1:])
        except TypeError:
            return f"error: {words[0]} takes other words"
        except (ValueError, RefclockError) as error:
            return f"error: {error}"
        return "ok"

    def _do_disrupt(self, *words: str) -> None:
        numbers: dict[str, float] = {}
        generation = False
        for word in words:
            name, is_setting, value = word.partition("=")
            if word == "generation":
                generation = True
            elif is_setting and name in ("offset", "frequency"):
                numbers[name] = float(value)
            else:
                raise ValueError(f"disrupt does not know {word!r}; offset=S, frequency=PPM, generation")
        self._simulation.disrupt(numbers.get("offset"), numbers.get("frequency"), generation)

    def _do_generation(self) -> None:
        self._simulation.generation()

    def _do_status(self, name: str) -> None:
        self._set("clock_status", number_of(name, CLOCK_STATUSES, "status"))

    def _do_leap(self, name: str) -> None:
        self._set("leap_indicator", number_of(name, LEAPS, "leap"))

    def _do_tai(self, number: str) -> None:
        self._set("tai_offset_sec", int(number))

    def _do_flags(self, *names: str) -> None:
        flags = self._simulation.fields["flags"]
        for name in names:
            bit = 1 << number_of(name.lstrip("+-"), FLAGS, "flag")
            flags = flags & ~bit if name.startswith("-") else flags | bit
        self._set("flags", flags)

    def _do_stall(self, seconds: str) -> None:
        number = float(seconds)
        if not 0 <= number <= LONGEST_STALL_S:
            raise ValueError(f"stall {seconds}: seconds, from 0 to {LONGEST_STALL_S}")
        self.stalled_until = time.monotonic() + number
        self._simulation.begin_stall()

    def _do_quit(self) -> None:
        self.done = True

    def _set(self, field: str, value: int) -> None:
        before = self._simulation.fields[field]
        self._simulation.fields[field] = value
        try:
            self._simulation.publish()
        except ValueError:
            self._simulation.fields[field] = before
            raise


def number_of(name: str, names: tuple[str, ...], what: str) -> int:
    """The number of a contract's word, or of ``what-N``; UsageError otherwise."""
    if name in names:
        return names.index(name)
    if name.startswith(f"{what}-") and name[len(what) + 1 :].isdigit():
        return int(name[len(what) + 1 :])
    raise UsageError(f"{what} {name!r}: one of {', '.join(names)}")


def play(simulation: Simulation, update_s: float, ready: str) -> None:
    """Keeps the page up to date and answers commands until ``quit`` or SIGTERM.

    The end of the input ends the commands only: a simulator started with no input at all goes on.
    """
    commands = Commands(simulation)
    print(ready, flush=True)
    pending = b""
    listening = True
    next_update = time.monotonic() + update_s
    while not commands.done:
        now = time.monotonic()
        stalled = now < commands.stalled_until
        if commands.stalled_until and not stalled:
            simulation.end_stall()
            commands.stalled_until = 0.0
        if not stalled and b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            print(commands.answer(line.decode(errors="replace")), flush=True)
            continue
        if not stalled and now >= next_update:
            simulation.publish()
            next_update = max(next_update + update_s, now)
            continue
        timeout = (commands.stalled_until if stalled else next_update) - now
        if select.select([sys.stdin] if listening else [], [], [], max(timeout, 0.0))[0]:
            received = os.read(sys.stdin.fileno(), 65536)
            pending += received
            listening = bool(received)
