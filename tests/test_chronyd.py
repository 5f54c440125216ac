"""refclock.chronyd: the float, the packets, a chronyd that misbehaves (a socket of ours), and real ones."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refclock import chronyd
from refclock.chronyd import (
    MAKESTEP,
    RESET_SOURCES,
    TRACKING,
    Chronyd,
    Command,
    Request,
    Tracking,
    burst,
    decode_float,
    dfreq,
    encode_float,
    modify_makestep,
)
from tests import consumers
from tests.consumers.chronyd import Chronyd as RealChronyd
from tests.consumers.feeders import feeding_sock, send_sock

TIMEOUT = 100
OWN = "vmclock-refclock."


# ---- chrony's float --------------------------------------------------------------------------------------


def model_decode(word: int) -> Fraction:
    bits = f"{word:032b}"
    exponent = int(bits[:7], 2) - (128 if bits[0] == "1" else 0)
    coefficient = int(bits[7:], 2) - (1 << 25 if bits[7] == "1" else 0)
    return Fraction(coefficient) * Fraction(2) ** (exponent - 25)


def model_nearest(value: Fraction) -> Fraction:
    """The representable number nearest to a value: with the smallest exponent that can hold it."""
    for exponent in range(-64, 64):
        step = Fraction(2) ** (exponent - 25)
        coefficient = round(value / step)
        if -(1 << 24) <= coefficient < 1 << 24:
            return coefficient * step
    return ((1 << 24) - 1 if value > 0 else -1 << 24) * step


words = st.integers(0, 0xFFFFFFFF)


@given(words)
def test_a_float_is_decoded_exactly(word: int) -> None:
    assert Fraction(decode_float(word)) == model_decode(word)


@given(words)
def test_what_was_decoded_is_encoded_to_the_same_value(word: int) -> None:
    assert model_decode(encode_float(decode_float(word))) == model_decode(word)


@given(
    st.one_of(
        st.floats(allow_nan=False, allow_infinity=False),
        st.floats(-1e-3, 1e-3),
        st.floats(-500, 500),
        st.builds(math.ldexp, st.integers(-(1 << 26), 1 << 26), st.integers(-93, 38)),
        # Around the outermost coefficients, over the whole range of exponents and a little more.
        st.builds(
            lambda sign, bits, delta, exponent: math.ldexp(sign * ((1 << bits) + delta), exponent),
            st.sampled_from([-1, 1]),
            st.integers(23, 27),
            st.integers(-9, 9),
            st.integers(-93, 41),
        ),
    )
)
@settings(max_examples=2000)
def test_a_number_is_encoded_as_the_nearest_float(value: float) -> None:
    assert model_decode(encode_float(value)) == model_nearest(Fraction(value))


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.0, 0), (-0.0, 0), (1.0, 0x04800000), (-1.0, 0x05800000), (1e300, 0x7EFFFFFF), (-1e300, 0x7F000000)],
)
def test_floats_as_they_are_written(value: float, word: int) -> None:
    assert encode_float(value) == word


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_not_encoded(value: float) -> None:
    with pytest.raises((ValueError, OverflowError)):
        dfreq(value)


# ---- Requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "text", "packet"),
    [
        (RESET_SOURCES, "reset sources", "0601 0000 0042" + "00" * 22),
        (MAKESTEP, "makestep", "0601 0000 002b" + "00" * 22),
        (TRACKING, "tracking", "0601 0000 0021" + "00" * 98),
        (dfreq(-1), "dfreq -1.000000", "0601 0000 001f" + "00" * 14 + "05800000 00000000"),
        (modify_makestep(3, 1.0), "makestep 1 3", "0601 0000 0032" + "00" * 14 + "00000003 04800000"),
        (burst(2, 5), "burst 2/5", "0601 0000 0003" + "00" * 14 + "00" * 40 + "00000002 00000005"),
    ],
)
def test_the_bytes_of_a_request(command: Command, text: str, packet: str) -> None:
    assert command.text == text
    assert command.packet == bytes.fromhex(packet)


# ---- A chronyd of ours -----------------------------------------------------------------------------------


class Fake:
    """The other side, by hand: takes requests and sends whatever answer the test wants."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.setblocking(False)
        self.socket.bind(str(path))

    def requests(self) -> list[tuple[bytes, str]]:
        taken = []
        with contextlib.suppress(BlockingIOError):
            while True:
                taken.append(self.socket.recvfrom(2048))
        return taken

    def seen(self) -> list[tuple[int, int, int]]:
        """Command, attempt and sequence of the requests taken."""
        return [struct.unpack(">4xHHI", packet[:12]) for packet, _ in self.requests()]

    def one(self) -> tuple[bytes, str]:
        (only,) = self.requests()
        return only

    def send(self, answer: bytes, to: str) -> None:
        self.socket.sendto(answer, to)

    def stop(self) -> None:
        self.socket.close()
        self.path.unlink()


def answer_to(
    packet: bytes, *, version: int = 6, kind: int = 2, status: int = 0, reply: int = 1, code: int = 0
) -> bytes:
    command, _, sequence = struct.unpack(">4xHHI", packet[:12])
    return struct.pack(">BBHHHH6xIQ", version, kind, 0, code or command, reply, status, sequence, 0)


