#!/usr/bin/env python3
"""Asks NTP servers for the time and compares each with the vmclock page.

    offset_monitor.py [--device PATH] [--count N] [--interval S] [--csv FILE] SERVER[:PORT]...

The page is this client's clock: the question and its answer are time-stamped by the page's own UTC.  Nothing that
happens to the system clock, not even a step, changes a measurement.

    difference   server - page: positive means that the page is behind the server
    bound        how far the two may be apart if both are right: half the delay, half the server's root delay, its root
                 dispersion and precision, and the page's own bound with the uncertainty of its readings

    agrees           the difference is within the bound
    disagrees        it is not: the server or the page is wrong
    unsynchronised   the server says that it does not know the time
    silent, refused  no answer; the port is closed, or the server asks to be left alone (then it is)
    no page time     the page has no time to compare with just now

Ends with 0 when every server agreed at least once and none ever disagreed, else 1; 64 for a wrong command line, 69
where there is no page or no such host, 77 without permission.  Needs the package and scapy: pip install
'vmclock-refclock[scripts]'.
"""

from __future__ import annotations

import argparse
import csv
import secrets
import socket
import sys
import time
from dataclasses import dataclass, fields
from typing import IO, Any

import refclock
from refclock.errors import EX_NO, EX_OK, EX_UNAVAILABLE, EX_USAGE, PageStalled, RefclockError, SampleWithheld
from refclock.show import seconds

try:
    from scapy.layers.ntp import NTPHeader
except ImportError:
    sys.exit("offset_monitor: scapy is missing; pip install 'vmclock-refclock[scripts]'")

NSEC_PER_SEC = 1_000_000_000
#: Seconds from 1900, where NTP's era 0 begins, to 1970.
EPOCH_S = 2_208_988_800
NTP_PORT = 123
HEADER_BYTES = 48
CLIENT, SERVER = 3, 4
NOT_SYNCHRONISED = 3


@dataclass
class Measurement:
    """One question and what came of it; a line of the CSV.  Nanoseconds; None is what is not known."""

    time_ns: int
    server: str
    verdict: str
    stratum: int | None = None
    refid: str | None = None
    leap: int | None = None
    difference_ns: int | None = None
    bound_ns: int | None = None
    delay_ns: int | None = None
    page_bound_ns: int | None = None
    #: reference - system by the page at that moment: how the system clock does.
    offset_ns: int | None = None
    detail: str | None = None


class Server:
    """One server: where it is, and how it did so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        host, port = _host_and_port(name)
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        self._socket = socket.socket(family, kind, protocol)
        self._socket.connect(address)  # so that a closed port is told
        self.asked = self.agreed = self.disagreed = 0
        self.worst_ns: int | None = None
        self.last: Measurement | None = None
        self.left_alone = False

    def ask(self, page: refclock.Page, timeout_s: float) -> Measurement:
        """Asks once and judges the answer.  Raises RefclockError where the page is lost, or has no time ever."""
        self.asked += 1
        try:
            measurement = self._measure(page, timeout_s)
        except TimeoutError:
            measurement = Measurement(time.time_ns(), self.name, "silent", detail=f"no answer in {timeout_s:g} s")
        except (SampleWithheld, PageStalled) as error:
            if isinstance(error, SampleWithheld) and error.cause == "signal":
                raise
            measurement = Measurement(time.time_ns(), self.name, "no page time", detail=str(error))
        except OSError as error:
            measurement = Measurement(time.time_ns(), self.name, "refused", detail=error.strerror)
        self.agreed += measurement.verdict == "agrees"
        self.disagreed += measurement.verdict == "disagrees"
        difference_ns = measurement.difference_ns
        if difference_ns is not None and abs(difference_ns) >= abs(self.worst_ns or 0):
            self.worst_ns = difference_ns
        self.last = measurement
        return measurement

    def _measure(self, page: refclock.Page, timeout_s: float) -> Measurement:
        # What the server gets to see, and must send back, is chance: nobody else can answer for it.
        cookie = secrets.randbits(32)
        question = bytes(NTPHeader(version=4, mode=CLIENT, stratum=0, poll=0, ref=0, orig=0, recv=0, sent=cookie))
        asked = page.sample()
        self._socket.send(question)
        packet, answered = self._receive(page, cookie << 32, timeout_s)
        if asked.disruption_marker != answered.disruption_marker:
            raise SampleWithheld("disrupted", "the page was disrupted between question and answer")

        # scapy gives these as floats; what lies below them are NTP's own fixed-point numbers.
        received, sent = packet.fields["recv"], packet.fields["sent"]
        there_ns = _ns_from(asked.reference_ns, received)
        back_ns = _ns_from(answered.reference_ns, sent)
        spent_ns = (sent - received) * NSEC_PER_SEC >> 32
        delay_ns = max(0, answered.reference_ns - asked.reference_ns - spent_ns)
        root_ns = (packet.fields["delay"] // 2 + packet.fields["dispersion"]) * NSEC_PER_SEC >> 16
        # A page that gives no bound of its own is taken at its word.
        page_bound_ns = max((one.maxerror_ns or 0) + one.uncertainty_ns for one in (asked, answered))
        server_bound_ns = delay_ns // 2 + root_ns + round(NSEC_PER_SEC * 2.0**packet.precision)
        measurement = Measurement(
            answered.reference_ns,
            self.name,
            "agrees",
            packet.stratum,
            _refid(packet),
            packet.leap,
            (there_ns + back_ns) // 2,
            server_bound_ns + page_bound_ns,
            delay_ns,
            page_bound_ns,
            answered.offset_ns,
        )
        if packet.stratum == 0 and measurement.refid:
            self.left_alone = True
            measurement.verdict, measurement.detail = "refused", f"it asks to be left alone: {measurement.refid}"
        elif packet.leap == NOT_SYNCHRONISED or not 0 < packet.stratum < 16:
            measurement.verdict, measurement.detail = "unsynchronised", f"leap {packet.leap}, stratum {packet.stratum}"
        elif abs(measurement.difference_ns or 0) > server_bound_ns + page_bound_ns:
            measurement.verdict = "disagrees"
        if measurement.verdict in ("refused", "unsynchronised"):
            measurement.difference_ns = measurement.bound_ns = None
        return measurement

    def _receive(self, page: refclock.Page, origin: int, timeout_s: float) -> tuple[Any, Any]:
        """The answer to the question with this time stamp, and the page's sample as it came."""
        deadline = time.monotonic() + timeout_s
        while True:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            data = self._socket.recv(2048)
            sample = page.sample()
            if len(data) >= HEADER_BYTES:
                packet = NTPHeader(data[:HEADER_BYTES])  # what follows, extensions, is not asked for
                if packet.mode == SERVER and packet.fields["orig"] == origin:
                    return packet, sample
            if time.monotonic() > deadline:
                raise TimeoutError


