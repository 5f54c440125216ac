"""The package under a real systemd: its units, sysusers, tmpfiles, udev's rule and drop-ins, put there by install.sh.

Debian's systemd is PID 1, its udevd and its chrony.service are at work; nothing runs but as their units say. The tests
share a guest and run in their order.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from refclock import options
from tests import debs
from tests.guest import build, systemd
from tests.guest.figures import FIRST, keep
from tests.guest.scenarios import DEBIAN, PATIENCE_S, ROOT, SOCK, Lab, wheel
from tests.guest.test_scenarios import judged
from tests.harness import wait_until

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]

DAEMON, WAITING, CHRONY = "vmclock-refclock", "vmclock-refclock-wait", "chrony"
DIRECTORIES = (str(Path(options.STATUS_PATH).parent), options.STATE_DIR, "/var/log/vmclock-refclock")
SHIPPED = "/package"
CAP_DAC_OVERRIDE, CAP_SYS_TIME = 1 << 1, 1 << 25
#: Run by the daemon's unit itself, and so within its sandbox: "may", or the error that says why not.
PROBE = """
import errno, json, os, socket

def attempt(what, *arguments):
    try:
        what(*arguments)
    except OSError as error:
        return errno.errorcode[error.errno]
    return "may"

def write(path):
    return attempt(os.open, path, os.O_CREAT | os.O_WRONLY)

json.dump({
    "page": attempt(os.open, "/dev/vmclock0", os.O_RDONLY),
    "page, to write": attempt(os.open, "/dev/vmclock0", os.O_RDWR),
    "other device": attempt(os.open, "/dev/vport0p1", os.O_RDONLY),
    "home": attempt(os.stat, "/root/secret"),
    "network": attempt(socket.socket, socket.AF_INET),
    "owner": attempt(os.chown, "/run/new", 1, 1),
    **{directory: write(directory + "/new") for directory in
       ("/etc", "/usr", "/run/systemd", "/run/udev", "/run", "/run/chrony", "/var/lib", "/var/lib/vmclock-refclock")},
}, open("/run/vmclock-refclock/probe.json", "w"))
"""
ALLOWED = {
    **dict.fromkeys(("page", "/run", "/run/chrony", "/var/lib/vmclock-refclock"), "may"),
    **dict.fromkeys(("page, to write", "other device", "owner"), "EPERM"),
    **dict.fromkeys(("/etc", "/usr", "/var/lib", "/run/systemd", "/run/udev"), "EROFS"),
    "home": "ENOENT",
    "network": "EAFNOSUPPORT",
}


class Host(Lab):
    """A guest with systemd. The daemon and chronyd are services, and say what they say to the journal."""

    def __init__(self) -> None:
        package = [*(ROOT / "packaging").rglob("*"), ROOT / "examples/vmclock-refclock.toml"]
        overlay = {f"{SHIPPED}/{path.relative_to(ROOT)}": path for path in package if path.is_file()}
        super().__init__(watch=None, layers=[systemd.layer()], overlay=overlay, audit=True)

    def said(self) -> str:
        try:
            return self.systemctl("--full", "status", DAEMON, WAITING, CHRONY, check=False) + self.log("--lines=100")
        except Exception as error:
            return f"the guest does not say: {error}"

    def systemctl(self, *arguments: str, check: bool = True) -> str:
        return self.guest.run("systemctl", "--no-pager", *arguments, timeout_s=90, check=check).stdout

    def log(self, *arguments: str) -> str:
        units = [f"--unit={unit}" for unit in (DAEMON, WAITING, CHRONY)]
        return self.guest.run("journalctl", "--no-pager", *units, *arguments).stdout

    def show(self, unit: str) -> dict[str, str]:
        """The unit's properties."""
        return dict(line.split("=", 1) for line in self.systemctl("show", unit).splitlines() if "=" in line)

    def pid(self) -> int:
        return int(self.show(DAEMON)["MainPID"])

    def process(self) -> dict[str, str]:
        """What /proc says of the daemon."""
        status = self.guest.read(f"/proc/{self.pid()}/status").decode()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in status.splitlines())}

    def owner(self, path: str) -> str:
        return self.guest.run("stat", "-c", "%U:%G %a", path).stdout.strip()

    @contextlib.contextmanager
    def drop_in(self, setting: str) -> Iterator[None]:
        """A setting of the test's own for the daemon's unit."""
        path = f"/run/systemd/system/{DAEMON}.service.d/90-test.conf"
        self.guest.write(path, f"[Service]\n{setting}\n")
        self.systemctl("daemon-reload")
        try:
            yield
        finally:
            self.guest.run("rm", path)
            self.systemctl("daemon-reload")

    def restart_with(self, *names: str) -> None:
        """chronyd and the daemon anew, with these drop-ins of the package, each where its first line says."""
        for name in names:
            drop_in = self.guest.read(f"/usr/share/vmclock-refclock/systemd/{name}.conf")
            self.guest.write(drop_in.splitlines()[0].decode().removeprefix("# Drop-in: "), drop_in)
        self.systemctl("daemon-reload")
        self.systemctl("restart", CHRONY, DAEMON)
        self.wait()

    def until_unit(self, wanted: Callable[[dict[str, str]], object], what: str) -> dict[str, str]:
        """The properties of the daemon's unit, once they are as wanted."""
        deadline = time.monotonic() + PATIENCE_S
        while not wanted(unit := self.show(DAEMON)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"the unit is not {what} after {PATIENCE_S:g} s: {unit}")
            time.sleep(0.1)
        return unit

    def restarted(self) -> None:
        """Until systemd has started the daemon anew, once, and it is good."""
        unit = self.until_unit(lambda unit: unit["NRestarts"] != "0" and unit["ActiveState"] == "active", "restarted")
        assert unit["NRestarts"] == "1"
        self.wait()

    def lose(self, name: str) -> None:
        """A migration, the first that this daemon sees: the promises hold under its confinement too."""
        row = judged(self, name, self.guest.migrate(lost_s=0.1, frequency_ppm=20), FIRST)
        assert all(action["ok"] for action in row["record"]["actions"])
        assert "step" in [action["name"] for action in row["record"]["actions"]]