SYNCHRONISED = struct.pack(
    ">I20xHHIII9I",
    0x564D434B,
    1,
    0,
    0x7FFFFFFF,
    1_700_000_000,
    123,
    *map(encode_float, (1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 8.5, 9.5)),
)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that another user may enter, with a short path, as sockets need it."""
    with tempfile.TemporaryDirectory(prefix="vmclock-") as name:
        place = Path(name)
        place.chmod(0o755)
        yield place
        place.chmod(0o755)


@pytest.fixture
def fake(place: Path) -> Iterator[Fake]:
    fake = Fake(place / "chronyd.sock")
    yield fake
    fake.socket.close()


@pytest.fixture
def client(place: Path) -> Iterator[Chronyd]:
    with contextlib.closing(Chronyd(str(place / "chronyd.sock"), timeout_ns=TIMEOUT, attempts=3)) as client:
        yield client


def own_sockets(directory: Path) -> list[Path]:
    return sorted(directory.glob(OWN + "*"))


def exchange(client: Chronyd, fake: Fake, command: Command, **answer: int) -> Request:
    request = client.send(command, 0)
    packet, address = fake.one()
    fake.send(answer_to(packet, **answer), address)
    assert client.receive(7) == [request]
    return request


def test_an_answered_request(client: Chronyd, fake: Fake) -> None:
    assert client.fileno() == -1
    assert client.next_deadline_ns() is None
    request = client.send(RESET_SOURCES, 5)
    assert client.next_deadline_ns() == 5 + TIMEOUT
    packet, address = fake.one()
    assert packet[:6] == RESET_SOURCES.packet[:6]
    assert packet[6:8] == b"\0\1"
    assert packet[12:] == RESET_SOURCES.packet[12:]
    assert client.receive(6) == []
    fake.send(answer_to(packet), address)
    assert select.select([client], [], [], 5)[0] == [client]
    assert client.receive(7) == [request]
    assert (request.ok, request.detail, request.sent_ns, request.finished_ns) == (True, "", 5, 7)
    assert client.error == ""
    assert client.next_deadline_ns() is None
    assert client.tick(10**9) == []


def test_answers_are_matched_by_sequence(client: Chronyd, fake: Fake) -> None:
    requests = [client.send(RESET_SOURCES, 0), client.send(dfreq(3), 0), client.send(RESET_SOURCES, 0)]
    packets = fake.requests()
    assert len({request.sequence for request in requests}) == 3
    for packet, address in reversed(packets):
        fake.send(answer_to(packet), address)
    assert client.receive(1) == requests[::-1]


def test_the_sequence_wraps(client: Chronyd, fake: Fake) -> None:
    client._sequence = 0xFFFFFFFE
    assert [exchange(client, fake, RESET_SOURCES).sequence for _ in range(3)] == [0xFFFFFFFF, 0, 1]


@pytest.mark.parametrize(
    ("status", "words"),
    [(1, "failed"), (2, "not authorised"), (3, "invalid"), (4, "no such source"), (99, "99")],
)
def test_a_refusal_is_said_in_words(client: Chronyd, fake: Fake, status: int, words: str) -> None:
    request = exchange(client, fake, MAKESTEP, status=status)
    assert request.ok is False
    assert request.detail.startswith("chronyd refused: ")
    assert words in request.detail
    assert client.error == "", "chronyd could be talked to"


@pytest.mark.parametrize("version", [5, 7])
def test_another_protocol_version(client: Chronyd, fake: Fake, version: int) -> None:
    request = exchange(client, fake, TRACKING, version=version, status=18)
    assert request.ok is False
    assert request.detail == client.error == f"chronyd speaks protocol version {version}, this program 6"


@pytest.mark.parametrize("fault", [{"kind": 1}, {"code": 65}, {"reply": 5}, {"reply": 2}])
def test_a_malformed_answer_ends_its_request(client: Chronyd, fake: Fake, fault: dict[str, int]) -> None:
    request = exchange(client, fake, RESET_SOURCES, **fault)
    assert request.ok is False
    assert "malformed" in request.detail
    assert client.error == request.detail


def test_a_tracking_that_is_cut_short(client: Chronyd, fake: Fake) -> None:
    for length in range(len(SYNCHRONISED)):
        request = client.send(TRACKING, 0)
        packet, address = fake.one()
        fake.send(answer_to(packet, reply=5) + SYNCHRONISED[:length], address)
        assert client.receive(1) == [request]
        assert request.ok is False
        assert request.tracking is None
        assert "malformed" in request.detail


@pytest.mark.parametrize("rubbish", [b"", b"\6\2", bytes(27), b"\xff" * 2048])
def test_what_belongs_to_nothing_is_dropped(client: Chronyd, fake: Fake, rubbish: bytes) -> None:
    request = client.send(RESET_SOURCES, 0)
    packet, address = fake.one()
    fake.send(rubbish, address)
    fake.send(answer_to(packet[:8] + struct.pack(">I", request.sequence ^ 1)), address)
    assert client.receive(1) == []
    fake.send(answer_to(packet), address)
    fake.send(answer_to(packet), address)
    assert client.receive(2) == [request]
    assert client.receive(3) == []
    assert request.ok


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=120), st.integers(0, 120))
def test_no_answer_whatever_breaks_the_client(client: Chronyd, fake: Fake, noise: bytes, at: int) -> None:
    request = client.send(TRACKING, 0)
    packet, address = fake.one()
    whole = bytearray(answer_to(packet, reply=5) + SYNCHRONISED)
    whole[at : at + len(noise)] = noise
    with contextlib.suppress(BlockingIOError):
        fake.send(bytes(whole), address)
    finished = client.receive(1)
    assert finished == ([] if request.ok is None else [request])
    client.close()


def test_tracking_in_our_signs(client: Chronyd, fake: Fake) -> None:
    request = client.send(TRACKING, 0)
    packet, address = fake.one()
    fake.send(answer_to(packet, reply=5) + SYNCHRONISED, address)
    client.receive(1)
    tracking = request.tracking
    assert request.ok and tracking
    assert {name: getattr(tracking, name) for name in Tracking.__slots__} == {
        "reference_id": 0x564D434B,
        "stratum": 1,
        "leap": 0,
        "reference_time_ns": 1_700_000_000_000_000_123,
        "correction_ns": 1_500_000_000,
        "last_offset_ns": -2_500_000_000,
        "rms_offset_ns": 3_500_000_000,
        "frequency_ppm": -4.5,
        "residual_ppm": -5.5,
        "skew_ppm": 6.5,
        "root_delay_ns": 7_500_000_000,
        "root_dispersion_ns": 8_500_000_000,
        "update_interval_ns": 9_500_000_000,
    }
    assert tracking.normal


@pytest.mark.parametrize(
    ("reference_id", "leap", "normal"),
    [(1, 0, True), (1, 1, True), (1, 2, True), (0, 3, False), (1, 3, False), (0x7F7F0101, 0, False)],
)
def test_normal(reference_id: int, leap: int, normal: bool) -> None:
    data = bytearray(bytes(28) + SYNCHRONISED)
    struct.pack_into(">I", data, 28, reference_id)
    struct.pack_into(">H", data, 28 + 26, leap)
    assert Tracking(bytes(data)).normal is normal


def test_a_time_beyond_2106() -> None:
    data = bytearray(bytes(28) + SYNCHRONISED)
    struct.pack_into(">III", data, 28 + 28, 2, 5, 7)
    assert Tracking(bytes(data)).reference_time_ns == ((2 << 32) + 5) * 10**9 + 7


# -- Time out, again, give up


def test_a_repeatable_request_is_sent_again_and_given_up(client: Chronyd, fake: Fake) -> None:
    request = client.send(RESET_SOURCES, 0)
    assert client.tick(TIMEOUT - 1) == []
    assert client.next_deadline_ns() == TIMEOUT
    assert client.tick(TIMEOUT) == []
    assert client.next_deadline_ns() == 3 * TIMEOUT
    assert client.tick(3 * TIMEOUT) == []
    assert client.next_deadline_ns() == 7 * TIMEOUT
    assert fake.seen() == [(66, attempt, request.sequence) for attempt in (1, 2, 3)]
    assert client.tick(7 * TIMEOUT) == [request]
    assert request.ok is False
    assert "no answer" in request.detail and str(own_sockets(fake.path.parent)[0]) in request.detail
    assert client.error == request.detail
    assert fake.seen() == []
    assert client.next_deadline_ns() is None


@pytest.mark.parametrize("command", [dfreq(1.5), MAKESTEP, burst(1, 2), modify_makestep(1, 0.1)])
def test_what_must_not_be_applied_twice_is_sent_once(client: Chronyd, fake: Fake, command: Command) -> None:
    request = client.send(command, 0)
    for now in range(0, 7 * TIMEOUT, TIMEOUT // 2):
        assert client.tick(now) == []
    assert client.tick(7 * TIMEOUT) == [request]
    assert fake.seen() == [(command.code, 1, request.sequence)]
    assert request.ok is False
    assert "not known whether it was applied" in request.detail


def test_a_late_answer_is_reported_too(client: Chronyd, fake: Fake) -> None:
    request = client.send(dfreq(2), 0)
    packet, address = fake.one()
    for now in (TIMEOUT, 3 * TIMEOUT):
        client.tick(now)
    assert client.tick(7 * TIMEOUT) == [request]
    assert (request.ok, request.late) == (False, False)
    fake.send(answer_to(packet), address)
    fake.send(answer_to(packet), address)
    assert client.receive(9 * TIMEOUT) == [request]
    assert (request.ok, request.late, request.detail, request.finished_ns) == (True, True, "", 9 * TIMEOUT)
    assert client.error == ""


def test_only_the_last_requests_given_up_are_remembered(client: Chronyd, fake: Fake) -> None:
    for _ in range(100):
        client.send(dfreq(2), 0)
        fake.requests()
    now = 0
    while (deadline := client.next_deadline_ns()) is not None:
        now = max(now, deadline)
        client.tick(now)
    assert len(client._given_up) == 16


def test_a_chronyd_that_does_not_read(client: Chronyd, fake: Fake) -> None:
    waiting = [client.send(RESET_SOURCES, 0)]
    while waiting[-1].delivered:
        waiting.append(client.send(RESET_SOURCES, 0))
    assert len(waiting) < 2000
    blocked = waiting[-1]
    assert blocked.ok is None and "does not read" in blocked.detail
    once = client.send(dfreq(1), 0)
    assert once.ok is False and "does not read" in once.detail
    assert client.next_deadline_ns() == 0
    assert client.receive(0) == [once]
    for packet, address in fake.requests():
        fake.send(answer_to(packet), address)
        client.receive(1)
    assert all(request.ok for request in waiting[:-1])
    client.tick(TIMEOUT)
    assert fake.seen() == [(66, 2, blocked.sequence)]
    assert blocked.detail == ""


# -- chronyd comes and goes


def test_a_restart_is_not_noticed_by_the_sender(client: Chronyd, fake: Fake, place: Path) -> None:
    assert client.connections == 0
    exchange(client, fake, RESET_SOURCES)
    (before,) = own_sockets(place)
    assert client.connections == 1
    fake.stop()
    fresh = Fake(fake.path)
    with contextlib.closing(fresh.socket):
        for command in (dfreq(4), RESET_SOURCES):
            assert exchange(client, fresh, command).ok
    assert client.connections == 2
    (after,) = own_sockets(place)
    assert before != after, "the one before it was removed"


def test_a_restart_while_requests_are_under_way(client: Chronyd, fake: Fake) -> None:
    reset, change = client.send(RESET_SOURCES, 0), client.send(dfreq(4), 0)
    fake.stop()
    fresh = Fake(fake.path)
    with contextlib.closing(fresh.socket):
        tracking = client.send(TRACKING, 1)
        assert change.ok is False
        assert change.detail == "chronyd did not answer: it has gone; not known whether it was applied"
        assert reset.ok is None
        assert client.next_deadline_ns() == 1
        assert client.tick(1) == [change]
        assert fresh.seen() == [(33, 1, tracking.sequence), (66, 2, reset.sequence)]


def test_a_chronyd_that_comes_later(client: Chronyd, place: Path) -> None:
    reset, change = client.send(RESET_SOURCES, 0), client.send(dfreq(1), 0)
    assert (reset.ok, change.ok) == (None, False)
    for request in (reset, change):
        assert "not there; start chronyd" in request.detail
    assert client.error == change.detail
    assert client.fileno() == -1
    assert client.tick(0) == [change]
    fake = Fake(place / "chronyd.sock")
    with contextlib.closing(fake.socket):
        assert client.tick(TIMEOUT) == []
        assert fake.seen() == [(66, 2, reset.sequence)]
        assert reset.detail == ""


def test_a_chronyd_that_is_known_to_have_come(client: Chronyd, place: Path) -> None:
    """Somebody saw it: what waits need not wait any longer, and what was handed over is not sent twice."""
    reset = client.send(RESET_SOURCES, 0)
    fake = Fake(place / "chronyd.sock")
    with contextlib.closing(fake.socket):
        assert client.tick(1) == [] and fake.seen() == []
        client.hurry(1)
        assert fake.seen() == [(66, 1, reset.sequence)] and reset.delivered and reset.detail == ""
        client.hurry(2)
        assert client.tick(2) == [] and fake.seen() == []


def test_hurrying_where_nobody_has_come(client: Chronyd) -> None:
    """It costs no attempt."""
    reset = client.send(RESET_SOURCES, 0)
    for _ in range(100):
        client.hurry(1)
    assert (reset.ok, reset.attempt) == (None, 1) and client.tick(1) == []


def test_a_chronyd_that_never_comes(client: Chronyd) -> None:
    reset = client.send(RESET_SOURCES, 0)
    assert [client.tick(now) for now in (TIMEOUT, 3 * TIMEOUT, 7 * TIMEOUT)] == [[], [], [reset]]
    assert reset.ok is False and "not there; start chronyd" in reset.detail


def test_a_chronyd_that_goes_at_once(client: Chronyd, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = Chronyd._connect

    def connect_in_vain(self: Chronyd) -> socket.socket:
        connection = connect(self)
        fake.socket.close()
        return connection

    monkeypatch.setattr(Chronyd, "_connect", connect_in_vain)
    request = client.send(RESET_SOURCES, 0)
    assert not request.delivered and request.ok is None
    assert "gone" in request.detail


def test_a_chronyd_that_cleans_up_after_itself(client: Chronyd, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end chronyd closes its socket, then removes it: no reason to take the path for a wrong one."""
    fake.socket.close()
    look = chronyd._look

    def look_late(path: str) -> os.stat_result | None:
        fake.path.unlink(missing_ok=True)
        return look(path)

    monkeypatch.setattr(chronyd, "_look", look_late)
    request = client.send(RESET_SOURCES, 0)
    assert request.ok is None and "gone" in request.detail


