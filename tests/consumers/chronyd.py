"""chronyd, private: its own directory, a free port on loopback, never a hand on the clock (``-x``)."""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.consumers import Build
from tests.consumers.daemon import NtpServer

CHRONYC_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Tracking:
    """``chronyc tracking``.

    `system_offset_s` is the report's "System time" in our sign: reference - system, positive when it says ``slow of
    NTP time``. Under ``-x`` nothing is ever corrected, so it is the whole offset that chronyd believes; while chronyd
    is not synchronised it is 0. The rest has chronyd's signs: an offset (`last_offset_s`) is positive when the clock
    was ahead, and relative to the clock that chronyd would have made of the system's by then; `frequency_ppm` is
    positive when the report says ``fast``.
    """

    refid: str
    name: str
    stratum: int
    leap_status: str
    reference_time_s: float
    system_offset_s: float
    last_offset_s: float
    rms_offset_s: float
    frequency_ppm: float
    residual_frequency_ppm: float
    skew_ppm: float
    root_delay_s: float
    root_dispersion_s: float
    update_interval_s: float


@dataclass(frozen=True)
class Stats:
    """A line of ``chronyc sourcestats``; chronyd's signs, as in `Tracking`."""

    name: str
    samples: int
    runs: int
    span_s: int
    frequency_ppm: float
    skew_ppm: float
    offset_s: float
    std_dev_s: float


@dataclass(frozen=True)
class Source:
    """A line of ``chronyc sources``; chronyd's signs. `mode` ``#``: a reference clock; `state` ``*``: selected."""

    mode: str
    state: str
    name: str
    stratum: int
    poll: int
    reach: int
    last_rx_s: int
    adjusted_offset_s: float
    measured_offset_s: float
    error_s: float


LINE_OPTIONS = "filter 1 precision 1e-9 delay 1e-6 prefer"


def sock_line(path: Path | str, poll: int = -4, options: str = LINE_OPTIONS) -> str:
    """A refclock line for a SOCK at `path`, refid VMCK."""
    return f"refclock SOCK {path} refid VMCK poll {poll} {options}"


