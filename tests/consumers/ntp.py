"""NTP as a client sees it (RFC 5905): one question, one answer, decoded by struct or by scapy."""

from __future__ import annotations

import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

#: Seconds from 1900, where NTP's era 0 begins, to 1970.
EPOCH_S = 2_208_988_800

Address = tuple[str, int]
ScapyReply = Any  # scapy.layers.ntp.NTPHeader; scapy has no types


@dataclass(frozen=True)
class Reply:
    """An answer. Times in ns since 1970, as the server tells them; `sent_ns`, `received_ns` by our system clock."""

    leap: int
    version: int
    mode: int
    stratum: int
    poll: int
    precision: int
    root_delay_s: float
    root_dispersion_s: float
    refid: bytes
    reference_ns: int
    receive_ns: int
    transmit_ns: int
    sent_ns: int
    received_ns: int

    @property
    def refid_text(self) -> str:
        """The reference identifier of a stratum 1 server: ``VMCK``."""
        return self.refid.rstrip(b"\0").decode("ascii", "replace")

    @property
    def offset_ns(self) -> int:
        """What the answer makes of our system clock: server - system, positive when the system clock is behind."""
        return ((self.receive_ns - self.sent_ns) + (self.transmit_ns - self.received_ns)) // 2

    @property
    def synchronised(self) -> bool:
        return self.leap != 3 and 0 < self.stratum < 16


def ask(sock: socket.socket, address: Address, timeout_s: float) -> Reply:
    """Send a client's packet and decode the answer to it. Raises TimeoutError."""
    sent_ns = time.time_ns()
    data, received_ns = _exchange(sock, address, bytes([4 << 3 | 3]) + bytes(39), _to_ntp(sent_ns), timeout_s)
    first, stratum, poll, precision, delay, dispersion, refid = struct.unpack_from(">BBbbII4s", data)
    reference, _originate, receive, transmit = struct.unpack_from(">4Q", data, 16)
    return Reply(
        leap=first >> 6,
        version=first >> 3 & 7,
        mode=first & 7,
        stratum=stratum,
        poll=poll,
        precision=precision,
        root_delay_s=delay / 2**16,
        root_dispersion_s=dispersion / 2**16,
        refid=refid,
        reference_ns=_from_ntp(reference),
        receive_ns=_from_ntp(receive),
        transmit_ns=_from_ntp(transmit),
        sent_ns=sent_ns,
        received_ns=received_ns,
    )


def ask_scapy(sock: socket.socket, address: Address, timeout_s: float) -> ScapyReply:
    """The same with scapy, which builds the question and decodes the answer. Raises TimeoutError."""
    from scapy.layers.ntp import NTPHeader

    question = bytes(NTPHeader(version=4, mode=3, stratum=0, poll=0, precision=0))[:40]
    data, _received_ns = _exchange(sock, address, question, _to_ntp(time.time_ns()), timeout_s)
    return NTPHeader(data)


def _exchange(
    sock: socket.socket, address: Address, question: bytes, transmit: int, timeout_s: float
) -> tuple[bytes, int]:
    """The answer to `question` + `transmit`, and when it came; late answers to other questions are passed over."""
    cookie = struct.pack(">Q", transmit)
    deadline = time.monotonic() + timeout_s
    sock.sendto(question + cookie, address)
    while True:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        data = sock.recv(2048)
        received_ns = time.time_ns()
        if len(data) >= 48 and data[24:32] == cookie:
            return data, received_ns
        if time.monotonic() > deadline:
            raise TimeoutError(f"no answer from {address} in {timeout_s} s")


def _to_ntp(time_ns: int) -> int:
    seconds, nanoseconds = divmod(time_ns, 1_000_000_000)
    return (seconds + EPOCH_S << 32 | (nanoseconds << 32) // 1_000_000_000) & (1 << 64) - 1


def _from_ntp(stamp: int) -> int:
    if stamp == 0:
        return 0
    seconds, fraction = stamp >> 32, stamp & 0xFFFFFFFF
    if seconds < 1 << 31:  # era 1, from 2036 on
        seconds += 1 << 32
    return (seconds - EPOCH_S) * 1_000_000_000 + (fraction * 1_000_000_000 >> 32)