def test_many_requests_lose_their_connection_at_once(client: Chronyd, fake: Fake) -> None:
    requests = [client.send(dfreq(1), 0), client.send(RESET_SOURCES, 0), client.send(dfreq(2), 0)]
    client.tick(TIMEOUT)
    client.tick(3 * TIMEOUT)
    requests += [client.send(dfreq(3), 6 * TIMEOUT), client.send(MAKESTEP, 6 * TIMEOUT)]
    fake.stop()
    finished = client.tick(7 * TIMEOUT)
    assert len(finished) == len(requests) and set(finished) == set(requests)
    assert not any(request.ok for request in requests)
    assert client.next_deadline_ns() is None


def test_a_socket_left_behind(client: Chronyd, fake: Fake) -> None:
    fake.socket.close()
    request = client.send(RESET_SOURCES, 0)
    assert request.ok is None and "gone" in request.detail


@pytest.mark.parametrize("lost", ["ours", "chronyd's"])
def test_a_socket_whose_name_was_taken_away(client: Chronyd, fake: Fake, place: Path, lost: str) -> None:
    reset, change = client.send(RESET_SOURCES, 0), client.send(dfreq(1), 0)
    new = fake
    if lost == "ours":
        own_sockets(place)[0].unlink()
    else:
        fake.path.unlink()
        new = Fake(fake.path)  # the old one lives on, unreachable by its name
    fake.requests()
    with contextlib.closing(new.socket):
        assert client.tick(TIMEOUT) == [change]
        assert "not known whether it was applied" in change.detail
        packet, address = new.one()
        assert os.path.exists(address)
        new.send(answer_to(packet), address)
        assert client.receive(TIMEOUT) == [reset] and reset.ok


