"""chronyd's SOCK: the datagram to the byte, and a listener that comes, goes, is deaf or is none."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from refclock.errors import ConfigError
from refclock.page import Sample
from refclock.sock import Sock, encode
from tests.harness import SockListener, environment

NOW_NS = 1_767_225_600_123_456_789


def sample(offset_ns: int = 0, system_ns: int = NOW_NS, leap: int = 0) -> Sample:
    return Sample(system_ns=system_ns, reference_ns=system_ns + offset_ns, leap=leap)


class Lines(list[tuple[str, str]]):
    """A log."""

    def __call__(self, level: str, text: str) -> None:
        assert "\n" not in text
        self.append((level, text))

    def levels(self) -> list[str]:
        return [level for level, _ in self]


# ---- The datagram -------------------------------------------------------------------------------------------


def test_the_bytes() -> None:
    expected = (
        (1_767_225_600).to_bytes(8, "little")
        + (123_456).to_bytes(8, "little")
        + struct.pack("<d", 0.000000321)
        + bytes(4)
        + b"\2\0\0\0"
        + bytes(4)
        + b"KCOS"
    )
    assert encode(sample(321, leap=2)) == expected


@given(st.integers(-(2**62), 2**62))
def test_the_time_is_truncated_never_rounded(system_ns: int) -> None:
    """chronyd drops a sample from its future."""
    seconds, microseconds = struct.unpack_from("<qq", encode(sample(system_ns=system_ns)))
    assert 0 <= microseconds < 10**6
    assert 0 <= system_ns - (seconds * 10**9 + microseconds * 1000) < 1000


@given(st.integers(-(10**15), 10**15))
def test_the_offset_keeps_its_nanoseconds(offset_ns: int) -> None:
    """It is that of the exact moment, not of the truncated one."""
    (offset,) = struct.unpack_from("<d", encode(sample(offset_ns)), 16)
    assert round(offset * 1e9) == offset_ns
    assert offset == offset_ns / 1e9


@pytest.mark.parametrize("leap", [0, 1, 2])
def test_the_leap(leap: int) -> None:
    assert struct.unpack_from("<iiii", encode(sample(leap=leap)), 24) == (0, leap, 0, 0x534F434B)


# ---- The listener -------------------------------------------------------------------------------------------


@pytest.fixture
def path(short_path: Path) -> Path:
    return short_path / "sock"


def test_samples_arrive(path: Path) -> None:
    lines = Lines()
    sink = Sock(str(path), lines)
    assert sink.status() == {
        "name": str(path),
        "type": "sock",
        "ok": False,
        "sent": 0,
        "dropped": 0,
        "error": None,
    }
    with SockListener(path) as listener:
        for offset_ns in range(5):
            sink.put(sample(offset_ns))
            assert listener.raw == [] or len(listener.raw) == offset_ns
            listener.receive()
        assert [struct.unpack_from("<d", raw, 16)[0] for raw in listener.raw] == [n / 1e9 for n in range(5)]
    assert sink.status() | {"name": ""} == {
        "name": "",
        "type": "sock",
        "ok": True,
        "sent": 5,
        "dropped": 0,
        "error": None,
    }
    assert lines == [("info", f"sock {path}: samples arrive")]


def test_chronyd_comes_goes_and_comes_back(path: Path) -> None:
    """Each change is said once, however many samples it lasts."""
    lines = Lines()
    sink = Sock(str(path), lines)

    arrivals = []

    def put_three() -> None:
        arrivals.append([sink.put(sample()) for _ in range(3)])

    put_three()
    assert (sink.sent, sink.dropped) == (0, 3)
    assert sink.error is not None and "No such file" in sink.error and f"refclock SOCK {path}" in sink.error

    listener = SockListener(path)
    put_three()
    assert len(listener.receive()) == 3
    assert (sink.sent, sink.dropped, sink.error) == (3, 3, None)

    listener.close(unlink=False)  # killed
    put_three()
    assert sink.error is not None and "Connection refused" in sink.error
    path.unlink()

    with SockListener(path) as listener:  # restarted
        put_three()
        assert len(listener.receive()) == 3
    put_three()
    with SockListener(path) as listener:
        put_three()
        assert len(listener.receive()) == 3
    assert (sink.sent, sink.dropped) == (9, 9)
    nothing, something = [False] * 3, [True, False, False]
    assert arrivals == [nothing, something, nothing, something, nothing, something]
    assert lines.levels() == ["warning", "info", "warning", "info", "warning", "info"]
    assert [text.rpartition(": ")[2] for level, text in lines if level == "info"] == [
        "samples arrive",
        "samples arrive again",
        "samples arrive again",
    ]


def test_a_restart_between_two_samples_costs_none(path: Path) -> None:
    lines = Lines()
    sink = Sock(str(path), lines)
    for _ in range(4):
        with SockListener(path) as listener:
            sink.put(sample())
            assert len(listener.receive()) == 1
    assert (sink.sent, sink.dropped, len(lines)) == (4, 0, 1)


def test_a_chronyd_that_does_not_read_holds_up_nothing(path: Path) -> None:
    lines = Lines()
    sink = Sock(str(path), lines)
    with SockListener(path) as listener:
        began = time.monotonic()
        for number in range(500):
            sink.put(sample(number))
        assert time.monotonic() - began < 1
        assert sink.error is not None and "does not read" in sink.error
        queued = sink.sent
        assert 0 < queued < 500 and sink.dropped == 500 - queued
        assert len(listener.receive()) == queued
        sink.put(sample())
        assert sink.error is None
        assert len(listener.receive()) == 1
    assert lines.levels() == ["info", "warning", "info"]


def test_another_kind_of_socket(path: Path) -> None:
    lines = Lines()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        stream.bind(str(path))
        stream.listen()
        sink = Sock(str(path), lines)
        sink.put(sample())
        sink.put(sample())
        assert sink.error is not None and "another type" in sink.error
    path.unlink()
    with SockListener(path) as listener:
        sink.put(sample())
        assert len(listener.receive()) == 1
    assert lines.levels() == ["warning", "info"]


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir], ids=["file", "directory"])
def test_no_socket_at_all(path: Path, make: object) -> None:
    make(path)  # type: ignore[operator]
    sink = Sock(str(path), Lines())
    sink.put(sample())
    assert (sink.sent, sink.dropped) == (0, 1)
    assert sink.error


def test_a_path_below_a_file(path: Path) -> None:
    path.touch()
    sink = Sock(f"{path}/sock", Lines())
    sink.put(sample())
    assert sink.error is not None and "no directory" in sink.error


def test_no_permission(path: Path, nobody: tuple[str, ...]) -> None:
    """Debian's chronyd makes its socket root's: a feeder that is not root is told so."""
    code = """
