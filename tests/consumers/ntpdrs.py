"""ntpd-rs with a ``sock`` source. It does not start without the right to set the clock: it is made to believe that."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.consumers import Build
from tests.consumers.daemon import NamespacedServer

_OBSERVATION_LIMIT = 1 << 20


@dataclass(frozen=True)
class Source:
    """The sock source, as ntpd-rs sees it. `offset_s` is reference - system: positive, and it advances the clock."""

    offset_s: float
    uncertainty_s: float


class NtpdRs(NamespacedServer):
    """An ntpd-rs that reads a SOCK at `sock_path` (it makes the socket) and serves NTP on its loopback.

    Below 10 ms it slews; a larger offset it steps, over and over, since here no step has an effect.
    """

    name = "ntpd-rs"

    def __init__(self, build: Build, workdir: Path | str | None = None, *, extra_conf: str = "") -> None:
        super().__init__(build, workdir)
        self.sock_path = self.workdir / "vmclock.sock"
        self.observation_path = self.workdir / "observe"
        self.configuration = self.workdir / "ntp.toml"
        self._extra_conf = extra_conf

    def observe(self) -> dict[str, Any]:
        """The state that the observation socket tells: ``system``, ``sources``, …"""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(2.0)
            sock.connect(str(self.observation_path))
            with sock.makefile("rb") as stream:
                (length,) = struct.unpack(">Q", stream.read(8))
                state: dict[str, Any] = json.loads(stream.read(min(length, _OBSERVATION_LIMIT)))
        return state

    def status(self) -> str:
        """``ntp-ctl status``, as text."""
        command = [*self.build.command("usr/bin/ntp-ctl"), "-c", str(self.configuration), "status"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout

    def source(self) -> Source | None:
        """The sock source by the observation socket; before 1.5 that leaves it out, and the log's last word serves."""
        sources = self.observe()["sources"]
        if sources:
            return Source(sources[0]["offset"], sources[0]["uncertainty"])
        told = re.findall(r"Offset: (\S+?)\+-(\S+?)ms", self.log())
        return Source(float(told[-1][0]) / 1e3, float(told[-1][1]) / 1e3) if told else None

    def believed_offset_s(self) -> float:
        """The offset that ntpd-rs believes: reference - system, positive when the clock is behind. Waits for one."""
        return self.wait_for(self.source, 10.0, "measurement of the sock source", 0.05).offset_s

    def _launch(self) -> subprocess.Popen[bytes]:
        noise = "precision = 1e-6" if self.build.upstream >= (1, 6) else "measurement_noise_estimate = 1e-12"
        self.configuration.write_text(
            f"""\
[observability]
log-level = "info"
ansi-colors = false
observation-path = "{self.observation_path}"

[[source]]
mode = "sock"
path = "{self.sock_path}"
{noise}

[[server]]
listen = "127.0.0.1:123"

[synchronization]
minimum-agreeing-sources = 1
local-stratum = 1

{self._extra_conf}
"""
        )
        command = [*self.build.command("usr/bin/ntp-daemon"), "-c", str(self.configuration)]
        return self._spawn(command, sockets=1, clock="pretend")

    def _answers(self) -> bool:
        if not (self.sock_path.exists() and self.observation_path.exists()):
            return False
        with contextlib.suppress(TimeoutError):
            return self.ntp(0.2).mode == 4
        return False