class Chronyd(NtpServer):
    """A chronyd with the given ``refclock`` lines; by default one SOCK at `sock_path`.

    Its command socket is `command_socket`, an NTP answer comes from `ntp_address`. What it logs at all is `log`; of
    the statistics that an ``extra_conf`` such as ``log refclocks tracking`` turns on `stats_log` gives the lines.
    """

    name = "chronyd"

    def __init__(
        self,
        build: Build,
        refclock_lines: Sequence[str] | None = None,
        workdir: Path | str | None = None,
        *,
        extra_conf: str = "",
        poll: int = -4,
    ) -> None:
        super().__init__(workdir)
        self.build = build
        self.sock_path = self.workdir / "vmclock.sock"
        # chronyd refuses a directory for this socket that others may enter, and makes one as it likes it.
        self.command_socket = self.workdir / "run" / "chronyd.sock"
        self.configuration = self.workdir / "chrony.conf"
        self.ntp_address = ("127.0.0.1", 0)
        self._lines = [sock_line(self.sock_path, poll)] if refclock_lines is None else list(refclock_lines)
        self._extra_conf = extra_conf

    def start(self, timeout_s: float = 15.0) -> None:
        """Start on a free port, which stays the same from one start to the next unless somebody has taken it."""
        for attempt in range(3):
            if self.ntp_address[1] == 0:
                self.ntp_address = ("127.0.0.1", _free_port())
            self._write_configuration()
            already = len(self.log())
            try:
                return super().start(timeout_s)
            except RuntimeError:
                if attempt == 2 or "bind" not in self.log()[already:]:
                    raise
                self.ntp_address = ("127.0.0.1", 0)
        raise AssertionError("not reached")

    def chronyc(self, *arguments: str, csv: bool = False, check: bool = True) -> str:
        """Run the matching chronyc over the command socket; its output. Raises RuntimeError when it fails.

        ``chronyc("reset", "sources")``; with `check` False the output is returned whatever the exit code.
        """
        done = self._chronyc([*(["-c"] if csv else []), *arguments])
        if check and done.returncode != 0:
            raise RuntimeError(f"chronyc {' '.join(arguments)}: {done.stdout.strip()} {done.stderr.strip()}")
        return done.stdout

    def tracking(self) -> Tracking:
        """What chronyd believes at this moment."""
        fields = self._rows("tracking")[0]
        refid, name, stratum, *numbers, leap_status = fields
        return Tracking(refid, name, int(stratum), leap_status, *map(float, numbers))

    def sourcestats(self) -> dict[str, Stats]:
        """The statistics of each source, by its name (a reference clock's refid)."""
        return {
            name: Stats(name, int(samples), int(runs), int(span), *map(float, rest))
            for name, samples, runs, span, *rest in self._rows("sourcestats")
        }

    def sources(self) -> dict[str, Source]:
        """Each source by its name; reach is a number (chronyc prints it in octal)."""
        return {
            name: Source(mode, state, name, int(stratum), int(poll), int(reach, 8), int(rx), *map(float, rest))
            for mode, state, name, stratum, poll, reach, rx, *rest in self._rows("sources")
        }

    def believed_offset_s(self) -> float:
        """The offset that chronyd believes, reference - system: positive means that the system clock is behind."""
        return self.tracking().system_offset_s

    def wait_normal(self, timeout_s: float = 15.0) -> Tracking:
        """Wait until ``Leap status`` is ``Normal``; the tracking report that says so."""

        def look() -> Tracking | None:
            tracking = self.tracking()
            return tracking if tracking.leap_status == "Normal" else None

        return self.wait_for(look, timeout_s, "Leap status: Normal")

    def stats_log(self, name: str) -> list[list[str]]:
        """The lines of a statistics log (``refclocks``, ``tracking``, …), split, without the headings."""
        path = self.workdir / "log" / f"{name}.log"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split() for line in lines if line[:1].isdigit()]

    def _write_configuration(self) -> None:
        lines = [
            *self._lines,
            f"bindcmdaddress {self.command_socket}",
            "cmdport 0",
            f"port {self.ntp_address[1]}",
            f"bindaddress {self.ntp_address[0]}",
            f"allow {self.ntp_address[0]}",
            f"pidfile {self.workdir}/chronyd.pid",
            f"driftfile {self.workdir}/drift",
            f"dumpdir {self.workdir}",
            f"logdir {self.workdir}/log",
            self._extra_conf,
        ]
        self.configuration.write_text("\n".join(lines) + "\n")

    def _launch(self) -> subprocess.Popen[bytes]:
        options = ["-n", "-x", "-U", "-u", _user(), "-l", str(self.log_path), "-f", str(self.configuration)]
        command = [*_without_clock(), *self.build.command("usr/sbin/chronyd"), *options]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def _answers(self) -> bool:
        return self.command_socket.exists() and self._chronyc(["tracking"]).returncode == 0

    def _ntp_socket(self) -> contextlib.AbstractContextManager[socket.socket]:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def _chronyc(self, arguments: list[str]) -> subprocess.CompletedProcess[str]:
        # From 4.8 chronyc leaves root for a user that only a packaged chrony has.
        user = ["-u", _user()] if self.build.upstream >= (4, 8) else []
        command = [*self.build.command("usr/bin/chronyc"), *user, "-h", str(self.command_socket), *arguments]
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CHRONYC_TIMEOUT_S,
            check=False,
        )

    def _rows(self, report: str) -> list[list[str]]:
        return [line.split(",") for line in self.chronyc(report, csv=True).splitlines()]


def _user() -> str:
    """The user that chronyd and chronyc stay: our own."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return "root"  # without a name of our own: neither program can change to root


def _without_clock() -> list[str]:
    """A second bolt beside ``-x``: as root, drop the right to set the clock for good before chronyd starts."""
    return ["setpriv", "--bounding-set=-sys_time", "--inh-caps=-sys_time", "--"] if os.geteuid() == 0 else []


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