# -- Paths and permissions


def a_file(path: Path) -> None:
    path.write_text("")


@pytest.mark.parametrize("make", [a_file, Path.mkdir, lambda path: os.mkfifo(path)])
def test_a_path_that_is_no_socket(client: Chronyd, place: Path, make: Callable[[Path], None]) -> None:
    make(place / "chronyd.sock")
    request = client.send(RESET_SOURCES, 0)
    assert request.ok is False, "nothing to wait for"
    assert request.detail == client.error
    assert "is not chronyd's socket; start chronyd, or give --chronyd the path" in request.detail
    assert client.receive(0) == [request]


def test_a_stream_socket(client: Chronyd, place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(place / "chronyd.sock"))
        listener.listen()
        request = client.send(RESET_SOURCES, 0)
    assert request.ok is False and "is not chronyd's socket" in request.detail


def test_a_directory_that_is_none(place: Path) -> None:
    a_file(place / "file")
    client = Chronyd(str(place / "file" / "chronyd.sock"))
    assert "is not there" in client.send(RESET_SOURCES, 0).detail


@pytest.mark.parametrize("make", [a_file, Fake, lambda path: None])
def test_a_path_with_a_zero_in_it(place: Path, make: Callable[[Path], object]) -> None:
    kept = make(place / "chronyd")
    client = Chronyd(f"{place}/chronyd\0.sock")
    client.send(MAKESTEP, 0)
    client.tick(10**12)
    client.close()
    del kept


