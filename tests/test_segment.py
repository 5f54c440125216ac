"""NTP shared memory: what a reader sees in it at every moment, and a segment that is another's, or is taken away."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refclock.page import Sample
from refclock.segment import Shm
from tests.harness import environment
from tests.test_sock import Lines

KEY = 0x4E545030
SIZE = 96
NOW_NS = 1_767_225_600_123_456_789
IPC_CREAT, IPC_EXCL, IPC_RMID, IPC_STAT = 0o1000, 0o2000, 0, 2

libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.shmdt.argtypes = [ctypes.c_void_p]


class State(NamedTuple):
    """The segment by its layout."""

    mode: int
    count: int
    clock_sec: int
    clock_usec: int
    receive_sec: int
    receive_usec: int
    leap: int
    precision: int
    nsamples: int
    valid: int
    clock_nsec: int
    receive_nsec: int


LAYOUT = struct.Struct("<iiqi4xqiiiiiII36x")


def find(unit: int, size: int = 0, flags: int = 0) -> int:
    """The identifier of a unit's segment, -1 if there is none."""
    return int(libc.shmget(KEY + unit, size, flags))


def remove(unit: int) -> None:
    """As ipcrm does: those who have it attached keep it."""
    with contextlib.suppress(OSError):
        libc.shmctl(find(unit), IPC_RMID, None)


def owner_and_mode(unit: int) -> tuple[int, int]:
    rows = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
    (row,) = [row for row in rows if int(row[0]) & 0xFFFFFFFF == KEY + unit]
    return int(row[7]), int(row[2], 8) & 0o777


class View:
    """A reader, or another writer, of the memory itself."""

    def __init__(self, unit: int, size: int = SIZE, flags: int = 0) -> None:
        self.identifier = find(unit, size, flags)
        assert self.identifier >= 0, os.strerror(ctypes.get_errno())
        self._address = libc.shmat(self.identifier, None, 0)
        self.memory = (ctypes.c_char * size).from_address(self._address)

    def state(self) -> State:
        return State(*LAYOUT.unpack(bytes(self.memory)[:SIZE]))

    def fill(self, content: bytes) -> None:
        self.memory[: len(content)] = content  # type: ignore[assignment]

    def close(self) -> None:
        libc.shmdt(self._address)


@pytest.fixture
def unit() -> Iterator[int]:
    """A unit that nobody uses; its segment goes away after the test."""
    free = next(number for number in range(100 + os.getpid() % 100, 256) if find(number) < 0)
    yield free
    remove(free)


def sample(system_ns: int = NOW_NS, offset_ns: int = 0, leap: int = 0, uncertainty_ns: int = 100) -> Sample:
    return Sample(system_ns=system_ns, reference_ns=system_ns + offset_ns, leap=leap, uncertainty_ns=uncertainty_ns)


def is_no_time(state: State) -> bool:
    """Neither to be read nor in sync."""
    return (state.valid, state.leap) == (0, 3)


# ---- What a reader sees -------------------------------------------------------------------------------------


def test_from_the_beginning_to_the_end(unit: int) -> None:
    lines = Lines()
    assert find(unit) < 0
    sink = Shm(unit, 0o600, lines)
    view = View(unit)
    began = view.state()
    assert is_no_time(began) and began.mode == 1

    sink.put(sample(offset_ns=1_000_000_001, leap=1))
    fed = view.state()
    assert fed == State(
        mode=1,
        count=began.count + 2,
        clock_sec=1_767_225_601,
        clock_usec=123_456,
        clock_nsec=123_456_790,
        receive_sec=1_767_225_600,
        receive_usec=123_456,
        receive_nsec=123_456_789,
        leap=1,
        precision=-23,
        nsamples=0,
        valid=1,
    )
    sink.invalidate()
    assert is_no_time(view.state()) and view.state().count == began.count + 4
    sink.put(sample())
    assert (view.state().valid, view.state().leap) == (1, 0)
    sink.close()
    assert is_no_time(view.state())
    assert find(unit) == view.identifier, "it must not be removed"
    view.close()
    assert sink.status() == {"name": str(unit), "type": "shm", "ok": True, "sent": 2, "dropped": 0, "error": None}
    assert lines == [("info", f"shm {unit}: samples arrive")]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**62), st.integers(-(10**18), 10**18), st.sampled_from([0, 1, 2]))