@pytest.fixture(scope="module")
def host(guest_image: build.Image, request: pytest.FixtureRequest) -> Iterator[Host]:
    """The package installed, the page published, the driver loaded."""
    try:
        systemd.layer()
    except debs.Unobtainable as error:
        pytest.skip(f"NO SYSTEMD: {error}")
    before = request.session.testsfailed
    started = time.monotonic()
    with Host() as host:
        keep({"name": "systemd: boot", "host_s": time.monotonic() - started})
        host.guest.install_wheel(wheel())
        host.guest.publish(host.guest.host_line())
        host.guest.load_driver()
        yield host
        if request.session.testsfailed > before:
            host.guest.keep = True
            print(host.said())


def test_installed(host: Host) -> None:
    """systemd is there and content; install.sh gives the device its group, and so does udev when it comes anew."""
    assert host.guest.read("/proc/1/comm") == b"systemd\n"
    assert host.owner("/dev/vmclock0") == "root:root 600"
    host.guest.configure_chronyd("confdir /etc/chrony/conf.d", *DEBIAN)
    host.guest.run("mkdir", "/etc/chrony/conf.d")
    said = host.guest.run("sh", f"{SHIPPED}/packaging/install.sh", timeout_s=60)
    assert said.stdout.endswith("systemctl enable --now vmclock-refclock && /usr/local/bin/vmclock-refclock doctor\n")
    host.guest.run("udevadm", "settle", "--timeout=20")
    assert host.owner("/dev/vmclock0") == "root:clock 644"
    host.guest.run("rmmod", "ptp_vmclock")
    host.guest.load_driver()
    host.guest.run("udevadm", "settle", "--timeout=20")
    assert host.owner("/dev/vmclock0") == "root:clock 644"
    assert host.systemctl("is-system-running") == "running\n"


def test_started(host: Host) -> None:
    """READY comes; chronyd gives up root, and is synchronised by the daemon."""
    host.guest.sample_clock()
    host.guest.write("/root/secret", b"")
    host.guest.write(f"{SHIPPED}/probe.py", PROBE)
    started = time.monotonic()
    with host.drop_in(f"ExecStartPost=/usr/bin/python3 -S {SHIPPED}/probe.py"):
        host.systemctl("enable", "--now", CHRONY, DAEMON)
    host.wait()
    keep({"name": "systemd: enabled", "good_after_host_s": time.monotonic() - started})
    assert host.show(DAEMON)["ActiveState"] == "active"
    assert host.owner(SOCK) == "root:root 755"
    assert host.owner("/run/chrony") == "_chrony:_chrony 700"
    assert host.owner("/run/chrony/chronyd.sock") == "_chrony:_chrony 755"
    host.guest.wait_normal()
    status = json.loads(host.guest.run("vmclock-refclock", "status", "--json").stdout)
    assert status["state"] == "synchronised" and status["good"]


def test_directories(host: Host) -> None:
    host.guest.run("systemd-tmpfiles", "--create", "vmclock-refclock.conf")
    assert [host.owner(path) for path in DIRECTORIES] == ["root:root 755"] * 3


def test_confined(host: Host) -> None:
    process = host.process()
    assert int(process["CapBnd"], 16) == int(process["CapEff"], 16) == CAP_SYS_TIME | CAP_DAC_OVERRIDE
    assert (process["NoNewPrivs"], process["Seccomp"]) == ("1", "2")
    assert json.loads(host.guest.read("/run/vmclock-refclock/probe.json")) == ALLOWED
    # systemd would say so of a setting that it does not know, or that this machine cannot enforce.
    assert "ignoring" not in host.log()


