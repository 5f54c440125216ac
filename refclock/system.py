"""The machine as `doctor` sees it: files below a root, the daemon, chronyd, the page.

Nothing here raises for what the machine is like: what cannot be read is empty, what does not answer says why.
"""

from __future__ import annotations

import glob
import os
import socket
import stat
import time
from functools import cached_property
from select import select
from struct import unpack
from typing import TYPE_CHECKING, Any

from . import chronyconf
from .chronyd import TRACKING, Chronyd
from .errors import RefclockError
from .page import Page
from .status import ask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .chronyconf import Directive, Refclock
    from .chronyd import Tracking
    from .model import Snapshot
    from .options import Settings
    from .page import Sample

#: How long chronyd may take to answer.
PATIENCE_NS = 2_000_000_000
CAP_SYS_TIME = 25
#: NTPsec's on Debian, then everybody else's.
NTP_CONF_PATHS = ("/etc/ntpsec/ntp.conf", "/etc/ntp.conf")


class System:
    """All paths that go in and come out are those inside ``root``; ``/`` is the running system.

    ``config_error`` says what is wrong with the configuration file, whose place ``settings`` then only takes.
    """

    def __init__(self, settings: Settings, root: str = "/", config_error: str = "") -> None:
        self.settings = settings
        self.root = os.path.abspath(root)
        self.config_error = config_error

    # ---- Files -----------------------------------------------------------------------------------------------

    def path(self, path: str) -> str:
        """Where a path inside the root lies for the kernel."""
        return path if self.root == "/" else self.root + os.path.abspath(path)

    def read(self, path: str) -> str:
        """A text file's content; empty where it cannot be read."""
        try:
            with open(self.path(path), encoding="utf-8", errors="replace") as file:
                return file.read()
        except OSError:
            return ""

    def stat(self, path: str) -> os.stat_result | None:
        """What the file is, or None where there is none."""
        try:
            return os.stat(self.path(path))
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        """Whether there is something."""
        return self.stat(path) is not None

    def is_socket(self, path: str) -> bool:
        """Whether there is a socket."""
        there = self.stat(path)
        return there is not None and stat.S_ISSOCK(there.st_mode)

    def glob(self, pattern: str) -> list[str]:
        """The paths that fit a shell pattern, sorted."""
        prefix = "" if self.root == "/" else self.root
        return sorted(path[len(prefix) :] for path in glob.glob(glob.escape(prefix) + os.path.abspath(pattern)))

    # ---- The kernel and the programs -------------------------------------------------------------------------

    @cached_property
    def release(self) -> str:
        """The kernel's release."""
        return self.read("/proc/sys/kernel/osrelease").strip()

    @cached_property
    def version(self) -> tuple[int, int]:
        """The kernel's version as two numbers; zeros where it is not known."""
        numbers = [int(part) for part in self.release.replace("-", ".").split(".")[:2] if part.isdigit()]
        return (numbers[0], numbers[1]) if len(numbers) == 2 else (0, 0)

    @cached_property
    def programs(self) -> dict[str, list[str]]:
        """The running programs by name, each with the numbers of its processes."""
        found: dict[str, list[str]] = {}
        for comm in self.glob("/proc/[0-9]*/comm"):
            name = self.read(comm).strip()
            if name:
                found.setdefault(name, []).append(comm.split("/")[2])
        return found

    def command_lines(self, program: str) -> Iterator[list[str]]:
        """The command line of each process of a running program."""
        for pid in self.programs.get(program, []):
            yield self.read(f"/proc/{pid}/cmdline").split("\0")

    def process(self, pid: str, field: str) -> str:
        """A field of /proc/PID/status."""
        for line in self.read(f"/proc/{pid}/status").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return value.strip()
        return ""

    @cached_property
    def ptp_clocks(self) -> list[tuple[str, str]]:
        """Device and name of each PTP clock."""
        names = self.glob("/sys/class/ptp/ptp[0-9]*/clock_name")
        return [(f"/dev/{name.split('/')[4]}", self.read(name).strip()) for name in names]

    # ---- The page --------------------------------------------------------------------------------------------

    @cached_property
    def _page(self) -> tuple[Snapshot | None, Sample | None, RefclockError | None, Page | None]:
        snapshot, sample = None, None
        try:
            with Page(self.path(self.settings.device)) as page:
                snapshot = page.read()
                try:
                    # The first pairs find cold caches.
                    sample = min((page.sample(64) for _ in range(8)), key=lambda sample: sample.uncertainty_ns)
                except RefclockError as error:
                    return snapshot, None, error, page
                return snapshot, sample, None, page
        except RefclockError as error:
            return None, None, error, None

    @property
    def page(self) -> Snapshot | None:
        """One consistent copy of the page; None where there is none to be had."""
        return self._page[0]

    @property
    def sample(self) -> Sample | None:
        """The best of a few pairs; None where the page gives none."""
        return self._page[1]

    @property
    def page_error(self) -> RefclockError | None:
        """Why there is no page, or no pair from it."""
        return self._page[2]

    @property
    def kind(self) -> str:
        """``time``, ``signal``, or empty without a page."""
        return "" if self._page[3] is None else self._page[3].kind

    @property
    def is_device(self) -> bool:
        """Whether the page is a device's: a plain file is a simulation."""
        return self._page[3] is not None and self._page[3].is_device

    # ---- The daemon ------------------------------------------------------------------------------------------

    @cached_property
    def _daemon(self) -> tuple[dict[str, Any] | None, str]:
        try:
            return ask(self.path(self.settings.status), "status"), ""
        except RefclockError as error:
            return None, str(error)
        except (TimeoutError, ValueError):
            return None, f"the daemon on {self.settings.status} does not answer"

    @property
    def status(self) -> dict[str, Any] | None:
        """The daemon's status; None where it does not answer."""
        return self._daemon[0]

    @property
    def status_error(self) -> str:
        """Why the daemon does not answer."""
        return self._daemon[1]

    @cached_property
    def daemon(self) -> str:
        """The number of the daemon's process; empty where it is not known."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(1)
            try:
                connection.connect(self.path(self.settings.status))
                credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            except OSError:
                return ""
        return str(unpack("iII", credentials)[0])

    @property
    def daemon_may_set_clock(self) -> bool | None:
        """Whether the daemon has CAP_SYS_TIME; None where that is not known."""
        capabilities = self.process(self.daemon, "CapEff") if self.daemon else ""
        return bool(int(capabilities, 16) >> CAP_SYS_TIME & 1) if capabilities else None

    def fed(self, kind: str) -> list[str]:
        """The names of the sinks of one type: as the running daemon has them, else as configured."""
        if self.status is not None:
            names = [sink["name"] for sink in self.status["sinks"] if sink["type"] == kind]
            return [name.removeprefix(self.root if self.root != "/" else "") for name in names]
        return self.settings.sock if kind == "sock" else [str(unit) for unit, _ in self.settings.shm]

    # ---- chronyd ---------------------------------------------------------------------------------------------

    @cached_property
    def chrony_conf(self) -> str | None:
        """The path of chronyd's configuration, or None without one."""
        return chronyconf.find(self)

    @cached_property
    def chrony(self) -> list[Directive]:
        """chronyd's directives; empty without a configuration."""
        return chronyconf.load(self, self.chrony_conf) if self.chrony_conf is not None else []

    def directives(self, *names: str) -> list[Directive]:
        """chronyd's directives of these names."""
        return [directive for directive in self.chrony if directive.name in names]

    @cached_property
    def refclocks(self) -> list[Refclock]:
        """chronyd's reference clocks."""
        return chronyconf.refclocks(self.chrony)

    @cached_property
    def ours(self) -> list[Refclock]:
        """Those of chronyd's reference clocks that this daemon feeds."""
        socks, units = self.fed("sock"), self.fed("shm")
        return [
            clock
            for clock in self.refclocks
            if (clock.driver == "SOCK" and clock.path in socks) or (clock.driver == "SHM" and clock.path in units)
        ]

    @cached_property
    def ntp(self) -> tuple[str, list[list[str]]]:
        """ntpd's configuration: its path, empty without one, and the words of each line that is no comment."""
        for path in NTP_CONF_PATHS:
            if self.exists(path):
                lines = (line.partition("#")[0].split() for line in self.read(path).splitlines())
                return path, [words for words in lines if words]
        return "", []

    @cached_property
    def _chronyd(self) -> tuple[Tracking | None, str]:
        if self.settings.chronyd is None:
            return None, "none is configured"
        client = Chronyd(self.path(self.settings.chronyd))
        try:
            request = client.send(TRACKING, time.monotonic_ns())
            give_up_ns = time.monotonic_ns() + PATIENCE_NS
            while request.delivered and request.ok is None and time.monotonic_ns() < give_up_ns:
                if select([client.fileno()], [], [], 0.05)[0]:
                    client.receive(time.monotonic_ns())
            return request.tracking, request.detail or f"chronyd does not answer on {self.settings.chronyd}"
        finally:
            client.close()

    @property
    def tracking(self) -> Tracking | None:
        """What chronyd believes; None where it does not answer."""
        return self._chronyd[0]

    @property
    def chronyd_error(self) -> str:
        """Why chronyd does not answer; of no meaning where it does."""
        return self._chronyd[1]