def _host_and_port(name: str) -> tuple[str, int]:
    if name.startswith("[") and "]" in name:
        host, _, rest = name[1:].partition("]")
        port = rest.removeprefix(":")
    elif name.count(":") > 1:
        host, port = name, ""
    else:
        host, _, port = name.partition(":")
    if not host or "[" in host or not (port or str(NTP_PORT)).isdigit():
        raise ValueError(f"{name!r} is no server; HOST, HOST:PORT or [IPV6]:PORT")
    return host, int(port or NTP_PORT)


def _ns_from(reference_ns: int, stamp: int) -> int:
    """The NTP time stamp - this UTC, across the eras: the nearest of the moments that the stamp can mean."""
    seconds, nanoseconds = divmod(reference_ns, NSEC_PER_SEC)
    reference = (seconds + EPOCH_S << 32) + (nanoseconds << 32) // NSEC_PER_SEC
    distance = (stamp - reference + (1 << 63)) % (1 << 64) - (1 << 63)
    return distance * NSEC_PER_SEC >> 32


def _refid(packet: Any) -> str:
    """Of a server of stratum 0 or 1 a word, of the others the address or hash of the server that it follows."""
    if packet.stratum > 1:
        return str(packet.id)
    return bytes(packet.ref_id).rstrip(b"\0").decode("ascii", "replace")


# ---- What is shown -----------------------------------------------------------------------------------------


def span(ns: int | None, sign: bool = False) -> str:
    """Nanoseconds in the unit that suits them."""
    return "-" if ns is None else seconds(ns, sign)


