"""A demonstration on any machine: a simulated page, a private chronyd that never touches the clock, and a migration."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time

from .errors import EX_NO, EX_OK, RefclockError, Unavailable
from .show import record_text, seconds
from .status import ask

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

OFFSET_S = 0.005
MIGRATED_OFFSET_S = 0.0004
PATIENCE_S = 30.0


def demo(chronyd_binary: str | None) -> int:
    """Tells the story as it happens; 0 when it ended well."""
    chronyd = _find("chronyd", chronyd_binary)
    chronyc = _find("chronyc", os.path.join(os.path.dirname(chronyd), "chronyc") if chronyd_binary else None)
    with tempfile.TemporaryDirectory(prefix="vmclock-demo-") as directory:
        stage = Stage(directory, chronyd, chronyc)
        try:
            return stage.play()
        finally:
            stage.end()


def _find(name: str, given: str | None) -> str:
    path = given or shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin:/sbin:/usr/bin")
    if path is None or not os.access(path, os.X_OK):
        raise Unavailable(f"no {given or name} here; install it (`apt install chrony` or `dnf install chrony`)")
    return path


class Stage:
    """The three programs in their temporary directory."""

    def __init__(self, directory: str, chronyd: str, chronyc: str) -> None:
        self._directory = directory
        self._chronyd = chronyd
        self._chronyc = chronyc
        self._processes: list[subprocess.Popen[str]] = []
        self._started = time.monotonic()

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def play(self) -> int:
        self._say(f"a page in a file, whose time is {OFFSET_S * 1e3:g} ms ahead of this machine's clock")
        hypervisor = self._start(
            "simulator",
            [*_ourselves(), "simulate", self._path("page"), "--offset", str(OFFSET_S)],
            stdin=subprocess.PIPE,
        )
        assert hypervisor.stdout is not None and hypervisor.stdin is not None
        if not hypervisor.stdout.readline().startswith("ready"):
            raise RefclockError("the simulator did not start; see above")

        self._say("a chronyd of our own (-x: it never touches the clock), with one line for us in its configuration:")
        line = f"refclock SOCK {self._path('sock')} refid VMCK poll -4 filter 1 precision 1e-9 delay 1e-6"
        self._say(f"    {line.replace(self._directory, '...')}")
        self._start_chronyd(line)

        self._say("the daemon: it reads the page and feeds chronyd")
        daemon = [*_ourselves(), "run", "--device", self._path("page"), "--sock", self._path("sock")]
        daemon += ["--chronyd", self._path("chronyd.sock"), "--status", self._path("status.sock")]
        self._start("daemon", [*daemon, "--state-dir", self._path("state"), "--config", self._empty("config.toml")])

        if not self._wait_for(lambda: self._tracking().get("Leap status") == "Normal"):
            return self._give_up("chronyd did not follow the page")
        self._show("chronyd follows the page")

        self._say("")
        self._say(
            f"now a migration: the new host is {MIGRATED_OFFSET_S * 1e6:g} us off the old one, its counter 20 ppm"
        )
        hypervisor.stdin.write(f"disrupt offset={MIGRATED_OFFSET_S} frequency=20\n")
        hypervisor.stdin.flush()
        hypervisor.stdout.readline()
        if not self._wait_for(lambda: bool(self._status()["disruptions"])):
            return self._give_up("the daemon did not see it")
        record = self._status()["last_disruption"]
        self._say("the daemon sees the new marker and tells chronyd at once; what it did, and how many ms later:")
        if not self._wait_for(lambda: self._status()["last_disruption"]["recovered_after_ns"] is not None):
            return self._give_up("no recovery")
        record = self._status()["last_disruption"]
        for action in record["actions"]:
            mark = "ok" if action["ok"] else "--"
            self._say(f"    {action['after_ns'] / 1e6:7.2f}  {mark}  {action['name']:<14} {action['detail']}")
        self._say(f"    {record['recovered_after_ns'] / 1e6:7.2f}  ok  recovered: chronyd follows the new calibration")
        self._show("chronyd follows the page again")
        self._say("")
        self._say(f"the journal says: {record_text(record)}")
        return EX_OK

    def _show(self, headline: str) -> None:
        tracking, status = self._tracking(), self._status()
        self._say(f"{headline}:")
        for name in ("Reference ID", "Leap status", "Last offset", "Root dispersion"):
            self._say(f"    {name:<16} {tracking.get(name, '?')}")
        self._say(f"    {'our own view':<16} {status['state']}, offset {seconds(status['offset_ns'] or 0, sign=True)}")

    def _start_chronyd(self, line: str) -> None:
        lines = [line, "port 0", "cmdport 0", f"bindcmdaddress {self._path('chronyd.sock')}"]
        lines.append(f"pidfile {self._path('chronyd.pid')}")
        with open(self._path("chrony.conf"), "w") as file:
            file.write("\n".join(lines) + "\n")
        command = [self._chronyd, "-x", "-d", "-U", "-f", self._path("chrony.conf")]
        if os.geteuid() == 0:
            command += ["-u", "root"]
        self._start("chronyd", command)
        if not self._wait_for(lambda: _answers(self._path("chronyd.sock"))):
            raise RefclockError("chronyd did not start; see above")

    def _start(self, name: str, command: list[str], stdin: int = subprocess.DEVNULL) -> subprocess.Popen[str]:
        with open(self._path(f"{name}.log"), "w") as log:
            output = subprocess.PIPE if stdin == subprocess.PIPE else log
            process = subprocess.Popen(command, stdin=stdin, stdout=output, stderr=log, text=True)
        self._processes.append(process)
        return process

    def _empty(self, name: str) -> str:
        with open(self._path(name), "w"):
            pass
        return self._path(name)

    def _tracking(self) -> dict[str, str]:
        command = [self._chronyc, "-h", self._path("chronyd.sock"), "-n", "tracking"]
        output = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        pairs = (line.partition(":") for line in output.splitlines())
        return {name.strip(): value.strip() for name, _, value in pairs}

    def _status(self) -> dict[str, Any]:
        status: dict[str, Any] = ask(self._path("status.sock"), "status")
        return status

    def _wait_for(self, condition: Callable[[], bool]) -> bool:
        give_up = time.monotonic() + PATIENCE_S
        while time.monotonic() < give_up:
            try:
                if condition():
                    return True
            except RefclockError:
                pass
            if any(process.poll() is not None for process in self._processes):
                return False
            time.sleep(0.02)
        return False

    def _give_up(self, why: str) -> int:
        self._say(f"{why}; the programs' last words:")
        for name in ("simulator", "chronyd", "daemon"):
            try:
                with open(self._path(f"{name}.log")) as log:
                    for line in log.readlines()[-5:]:
                        self._say(f"    {name}: {line.rstrip()}")
            except OSError:
                continue
        return EX_NO

    def _say(self, text: str) -> None:
        print(f"[{time.monotonic() - self._started:6.2f} s] {text}" if text else "", flush=True)

    def end(self) -> None:
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ourselves() -> list[str]:
    return [sys.executable, "-m", "refclock"]


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(path)
        except OSError:
            return False
        return True
