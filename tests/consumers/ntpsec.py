"""NTPsec's ntpd with the shared memory driver, in a network namespace of its own (it binds port 123, and no other)."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.consumers import Build, feeders
from tests.consumers.daemon import NamespacedServer
from tests.consumers.mode6 import Mode6

_KEY_ID = 1
_KEY = bytes(range(1, 21))
_SYSTEM_PEER = 6


@dataclass(frozen=True)
class Peer:
    """What ``ntpq -c rv ASSOCIATION`` tells of the SHM clock.

    `offset_s` is reference - system, positive when the system clock is behind; ntpd's own sign. `reach` has a bit for
    each of the last eight polls. `selected`: ntpd follows it (``*`` or ``o`` in ``ntpq -p``).
    """

    association: int
    selected: bool
    reach: int
    offset_s: float
    jitter_s: float
    dispersion_s: float
    stratum: int
    leap: int
    refid: str
    poll: int
    flash: int


@dataclass(frozen=True)
class System:
    """What ``ntpq -c rv`` tells of ntpd itself. `offset_s` is in our sign, as of `Peer`."""

    leap: int
    stratum: int
    refid: str
    offset_s: float
    jitter_s: float
    root_dispersion_s: float
    precision: int


class Ntpd(NamespacedServer):
    """An ntpd that reads the shared memory `unit`, by default a free one, whose segment goes away at the end.

    ``options`` is the rest of its refclock line (such as ``flag1 1`` or ``mode 1``). ntpd is told that it may not set
    the clock (EPERM), says so in the log once, and goes on as if.
    """

    name = "ntpd"

    def __init__(
        self,
        build: Build,
        unit: int | None = None,
        workdir: Path | str | None = None,
        *,
        options: str = "prefer",
        minpoll: int = 0,
        maxpoll: int = 0,
        arguments: tuple[str, ...] = ("-g",),
        extra_conf: str = "",
    ) -> None:
        super().__init__(build, workdir)
        self._own_unit = unit is None
        self.unit = feeders.free_unit() if unit is None else unit
        self.configuration = self.workdir / "ntp.conf"
        self._line = f"refclock shm unit {self.unit} refid VMCK minpoll {minpoll} maxpoll {maxpoll} {options}"
        self._arguments = arguments
        self._extra_conf = extra_conf

    def peer(self) -> Peer:
        """The SHM clock, as ntpd sees it. Raises RuntimeError if ntpd has none."""
        mode6 = self._mode6()
        for association, status in mode6.associations().items():
            values = mode6.variables(association)
            if values.get("srcadr") == f"127.127.28.{self.unit}" or values.get("srchost") == f"SHM({self.unit})":
                return Peer(
                    association=association,
                    selected=status >> 8 & 7 == _SYSTEM_PEER,
                    reach=int(values["reach"], 0),
                    offset_s=float(values["offset"]) / 1e3,
                    jitter_s=float(values["jitter"]) / 1e3,
                    dispersion_s=float(values["dispersion"]) / 1e3,
                    stratum=int(values["stratum"]),
                    leap=int(values["leap"]),
                    refid=values["refid"],
                    poll=int(values["hpoll"]),
                    flash=int(values["flash"], 0),
                )
        raise RuntimeError(f"ntpd has no SHM({self.unit})")

    def system(self) -> System:
        """ntpd's own state."""
        values = self._mode6().variables()
        return System(
            leap=int(values["leap"]),
            stratum=int(values["stratum"]),
            refid=values["refid"],
            offset_s=float(values["offset"]) / 1e3,
            jitter_s=float(values["sys_jitter"]) / 1e3,
            root_dispersion_s=float(values["rootdisp"]) / 1e3,
            precision=int(values["precision"]),
        )

    def configure(self, line: str) -> str:
        """``ntpq -c ':config LINE'``: change the running ntpd; its answer."""
        return self._mode6().configure(line)

    def believed_offset_s(self) -> float:
        """The offset that ntpd measures at its SHM clock: reference - system, positive when the clock is behind."""
        return self.peer().offset_s

    def wait_selected(self, timeout_s: float = 20.0) -> Peer:
        """Wait until ntpd follows the SHM clock and tells its own clients so; the peer."""
        self.wait_for(lambda: self.peer().selected, timeout_s, "selected SHM clock", 0.05)
        self.wait_leap({0, 1, 2}, timeout_s)
        return self.peer()

    def _mode6(self) -> Mode6:
        return Mode6(self._sockets[1], self.ntp_address, (_KEY_ID, _KEY))

    def _launch(self) -> subprocess.Popen[bytes]:
        keys = self.workdir / "ntp.keys"
        keys.touch(mode=0o600)
        keys.write_text(f"{_KEY_ID} SHA1 {_KEY.hex()}\n")
        lines = [
            self._line,
            # Without a line for the asker ntpd answers no mode 6 and limits the rate: `default` does not lift that.
            "restrict 127.0.0.1",
            f"keys {keys}",
            f"trustedkey {_KEY_ID}",
            f"controlkey {_KEY_ID}",
            f"statsdir {self.workdir}/",
            f"logfile {self.log_path}",
            self._extra_conf,
        ]
        self.configuration.write_text("\n".join(lines) + "\n")
        options = ["-n", *self._arguments, "-c", str(self.configuration), "-p", f"{self.workdir}/ntpd.pid"]
        return self._spawn([*self.build.command("usr/sbin/ntpd"), *options], sockets=2, clock="refuse")

    def _answers(self) -> bool:
        try:
            self._mode6().request(1, timeout_s=0.2)
            return True
        except TimeoutError:
            return False

    def _remove(self) -> None:
        super()._remove()
        if self._own_unit:
            feeders.remove_segment(self.unit)