def long_path(place: Path, length: int) -> Path:
    """A path of so many bytes, for a socket in a directory with a long name."""
    directory = place / ("d" * (length - len(f"{place}//chronyd.sock")))
    directory.mkdir()
    return directory / "chronyd.sock"


def test_a_path_that_is_too_long(place: Path) -> None:
    client = Chronyd(str(long_path(place, 108)))
    request = client.send(RESET_SOURCES, 0)
    assert request.ok is False and "more than 107 bytes" in request.detail


def test_the_longest_path_leaves_no_room_beside_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "tmp"
    other.mkdir()
    monkeypatch.setenv("TMPDIR", str(other))
    monkeypatch.setattr(chronyd, "_RUNTIME_DIRECTORY", str(place / "missing"))
    fake = Fake(long_path(place, 107))
    with contextlib.closing(fake.socket), contextlib.closing(Chronyd(str(fake.path))) as client:
        assert exchange(client, fake, RESET_SOURCES).ok
        assert len(own_sockets(other)) == 1
    assert own_sockets(other) == []


def test_a_relative_path(fake: Fake, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    with contextlib.closing(Chronyd("chronyd.sock")) as client:
        client.send(RESET_SOURCES, 0)
        _, address = fake.one()
        assert os.path.isabs(address)


@contextlib.contextmanager
def nobody() -> Iterator[None]:
    """Without root's rights for a while."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_refused_permission(client: Chronyd, fake: Fake) -> None:
    fake.path.chmod(0)
    with nobody():
        request = client.send(RESET_SOURCES, 0)
    assert request.ok is False, "nothing to wait for"
    assert "may not write to chronyd's socket" in request.detail and "be root" in request.detail
    fake.path.chmod(0o666)
    assert client.receive(0) == [request]
    assert exchange(client, fake, RESET_SOURCES).ok


def test_a_directory_that_takes_no_socket(
    client: Chronyd, fake: Fake, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = place / "runtime"
    other.mkdir()
    other.chmod(0o777)
    fake.path.chmod(0o666)
    place.chmod(0o555)
    monkeypatch.setattr(chronyd, "_RUNTIME_DIRECTORY", str(other))
    with nobody():
        assert exchange(client, fake, RESET_SOURCES).ok
    assert own_sockets(place) == [] and len(own_sockets(other)) == 1
    client.close()
    monkeypatch.setenv("TMPDIR", "/proc")
    monkeypatch.setattr(chronyd, "_RUNTIME_DIRECTORY", "/proc")
    with nobody():
        request = client.send(MAKESTEP, 0)
    assert request.ok is False
    assert "no directory for a socket that chronyd can answer to" in request.detail


def test_the_own_socket(client: Chronyd, fake: Fake, place: Path) -> None:
    umask = os.umask(0o077)
    try:
        client.send(RESET_SOURCES, 0)
        assert os.umask(0o077) == 0o077, "the umask is as it was"
    finally:
        os.umask(umask)
    (own,) = own_sockets(place)
    assert stat.S_IMODE(own.stat().st_mode) == 0o666
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger, pytest.raises(PermissionError):
        stranger.sendto(b"anything", str(own))
    assert not os.get_inheritable(client.fileno())
    client.close()
    assert own_sockets(place) == []
    assert client.fileno() == -1 and client.next_deadline_ns() is None
    fake.requests()
    assert exchange(client, fake, RESET_SOURCES).ok, "it can be used again"


def test_sockets_of_the_dead_are_cleared_away(client: Chronyd, fake: Fake, place: Path) -> None:
    script = (
        "import sys; from refclock.chronyd import *; c = Chronyd(sys.argv[1]); c.send(RESET_SOURCES, 0);"
        "print(flush=True); sys.stdin.read()"
    )
    dying = subprocess.Popen(
        [sys.executable, "-c", script, str(fake.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert dying.stdout is not None and dying.stdout.readline() == b"\n"
    (left,) = own_sockets(place)
    with contextlib.closing(Chronyd(str(fake.path))) as living:
        living.send(RESET_SOURCES, 0)
        assert left in own_sockets(place), "it still lives"
        dying.kill()
        dying.communicate(timeout=10)
        a_file(place / f"{OWN}a-file-of-somebody's")
        kept = set(own_sockets(place)) - {left}
        client.send(RESET_SOURCES, 0)
        assert kept < set(own_sockets(place)), "the living one's, and what is no socket"
        assert left not in own_sockets(place)


def test_no_descriptor_is_lost(client: Chronyd, place: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(50):
        client.send(MAKESTEP, 0)
        fake = Fake(place / "chronyd.sock")
        client.send(MAKESTEP, 0)
        fake.stop()
    client.close()
    assert os.listdir("/proc/self/fd") == before
    assert own_sockets(place) == []


# -- Anything in any order

STEPS = ["reset", "dfreq", "tracking", "answer", "drop", "tick", "receive", "stop", "start", "hide"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=300)
@given(st.lists(st.sampled_from(STEPS), max_size=60))
def test_every_request_ends_and_nothing_is_applied_twice(place: Path, steps: list[str]) -> None:
    path = place / "chronyd.sock"
    path.unlink(missing_ok=True)
    client = Chronyd(str(path), timeout_ns=TIMEOUT, attempts=3)
    fake: Fake | None = None
    sent: list[Request] = []
    reported: list[Request] = []
    seen: list[tuple[int, int, int]] = []
    now = 0

    def take() -> list[tuple[bytes, str]]:
        taken = fake.requests() if fake else []
        seen.extend(struct.unpack(">4xHHI", packet[:12]) for packet, _ in taken)
        return taken

    for step in steps:
        now += TIMEOUT // 4
        if step in ("reset", "dfreq", "tracking"):
            command = {"reset": RESET_SOURCES, "dfreq": dfreq(1), "tracking": TRACKING}[step]
            sent.append(client.send(command, now))
        elif step == "answer" and fake:
            for packet, address in take():
                tracking = packet[5] == TRACKING.code
                answer = answer_to(packet, reply=5) + SYNCHRONISED if tracking else answer_to(packet)
                with contextlib.suppress(OSError):  # the client may have gone elsewhere
                    fake.send(answer, address)
        elif step == "drop":
            take()
        elif step == "tick":
            now += TIMEOUT
            reported += client.tick(now)
        elif step == "receive":
            reported += client.receive(now)
        elif step == "stop" and fake:
            take()
            fake.stop()
            fake = None
        elif step == "start" and not fake:
            fake = Fake(path)
        elif step == "hide":
            for own in own_sockets(place):
                own.unlink()
    take()
    while (deadline := client.next_deadline_ns()) is not None:
        now = max(now, deadline)
        reported += client.tick(now) + client.receive(now)
    take()
    client.close()
    if fake:
        fake.stop()
    assert own_sockets(place) == []
    for request in sent:
        assert request.ok is not None
        assert request.ok or request.detail
        assert reported.count(request) == 1 + request.late
        attempts = [attempt for _, attempt, sequence in seen if sequence == request.sequence]
        assert len(attempts) == len(set(attempts)) <= (3 if request.command.repeatable else 1)
        assert not request.ok or attempts
        assert (request.tracking is not None) == (request.ok and request.command is TRACKING)


# ---- Real ones -------------------------------------------------------------------------------------------


@pytest.fixture(params=consumers.SUITES["chronyd"])
def build(request: pytest.FixtureRequest) -> consumers.Build:
    return consumers.build("chronyd", request.param)


@pytest.fixture
def real(build: consumers.Build) -> Iterator[RealChronyd]:
    with RealChronyd(build) as real:
        yield real


@pytest.fixture
def talking(real: RealChronyd) -> Iterator[Chronyd]:
    with client_of(real) as talking:
        yield talking


def client_of(real: RealChronyd) -> contextlib.closing[Chronyd]:
    return contextlib.closing(Chronyd(str(real.command_socket)))


def pump(client: Chronyd, timeout_s: float) -> list[Request]:
    """One turn of a daemon's loop."""
    deadline_ns = client.next_deadline_ns()
    if deadline_ns is not None:
        timeout_s = min(timeout_s, max(0.0, (deadline_ns - time.monotonic_ns()) / 1e9))
    select.select([client] if client.fileno() >= 0 else [], [], [], timeout_s)
    return client.receive(time.monotonic_ns()) + client.tick(time.monotonic_ns())


def finish(client: Chronyd, request: Request, timeout_s: float = 10.0) -> Request:
    end = time.monotonic() + timeout_s
    while request.ok is None:
        assert time.monotonic() < end, request
        pump(client, 0.5)
    return request


def ask(client: Chronyd, command: Command) -> Request:
    return finish(client, client.send(command, time.monotonic_ns()))


def tracking_of(client: Chronyd) -> Tracking:
    request = ask(client, TRACKING)
    assert request.ok, request
    assert request.tracking is not None
    return request.tracking


def wait_normal(client: Chronyd, timeout_s: float = 20.0) -> Tracking:
    end = time.monotonic() + timeout_s
    while not (tracking := tracking_of(client)).normal:
        assert time.monotonic() < end
        time.sleep(0.005)
    return tracking


def test_real_commands(real: RealChronyd, talking: Chronyd) -> None:
    assert ask(talking, RESET_SOURCES).ok
    assert "Reset all sources" in real.log() or real.build.upstream < (4, 5)
    assert ask(talking, modify_makestep(3, 0.25)).ok
    assert "New makestep 0.250000 3" in real.log() or real.build.upstream < (4, 5)
    assert ask(talking, dfreq(-20)).ok
    assert "Accumulated delta freq of -20.000ppm" in real.log()
    assert tracking_of(talking).frequency_ppm == pytest.approx(20, abs=0.01)
    for command, words in ((MAKESTEP, "failed"), (burst(2, 4), "no such source")):
        request = ask(talking, command)
        assert (request.ok, request.detail) == (False, f"chronyd refused: {words}")
    assert talking.error == ""


def test_real_length_of_every_request(real: RealChronyd, talking: Chronyd) -> None:
    """The shortest that chronyd takes: one byte less is refused, or not answered at all."""
    with contextlib.closing(Chronyd(str(real.command_socket), timeout_ns=200_000_000, attempts=1)) as hasty:
        for command in (RESET_SOURCES, TRACKING, MAKESTEP, dfreq(0), modify_makestep(0, 1), burst(1, 1)):
            request = ask(talking, command)
            assert "length" not in request.detail and "no answer" not in request.detail
            short = Command("too short", command.code, reply=command.reply)
            short.packet = command.packet[:-1]
            request = ask(hasty, short)
            assert "bad request length" in request.detail or "no answer" in request.detail


def test_real_repeated_request_is_applied_again(real: RealChronyd, talking: Chronyd) -> None:
    """Why `dfreq` is not sent again."""
    for _ in range(3):
        assert ask(talking, dfreq(10)).ok
        talking._sequence -= 1
    assert tracking_of(talking).frequency_ppm == pytest.approx(-30, abs=0.01)


def test_real_tracking_is_what_chronyc_shows(real: RealChronyd, talking: Chronyd) -> None:
    start = time.monotonic()
    with feeding_sock_drifting(real.sock_path, lambda: 0.003 + 50e-6 * (time.monotonic() - start)):
        wait_normal(talking)
        time.sleep(1.5)
    while True:  # the last samples may still be worked off
        before, shown, tracking = tracking_of(talking), real.tracking(), tracking_of(talking)
        if before.reference_time_ns == tracking.reference_time_ns:
            break
    assert tracking.leap == 0
    assert (tracking.reference_id.to_bytes(4, "big"), tracking.stratum) == (b"VMCK", 1)
    assert tracking.correction_ns > 2_900_000, "the system clock is behind"
    assert tracking.frequency_ppm == pytest.approx(50, abs=1), "the system clock is slow"
    assert "slow" in next(line for line in real.chronyc("tracking").splitlines() if "Frequency" in line)
    assert tracking.correction_ns == pytest.approx(shown.system_offset_s * 1e9, abs=20_000)
    assert tracking.last_offset_ns == pytest.approx(-shown.last_offset_s * 1e9, abs=2)
    assert tracking.rms_offset_ns == pytest.approx(shown.rms_offset_s * 1e9, abs=2)
    assert tracking.frequency_ppm == pytest.approx(-shown.frequency_ppm, abs=2e-3)
    assert tracking.residual_ppm == pytest.approx(-shown.residual_frequency_ppm, abs=2e-3)
    assert tracking.skew_ppm == pytest.approx(shown.skew_ppm, abs=2e-3)
    assert tracking.root_delay_ns == pytest.approx(shown.root_delay_s * 1e9, abs=2)
    assert tracking.update_interval_ns == pytest.approx(shown.update_interval_s * 1e9, abs=1e8)
    assert tracking.reference_time_ns == pytest.approx(shown.reference_time_s * 1e9, abs=1000)


@contextlib.contextmanager
def feeding_sock_drifting(path: Path, offset_s: Callable[[], float]) -> Iterator[None]:
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(0.02):
            send_sock(path, offset_s())

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_real_reset_and_normal_again(real: RealChronyd, talking: Chronyd) -> None:
    with feeding_sock(real.sock_path, 0.0):
        for _ in range(3):
            wait_normal(talking)
            reset = talking.send(RESET_SOURCES, time.monotonic_ns())
            behind = talking.send(TRACKING, time.monotonic_ns())
            real.wait_leap({3}, 5.0, 0.0)
            finish(talking, behind)
            assert reset.ok, "requests of one socket are worked off in their order"
            assert behind.tracking and not behind.tracking.normal
            assert (behind.tracking.leap, behind.tracking.stratum, behind.tracking.reference_id) == (3, 0, 0)
        wait_normal(talking)
    assert ask(talking, RESET_SOURCES).ok
    for _ in range(50):
        assert not tracking_of(talking).normal, "nothing new has come"
        time.sleep(0.01)


def test_real_reference_time_is_blurred(real: RealChronyd, talking: Chronyd) -> None:
    """Why the reference time cannot tell a sample after the reset from one before it."""
    ages = []
    with feeding_sock(real.sock_path, 0.0, 0.02):
        wait_normal(talking)
        for _ in range(40):
            ages.append(time.time_ns() - tracking_of(talking).reference_time_ns)
            time.sleep(0.03)
    assert min(ages) >= 0
    assert max(ages) > 400_000_000, "though the last sample is never older than 0.1 s"


def test_real_samples_of_before_do_not_come_back(build: consumers.Build) -> None:
    with RealChronyd(build, poll=0) as real, client_of(real) as talking:
        with feeding_sock(real.sock_path, 0.0, 0.02):
            wait_normal(talking)
        for _ in range(5):
            assert send_sock(real.sock_path, 0.0)
        assert ask(talking, RESET_SOURCES).ok
        with feeding_sock(real.sock_path, 0.005, 0.02):
            tracking = wait_normal(talking)
        assert tracking.last_offset_ns == pytest.approx(5_000_000, abs=1)
        assert abs(tracking.frequency_ppm) < 0.01, "no slope from before to after"


class HeldServer:
    """An NTP server of stratum 1 on loopback that answers when the test wants it."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]

    def question(self, timeout_s: float) -> tuple[bytes, tuple[str, int]] | None:
        self.socket.settimeout(timeout_s)
        try:
            packet, address = self.socket.recvfrom(2048)
        except TimeoutError:
            return None
        return packet, address

    def answer(self, question: tuple[bytes, tuple[str, int]]) -> None:
        packet, address = question
        now = ((time.time_ns() << 32) // 10**9 + (2_208_988_800 << 32)) & (1 << 64) - 1
        head = struct.pack(">BBbbII4s", 0o44, 1, 0, -20, 0, 0, b"TEST")
        self.socket.sendto(head + struct.pack(">Q8sQQ", now, packet[40:48], now, now), address)


@pytest.fixture
def server() -> Iterator[HeldServer]:
    server = HeldServer()
    with server.socket:
        yield server


def received(real: RealChronyd) -> int:
    line = next(line for line in real.chronyc("ntpdata").splitlines() if line.startswith("Total RX"))
    return int(line.split(":")[1])


def test_real_ntp_answer_on_its_way_at_the_reset(build: consumers.Build, server: HeldServer) -> None:
    line = f"server 127.0.0.1 port {server.port} minpoll 0 maxpoll 0 iburst"
    with RealChronyd(build, [line]) as real, client_of(real) as talking:
        end = time.monotonic() + 30
        while not tracking_of(talking).normal:
            assert time.monotonic() < end
            if question := server.question(1.0):
                server.answer(question)
        question = server.question(5.0)
        assert question
        before = received(real)
        assert ask(talking, RESET_SOURCES).ok
        server.answer(question)
        real.wait_for(lambda: received(real) > before, 5.0, "NTP answer received")
        assert [stats.samples for stats in real.sourcestats().values()] == [0]
        question = server.question(5.0)
        assert question
        server.answer(question)
        real.wait_for(lambda: [stats.samples for stats in real.sourcestats().values()] == [1], 5.0, "sample")


def test_real_burst(build: consumers.Build, server: HeldServer) -> None:
    line = f"server 127.0.0.1 port {server.port} minpoll 10 maxpoll 10"
    with RealChronyd(build, [line]) as real, client_of(real) as talking:
        assert server.question(10.0), "the first request after the start"
        assert ask(talking, burst(1, 2)).ok
        assert server.question(10.0) and server.question(10.0)
        assert server.question(3.0) is None, "two requests in all, however few the answers"


def test_real_own_clock_is_no_source(build: consumers.Build) -> None:
    """With the directive `local` chronyd is never unsynchronised, and tells its NTP clients so."""
    real = RealChronyd(build, extra_conf="local stratum 10")
    with real, client_of(real) as talking, feeding_sock(real.sock_path, 0.0):
        assert wait_normal(talking).reference_id == 0x564D434B
        assert ask(talking, RESET_SOURCES).ok
        tracking = tracking_of(talking)
        assert (tracking.leap, tracking.reference_id) == (0, Tracking.LOCAL)
        assert not tracking.normal
        assert real.ntp().leap == 0
        wait_normal(talking)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start chronyd as another user")
def test_real_chronyd_of_another_user(build: consumers.Build, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As packaged: we are root, chronyd has dropped to its user, and must be able to answer."""
    monkeypatch.setattr("tests.consumers.chronyd._user", lambda: "nobody")
    os.chown(place, 65534, -1)
    with RealChronyd(build, workdir=place) as real, client_of(real) as talking:
        assert real.command_socket.parent.stat().st_uid == 65534
        assert ask(talking, RESET_SOURCES).ok
        umask = os.umask(0o077)
        try:
            talking.close()
            assert ask(talking, RESET_SOURCES).ok
        finally:
            os.umask(umask)
        # chronyd's own user may just as well.
        talking.close()
        with nobody():
            assert ask(talking, RESET_SOURCES).ok
        # Nor does it have to be chronyd's directory.
        talking.close()
        other = place / "other"
        other.mkdir()
        monkeypatch.setattr(chronyd, "_RUNTIME_DIRECTORY", str(other))
        bind_near = chronyd._bind_near
        monkeypatch.setattr(chronyd, "_bind_near", lambda sock, path: bind_near(sock, "/proc/none"))
        assert ask(talking, RESET_SOURCES).ok
        assert own_sockets(other)


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_real_restart(real: RealChronyd, talking: Chronyd, end: str) -> None:
    assert ask(talking, RESET_SOURCES).ok
    getattr(real, end)()
    reset = talking.send(RESET_SOURCES, time.monotonic_ns())
    assert reset.ok is None and "start" in reset.detail
    once = talking.send(dfreq(1), time.monotonic_ns())
    assert once.ok is False and "start" in once.detail
    real.start()
    assert finish(talking, reset).ok
    assert reset.attempt > 1
    real.restart()
    assert ask(talking, dfreq(1)).ok, "a restart that nobody had to notice"
    assert len(own_sockets(real.command_socket.parent)) == 1


def test_real_chronyd_that_hangs(real: RealChronyd) -> None:
    with contextlib.closing(Chronyd(str(real.command_socket), timeout_ns=20_000_000, attempts=3)) as talking:
        assert ask(talking, TRACKING).ok
        real.pause()
        began = time.monotonic()
        reset = talking.send(RESET_SOURCES, time.monotonic_ns())
        change = talking.send(dfreq(10), time.monotonic_ns())
        assert time.monotonic() - began < 1, "nothing is waited for"
        finish(talking, reset)
        finish(talking, change)
        assert "no answer" in reset.detail
        assert "not known whether it was applied" in change.detail
        real.resume()
        late: list[Request] = []
        end = time.monotonic() + 10
        while len(late) < 2:
            assert time.monotonic() < end
            late += pump(talking, 0.5)
        assert {id(request) for request in late} == {id(reset), id(change)}
        assert reset.ok and reset.late and change.ok and change.late
        assert tracking_of(talking).frequency_ppm == pytest.approx(-10, abs=0.01), "applied once"
        # So long that its queue is full.
        real.pause()
        requests = [talking.send(RESET_SOURCES, time.monotonic_ns()) for _ in range(2000)]
        blocked = next((request for request in requests if not request.delivered), None)
        assert blocked is not None and "does not read" in blocked.detail
        real.resume()
        for request in requests:
            finish(talking, request)
        assert ask(talking, RESET_SOURCES).ok