import sys
from refclock.page import Sample
from refclock.sock import Sock
sink = Sock(sys.argv[1], lambda level, text: print(level, text))
for _ in range(2):
    sink.put(Sample(system_ns=0, reference_ns=0))
print(sink.sent, sink.dropped)
"""
    with SockListener(path, mode=0o755) as listener:
        command = [*nobody, sys.executable, "-c", code, str(path)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True, timeout=10)
        assert listener.receive() == []
    warning, counts = done.stdout.splitlines()
    assert warning.startswith(f"warning sock {path}: Permission denied; ") and "run as root" in warning
    assert counts == "0 2"


# ---- The path -----------------------------------------------------------------------------------------------


def test_the_longest_path(short_path: Path) -> None:
    longest = str(short_path / "x").ljust(107, "x")
    with SockListener(longest) as listener:
        sink = Sock(longest, Lines())
        sink.put(sample())
        assert len(listener.receive()) == 1


@pytest.mark.parametrize("path", ["x" * 108, "ä" * 54, "", "a\0b"], ids=["long", "long in UTF-8", "empty", "NUL"])
def test_paths_that_no_socket_can_have(path: str) -> None:
    with pytest.raises(ConfigError) as error:
        Sock(path, Lines())
    assert "\n" not in str(error.value) and "\0" not in str(error.value) and "107" in str(error.value)


def test_a_path_that_is_no_utf_8(short_path: Path) -> None:
    path = os.fsdecode(os.fsencode(short_path) + b"/s\xf6ck")
    with SockListener(path) as listener:
        sink = Sock(path, Lines())
        sink.put(sample())
        assert len(listener.receive()) == 1


def test_nothing_is_left_open(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    sink = Sock(str(path), Lines())
    for _ in range(100):
        sink.put(sample())
    assert len(os.listdir("/proc/self/fd")) == before + 1
    sink.invalidate()
    sink.close()
    assert len(os.listdir("/proc/self/fd")) == before