class Table:
    """One row for each server, drawn over the last one."""

    HEADINGS = ("SERVER", "ST", "REFID", "ASKED", "DELAY", "SERVER - PAGE", "BOUND", "WORST", "VERDICT")

    def __init__(self) -> None:
        self._lines = 0

    def draw(self, servers: list[Server]) -> None:
        rows = [self.HEADINGS, *(self._row(server) for server in servers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(self._aligned(cells, widths)).rstrip() for cells in rows]
        lines += ["", f"system clock: {self._system_clock(servers)}"]
        up = f"\x1b[{self._lines}F" if self._lines else ""
        sys.stdout.write(up + "".join(f"{line}\x1b[K\n" for line in lines))
        sys.stdout.flush()
        self._lines = len(lines)

    def _row(self, server: Server) -> tuple[str, ...]:
        last = server.last
        if last is None:
            return (server.name, "-", "-", "0", "-", "-", "-", "-", "not asked yet")
        stratum = "-" if last.stratum is None else str(last.stratum)
        numbers = [
            span(last.delay_ns),
            span(last.difference_ns, True),
            span(last.bound_ns),
            span(server.worst_ns, True),
        ]
        return (server.name, stratum, last.refid or "-", str(server.asked), *numbers, last.verdict)

    def _aligned(self, cells: tuple[str, ...], widths: list[int]) -> list[str]:
        """Words to the left, numbers to the right."""
        words = (0, 2, 8)
        return [
            cell.ljust(width) if column in words else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]

    def _system_clock(self, servers: list[Server]) -> str:
        known = [one.last for one in servers if one.last is not None and one.last.offset_ns is not None]
        if not known:
            return "not known"
        newest = max(known, key=lambda one: one.time_ns)
        return f"page - system {span(newest.offset_ns, True)}, the page's bound {span(newest.page_bound_ns)}"


def line(measurement: Measurement) -> str:
    """One measurement in a line, where there is no terminal to draw a table on."""
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(measurement.time_ns // NSEC_PER_SEC))
    text = f"{stamp} {measurement.server}: {measurement.verdict}"
    if measurement.difference_ns is not None:
        text += f", {span(measurement.difference_ns, True)}, bound {span(measurement.bound_ns)}"
        text += f", delay {span(measurement.delay_ns)}, stratum {measurement.stratum} {measurement.refid}"
    return text + (f" ({measurement.detail})" if measurement.detail else "")


def csv_writer(file: IO[str]) -> Any:
    """Writes the heading where the file is new."""
    writer = csv.writer(file, lineterminator="\n")
    if file.tell() == 0:
        writer.writerow(field.name for field in fields(Measurement))
    return writer


# ---- The command -------------------------------------------------------------------------------------------


def watch(page: refclock.Page, servers: list[Server], arguments: argparse.Namespace, file: IO[str] | None) -> None:
    """Round after round, until the count is reached."""
    table = Table() if sys.stdout.isatty() else None
    writer = csv_writer(file) if file is not None else None
    rounds = 0
    due = time.monotonic()
    while True:
        for server in servers:
            if server.left_alone:
                continue
            measurement = server.ask(page, arguments.timeout)
            if writer is not None:
                writer.writerow(getattr(measurement, field.name) for field in fields(Measurement))
            if table is not None:
                table.draw(servers)
            else:
                print(line(measurement), flush=True)
        rounds += 1
        if rounds == arguments.count or all(server.left_alone for server in servers):
            return
        due = max(due + arguments.interval, time.monotonic())
        time.sleep(due - time.monotonic() if due > time.monotonic() else 0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="offset_monitor", description="Asks NTP servers for the time and compares each with the vmclock page."
    )
    parser.add_argument("servers", metavar="SERVER", nargs="+", help="HOST, HOST:PORT or [IPV6]:PORT")
    parser.add_argument("--device", metavar="PATH", default="/dev/vmclock0", help="the page [/dev/vmclock0]")
    parser.add_argument("--count", metavar="N", type=int, default=0, help="rounds [without end]")
    parser.add_argument("--interval", metavar="S", type=float, default=16.0, help="seconds between rounds [16]")
    parser.add_argument("--timeout", metavar="S", type=float, default=1.0, help="for each answer [1]")
    parser.add_argument("--csv", metavar="FILE", help="append every measurement to this file")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as end:
        raise SystemExit(EX_USAGE if end.code else 0) from None
    if arguments.count < 0 or not 0 < arguments.timeout <= 60 or not 0 <= arguments.interval <= 86400:
        raise SystemExit(_say(EX_USAGE, "allowed is a count from 0, a timeout up to 60 s, an interval up to a day"))
    return arguments


def _say(status: int, message: object) -> int:
    print(f"offset_monitor: {message}", file=sys.stderr)
    return status


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    try:
        servers = [Server(name) for name in arguments.servers]
    except ValueError as error:
        return _say(EX_USAGE, error)
    except OSError as error:
        return _say(EX_UNAVAILABLE, f"cannot reach a server: {error.strerror}; check its name and the network")
    try:
        file = open(arguments.csv, "a", newline="", buffering=1) if arguments.csv else None  # noqa: SIM115
    except OSError as error:
        return _say(EX_UNAVAILABLE, f"cannot write {arguments.csv}: {error.strerror}; name another file")
    try:
        with refclock.Page(arguments.device) as page:
            watch(page, servers, arguments, file)
    except RefclockError as error:
        return _say(error.exit_status, error)
    except KeyboardInterrupt:
        pass
    finally:
        if file is not None:
            file.close()
    agreed = all(server.agreed and not server.disagreed for server in servers)
    return EX_OK if agreed else EX_NO


if __name__ == "__main__":
    sys.exit(main())