def test_migrated(host: Host) -> None:
    """The capability and the filter of system calls let the clock be set right, within the promised time."""
    host.lose("systemd: lose 0.1:20")


def test_reloaded(host: Host) -> None:
    pid = host.pid()
    host.systemctl("reload", DAEMON)
    wait_until(lambda: "settings and files are loaded anew" in host.log(), what="a word of it")
    assert host.pid() == pid


def test_killed(host: Host) -> None:
    started = time.monotonic()
    host.systemctl("kill", "--signal=KILL", DAEMON)
    host.restarted()
    keep({"name": "systemd: killed", "good_after_host_s": time.monotonic() - started})


def test_stuck(host: Host) -> None:
    """The watchdog is fed, and where it is not, it bites. Three seconds of it are the unit's thirty."""
    with host.drop_in("WatchdogSec=3"):
        host.systemctl("restart", DAEMON)
        began_us = int(host.show(DAEMON)["ActiveEnterTimestampMonotonic"])
        unit = host.until_unit(lambda unit: int(unit["WatchdogTimestampMonotonic"]) > began_us + 4_000_000, "fed")
        assert unit["NRestarts"] == "0"
        host.systemctl("kill", "--signal=STOP", DAEMON)
        host.restarted()
        assert "Watchdog timeout" in host.log()


def test_stopped(host: Host) -> None:
    host.systemctl("stop", DAEMON)
    unit = host.show(DAEMON)
    assert (unit["ActiveState"], unit["Result"], unit["ExecMainStatus"]) == ("inactive", "success", "0")
    # Containers may have mounted the first; the second holds the journal.
    assert [host.owner(path) for path in DIRECTORIES] == ["root:root 755"] * 3


def test_waited_for(host: Host) -> None:
    """The waiting unit brings the daemon with it, and holds up time-sync.target until the clock is good."""
    host.systemctl("enable", "--now", WAITING)
    assert host.status()["good"]
    waiting, target = host.show(WAITING), host.show("time-sync.target")
    assert (waiting["Result"], target["ActiveState"]) == ("success", "active")
    assert int(waiting["ActiveEnterTimestampMonotonic"]) <= int(target["ActiveEnterTimestampMonotonic"])


def test_apparmor(host: Host) -> None:
    """With its profile, which stays in force for the tests that follow."""
    host.guest.shell("echo 0 > /proc/sys/kernel/printk_ratelimit")  # every denial is to be seen
    host.guest.run("apparmor_parser", "--replace", "--skip-cache", "/etc/apparmor.d/vmclock-refclock", timeout_s=60)
    host.restart_with("apparmor")
    assert host.guest.read(f"/proc/{host.pid()}/attr/current") == b"vmclock-refclock (enforce)\n"
    host.lose("systemd: lose 0.1:20, AppArmor")


def test_as_chrony_s_user(host: Host) -> None:
    """The drop-ins together: no root, no capability but one. The journal goes on where root's ended."""
    records = len(host.journal())
    host.restart_with("chrony-user-debian", "open-sock-debian")
    assert host.owner(SOCK) == "_chrony:root 755"
    host.guest.run("systemd-tmpfiles", "--create", "vmclock-refclock.conf")
    assert [host.owner(path) for path in DIRECTORIES] == ["_chrony:_chrony 755"] * 3
    process = host.process()
    assert process["Uid"].split() == ["100"] * 4
    assert int(process["CapBnd"], 16) == int(process["CapEff"], 16) == CAP_SYS_TIME
    host.lose("systemd: lose 0.1:20, as chrony's user")
    assert len(host.journal()) == records + 1


def test_flag_only(host: Host) -> None:
    """And without the right to set the clock: no capability at all. chronyd is told, and works it off."""
    host.restart_with("flag-only")
    assert int(host.process()["CapPrm"], 16) == 0
    row = host.row("systemd: lose 0.1:20, flag-only.conf", host.guest.migrate(lost_s=0.1, frequency_ppm=20))
    names = [action["name"] for action in row["record"]["actions"] if action["ok"]]
    assert "reset-sources" in names and "step" not in names
    assert row["worst_at_end_ns"] <= 20_000


def test_nothing_was_denied(host: Host) -> None:
    """AppArmor's profile lets the daemon do all that it does, as whomever it ran."""
    assert not denials(host)
    host.guest.run("sh", "-c", "echo exec vmclock-refclock >/proc/self/attr/exec; exec cat /etc/hosts", check=False)
    assert denials(host), "a denial would have been seen"


def denials(host: Host) -> list[str]:
    return [line for line in host.guest.run("dmesg").stdout.splitlines() if 'apparmor="DENIED"' in line]