def test_every_number_is_exact(unit: int, system_ns: int, offset_ns: int, leap: int) -> None:
    """ntpd ignores nanoseconds whose microseconds are not the truncated ones."""
    sink = Shm(unit, 0o600, Lines())
    view = View(unit)
    sink.put(sample(system_ns, offset_ns, leap))
    state = view.state()
    view.close()
    assert state.clock_sec * 10**9 + state.clock_nsec == system_ns + offset_ns
    assert state.receive_sec * 10**9 + state.receive_nsec == system_ns
    assert 0 <= state.clock_nsec < 10**9 and 0 <= state.receive_nsec < 10**9
    assert (state.clock_usec, state.receive_usec) == (state.clock_nsec // 1000, state.receive_nsec // 1000)
    assert (state.leap, state.valid, state.mode) == (leap, 1, 1)


@pytest.mark.parametrize("uncertainty_ns", [0, 1, 2, 99, 1000, 10_000, 10**9, 10**12])
def test_the_precision_is_the_pairs(unit: int, uncertainty_ns: int) -> None:
    """log2 of seconds: never finer than the pair is certain, never more than twice as coarse."""
    sink = Shm(unit, 0o600, Lines())
    sink.put(sample(uncertainty_ns=uncertainty_ns))
    view = View(unit)
    precision = view.state().precision
    view.close()
    assert -30 <= precision <= 0
    if 2 <= uncertainty_ns <= 10**9:
        assert uncertainty_ns * 1e-9 <= 2.0**precision <= 2 * uncertainty_ns * 1e-9


def test_a_reader_that_takes_the_sample(unit: int) -> None:
    """ntpd clears `valid`: the next sample sets it again."""
    sink = Shm(unit, 0o600, Lines())
    view = View(unit)
    for _ in range(3):
        sink.put(sample())
        assert view.state().valid == 1
        view.memory[48:52] = bytes(4)  # type: ignore[assignment]
    view.close()


def test_what_an_old_writer_left_is_gone_at_once(unit: int) -> None:
    """A daemon that was killed leaves a valid sample; the next one's first act is to take it back."""
    view = View(unit, flags=IPC_CREAT | 0o600)
    view.fill(LAYOUT.pack(1, 41, 1, 2, 3, 4, 0, -20, 0, 1, 5, 6))
    sink = Shm(unit, 0o600, Lines())
    assert is_no_time(view.state())
    sink.put(sample())
    assert view.state().receive_sec == NOW_NS // 10**9
    view.close()


def test_the_count_wraps(unit: int) -> None:
    view = View(unit, flags=IPC_CREAT | 0o600)
    view.fill(LAYOUT.pack(1, 2**31 - 3, *[0] * 10))
    sink = Shm(unit, 0o600, Lines())
    sink.put(sample())
    assert view.state().count == -(2**31) + 1
    view.close()


@pytest.mark.parametrize("reference_ns", [2**63, -(2**63) - 1, 2**64 * 10**9])
def test_a_time_that_the_segment_cannot_say(unit: int, reference_ns: int) -> None:
    sink = Shm(unit, 0o600, Lines())
    view = View(unit)
    sink.put(Sample(system_ns=NOW_NS, reference_ns=reference_ns))
    assert (sink.sent, sink.dropped) == (0, 1)
    assert sink.error is not None and "beyond" in sink.error
    assert is_no_time(view.state())
    sink.put(sample())
    assert sink.error is None and view.state().valid == 1
    view.close()


def test_units_are_segments_of_their_own(unit: int) -> None:
    first = Shm(unit, 0o600, Lines())
    other = next(number for number in range(255, 100, -1) if find(number) < 0)
    try:
        second = Shm(other, 0o600, Lines())
        second.put(sample())
        view = View(unit)
        assert is_no_time(view.state())
        first.put(sample())
        assert view.state().valid == 1
        view.close()
        assert find(unit) != find(other)
    finally:
        remove(other)


# ---- Whose it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("permissions", [0o600, 0o640, 0o666])
def test_the_permissions_of_a_new_segment(unit: int, permissions: int) -> None:
    lines = Lines()
    before = os.umask(0o077)
    try:
        Shm(unit, permissions, lines)
    finally:
        os.umask(before)
    assert owner_and_mode(unit) == (os.geteuid(), permissions)
    assert find(unit, SIZE) >= 0 and find(unit, SIZE + 1) < 0
    assert lines == []


def test_the_permissions_of_a_segment_that_is_there_are_left_alone(unit: int) -> None:
    """Others may write to it: that is said."""
    view = View(unit, flags=IPC_CREAT | 0o666)
    lines = Lines()
    Shm(unit, 0o600, lines).put(sample())
    assert view.state().valid == 1
    assert owner_and_mode(unit)[1] == 0o666
    view.close()
    assert lines.levels() == ["warning", "info"]
    assert "0o666" in lines[0][1]


AS_NOBODY = """
import sys
from refclock.page import Sample
from refclock.segment import Shm
sink = Shm(int(sys.argv[1]), 0o600, lambda level, text: print(level, text))
for _ in range(2):
    sink.put(Sample(system_ns=10**18, reference_ns=10**18))
print(sink.sent, sink.dropped)
"""


def as_nobody(nobody: tuple[str, ...], unit: int) -> list[str]:
    command = [*nobody, sys.executable, "-c", AS_NOBODY, str(unit)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.splitlines()


def test_a_segment_of_another_user_that_we_may_not_use(unit: int, nobody: tuple[str, ...]) -> None:
    view = View(unit, flags=IPC_CREAT | 0o600)
    warning, counts = as_nobody(nobody, unit)
    assert warning.startswith(f"warning shm {unit}: Permission denied; unit {unit} belongs to another user")
    assert counts == "0 2"
    assert view.state() == State(*[0] * 12)
    view.close()


def test_a_segment_of_another_user_that_we_may_use(unit: int, nobody: tuple[str, ...]) -> None:
    """Root may write to anyone's; who made it can write to it too, which is said."""
    assert as_nobody(nobody, unit) == [f"info shm {unit}: samples arrive", "2 0"]
    assert owner_and_mode(unit)[0] == 65534
    lines = Lines()
    Shm(unit, 0o600, lines).put(sample())
    assert lines.levels() == ["warning", "info"]
    assert "65534" in lines[0][1]


@pytest.mark.parametrize("size", [1, 40, 95])
def test_a_smaller_segment(unit: int, size: int) -> None:
    """A 32-bit program's, for example: not written to, and said with the cure; once it is gone, all is well."""
    lines = Lines()
    view = View(unit, size=size, flags=IPC_CREAT | 0o600)
    sink = Shm(unit, 0o600, lines)
    for _ in range(3):
        sink.put(sample())
    assert bytes(view.memory) == bytes(size)
    assert (sink.sent, sink.dropped) == (0, 3)
    assert sink.error is not None and f"ipcrm -M {KEY + unit:#x}" in sink.error
    assert lines.levels() == ["warning"]
    view.close()
    remove(unit)
    sink.put(sample())
    assert (sink.sent, sink.dropped, sink.error) == (1, 3, None)
    assert lines.levels() == ["warning", "info"]


def test_a_larger_segment(unit: int) -> None:
    view = View(unit, size=4096, flags=IPC_CREAT | 0o600)
    Shm(unit, 0o600, Lines()).put(sample())
    assert view.state().valid == 1
    assert bytes(view.memory)[SIZE:] == bytes(4000)
    view.close()


# ---- It is taken away ---------------------------------------------------------------------------------------


def test_removed_under_us(unit: int) -> None:
    """ipcrm: readers that come now need another one; it is made within 64 samples, and told no lies meanwhile."""
    lines = Lines()
    sink = Shm(unit, 0o640, lines)
    sink.put(sample())
    remove(unit)
    assert find(unit) < 0
    for _ in range(64):
        sink.put(sample())
    assert owner_and_mode(unit) == (os.geteuid(), 0o640)
    view = View(unit)
    assert view.state().valid == 1
    assert (sink.sent, sink.dropped, sink.error) == (65, 0, None)
    view.close()


def test_removed_under_us_and_made_by_another(unit: int) -> None:
    lines = Lines()
    sink = Shm(unit, 0o600, lines)
    sink.put(sample())
    remove(unit)
    view = View(unit, flags=IPC_CREAT | IPC_EXCL | 0o666)
    for _ in range(64):
        sink.put(sample())
    assert view.state().valid == 1
    assert find(unit) == view.identifier
    assert lines.levels() == ["info", "warning"]
    view.close()


def test_removed_under_us_and_made_smaller_by_another(unit: int) -> None:
    sink = Shm(unit, 0o600, Lines())
    sink.put(sample())
    remove(unit)
    view = View(unit, size=8, flags=IPC_CREAT | 0o666)
    for _ in range(100):
        sink.put(sample())
    assert sink.error is not None and sink.dropped >= 36
    assert bytes(view.memory) == bytes(8)
    sink.invalidate()
    sink.close()
    view.close()


def test_nothing_is_left_attached(unit: int) -> None:
    def attached() -> int:
        return Path("/proc/self/maps").read_text().count("/SYSV4e54")

    before = attached()
    sinks = [Shm(unit, 0o600, Lines()) for _ in range(10)]
    assert attached() == before + 10
    for sink in sinks:
        sink.close()
    assert attached() == before
    sink = Shm(unit, 0o600, Lines())
    for _ in range(5):
        remove(unit)
        for _ in range(64):
            sink.put(sample())
    assert attached() == before + 1


# ---- While it is written ------------------------------------------------------------------------------------


def figures(command: list[str], timeout_s: float = 110) -> dict[str, int]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    print(done.stdout, end="")
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    return {name: int(value) for name, value in re.findall(r"(\w+) (\d+)", done.stdout)}


def test_no_reader_takes_half_a_sample_from_the_header(native: Callable[..., Path]) -> None:
    seen = figures([str(native("segment_torture")), "10000000"])
    assert seen["torn"] == 0 and seen["distinct"] >= 2000, seen


def test_no_reader_takes_half_a_sample_from_the_sink(native: Callable[..., Path], unit: int) -> None:
    """The same reader on the segment that this package's own module writes, as fast as Python can."""
    code = """
import sys
from refclock.segment import Segment
segment = Segment(int(sys.argv[1]), 0o600)
n = 0
while True:
    n += 1
    reference_ns = (3 * n + 5) * 10**9 + n * 104729 % 10**9
    segment.put(reference_ns, n * 10**9 + n * 7919 % 10**9, n % 3, -(n % 31))
    if n == 1:
        print("ready", flush=True)
"""
    command = [sys.executable, "-c", code, str(unit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"ready\n"
            seen = figures([str(native("segment_torture")), "5000000", hex(KEY + unit)])
        finally:
            writer.kill()
    assert seen["torn"] == 0 and seen["distinct"] >= 2000, seen
