"""`doctor` on a machine that is as it should be, and on one that is broken on purpose, one thing at a time.

The machine is a directory that stands for its root: a page that a real `simulate` plays, a real chronyd (``-x``) and
the real daemon, and the files of `/etc`, `/proc` and `/sys` that doctor looks at, written here.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from refclock import chronyconf, model, options
from refclock.doctor import CHECKS, Diagnosis, as_text, diagnose
from refclock.finding import GOOD, NOTE, PROBLEM, Finding
from refclock.page import LOCAL_COUNTER_ID
from refclock.system import System
from tests.consumers import build
from tests.consumers.chronyd import Chronyd
from tests.harness import (
    RunningDaemon,
    Simulator,
    make_page,
    run,
    write_page,
)

SOCK = "/run/chrony.vmclock.sock"
LINE = f"refclock SOCK {SOCK} refid VMCK poll -4 filter 1 precision 1e-9 delay 4e-5 prefer\n"
COUNTER = "tsc" if LOCAL_COUNTER_ID == model.COUNTER_X86_TSC else "arch_sys_counter"
CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0"
NTP_ERA_S = 2_208_988_800

#: What is on a machine where all is well, by path.
FILES = {
    "/etc/vmclock-refclock.toml": f'sock = ["{SOCK}"]\n',
    "/etc/chrony/chrony.conf": (
        "# the usual\nconfdir /etc/chrony/conf.d\nsourcedir /etc/chrony/sources.d\n"
        "makestep 1 3\nrtcsync\nleapsectz right/UTC\n"
    ),
    "/etc/chrony/conf.d/vmclock.conf": LINE,
    "/etc/chrony/sources.d/pool.sources": "pool 2.debian.pool.ntp.org iburst\n",
    "/proc/sys/kernel/osrelease": "7.0.4-cloud-amd64\n",
    "/proc/1/comm": "systemd\n",
    "/proc/100/comm": "chronyd\n",
    "/proc/100/cmdline": "/usr/sbin/chronyd\0-F\0001\0",
    f"{CLOCKSOURCE}/current_clocksource": f"{COUNTER}\n",
    f"{CLOCKSOURCE}/available_clocksource": f"{COUNTER} hpet\n",
    "/sys/bus/acpi/devices/AMZNC10C:00/status": "15\n",
    "/sys/class/ptp/ptp0/clock_name": "vmclock0\n",
    "/dev/ptp0": "",
    "/usr/share/zoneinfo/leap-seconds.list": f"#@\t{int(time.time()) + NTP_ERA_S + 86400}\n",
    "/usr/share/zoneinfo/right/UTC": "",
}


class Machine:
    """A root, and what was done to it, to be undone."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._before: dict[Path, bytes | None] = {}

    def inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")

    def write(self, path: str, text: str) -> None:
        self._keep(path)
        self.inside(path).parent.mkdir(parents=True, exist_ok=True)
        self.inside(path).write_text(text)

    def append(self, path: str, text: str) -> None:
        self.write(path, self.inside(path).read_text() + text)

    def replace(self, path: str, old: str, new: str) -> None:
        text = self.inside(path).read_text()
        assert old in text
        self.write(path, text.replace(old, new))

    def remove(self, path: str) -> None:
        self._keep(path)
        self.inside(path).unlink()

    def set(self, **values: object) -> None:
        """Options of the daemon, by their keys with underscores."""
        for name, value in values.items():
            self.append("/etc/vmclock-refclock.toml", f"{name.replace('_', '-')} = {json.dumps(value)}\n")

    def page(self, **fields: int) -> None:
        """Another page than the daemon's, for doctor to look at."""
        self._keep("/dev/vmclock1")
        write_page(self.inside("/dev/vmclock1"), make_page(**fields))
        self.set(device="/dev/vmclock1")

    def _keep(self, path: str) -> None:
        file = self.inside(path)
        self._before.setdefault(file, file.read_bytes() if file.exists() else None)

    def undo(self) -> None:
        for file, content in self._before.items():
            if content is None:
                file.unlink(missing_ok=True)
            else:
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
        self._before.clear()

    def system(self) -> System:
        settings = options.Settings(options.load(str(self.inside(options.CONFIG_PATH))))
        return System(settings, str(self.root))

    def diagnose(self) -> Diagnosis:
        return diagnose(self.system())


def populate(root: Path) -> Machine:
    machine = Machine(root)
    for path, text in FILES.items():
        machine.write(path, text)
    machine._before.clear()
    return machine


@pytest.fixture(scope="module")
def running() -> Iterator[Machine]:
    """The machine with everything running on it, in a directory with a short path for its sockets."""
    root = Path(tempfile.mkdtemp(prefix="doctor-"))
    root.chmod(0o755)
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        machine = populate(root)
        for directory in ("run/vmclock-refclock", "chronyd"):
            (root / directory).mkdir(parents=True)
        page = machine.inside("/dev/vmclock0")
        simulator = stack.enter_context(contextlib.closing(Simulator(page, root)))
        assert simulator.running
        chronyd = Chronyd(build("chronyd"), [LINE.replace(SOCK, f"{root}{SOCK}")], root / "chronyd")
        chronyd.command_socket = root / "run/chrony/chronyd.sock"
        chronyd = stack.enter_context(chronyd)
        daemon = RunningDaemon(
            root,
            device=page,
            sock=machine.inside(SOCK),
            chronyd=chronyd.command_socket,
            status=machine.inside(options.STATUS_PATH),
        )
        stack.enter_context(contextlib.closing(daemon))
        chronyd.wait_normal()
        daemon.wait_until(lambda status: status["good"])
        yield machine


@pytest.fixture
def machine(running: Machine) -> Iterator[Machine]:
    yield running
    running.undo()


def levels(diagnosis: Diagnosis) -> dict[str, str]:
    return {finding.check: finding.level for finding in diagnosis.findings}


def test_a_good_machine_is_all_green(machine: Machine) -> None:
    diagnosis = machine.diagnose()
    assert {finding for finding in diagnosis.findings if finding.level != GOOD} == set()
    seen = levels(diagnosis)
    assert {"device", "page", "daemon", "sinks", "chronyd", "chronyd-follows", "refclock-line", "sock"} <= seen.keys()
    assert diagnosis.good

    done = run("doctor", "--root", machine.root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout and "problem" not in done.stdout
    assert "\033" not in done.stdout  # no colour in a pipe
    done = run("doctor", "--root", machine.root, "--json")
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert said["good"] is True
    assert all(set(finding) == {"level", "check", "what", "cure"} for finding in said["findings"])
    assert said["line"].startswith(f"refclock SOCK {SOCK} refid VMCK poll -4 filter 1 precision ")


def test_the_line_fits_the_page_and_a_real_chronyd_takes_it(machine: Machine) -> None:
    machine.page(time_maxerror_nanosec=123_456)
    machine.set(interval=0.2)
    line = machine.diagnose().line
    assert line is not None
    clock = chronyconf.refclocks([chronyconf.Directive("refclock", line.split()[1:], "here:1")])[0]
    assert clock.number("poll", 0) == -2  # 0.25 s: the shortest in which a sample comes every time
    assert 2 * 123_456e-9 <= clock.number("delay", 0) <= 2.2 * 123_456e-9
    assert 1e-9 <= clock.number("precision", 0) < 1e-5
    with Chronyd(build("chronyd"), [line.replace(SOCK, str(machine.inside("/other.sock")))]) as chronyd:
        assert "VMCK" in chronyd.chronyc("sources")


# ---- Broken on purpose ---------------------------------------------------------------------------------------


class Broken(NamedTuple):
    """What is done to the machine; the check that must see it, and words of the cause and of the cure."""

    name: str
    do: Callable[[Machine], object]
    check: str
    cause: str
    cure: str
    level: str = PROBLEM
    #: What else is bound to be wrong then.
    also: frozenset[str] = frozenset()


def absent(machine: Machine) -> None:
    machine.set(device="/dev/vmclock7")


def hypervisor_without(machine: Machine) -> None:
    absent(machine)
    machine.remove("/sys/bus/acpi/devices/AMZNC10C:00/status")
    machine.inside("/sys/bus/acpi/devices/AMZNC10C:00").rmdir()


def module_not_loaded(machine: Machine) -> None:
    absent(machine)
    machine.write("/lib/modules/7.0.4-cloud-amd64/modules.dep", "kernel/drivers/ptp/ptp_vmclock.ko.xz:\n")


def kernel_too_old(machine: Machine) -> None:
    absent(machine)
    machine.write("/proc/sys/kernel/osrelease", "6.1.0-37-amd64\n")


def driver_refused(machine: Machine) -> None:
    absent(machine)
    machine.write("/sys/module/ptp_vmclock/refcnt", "0\n")


def running_program(name: str) -> Callable[[Machine], None]:
    return lambda machine: machine.write("/proc/200/comm", f"{name}\n")


def chrony_conf(text: str) -> Callable[[Machine], None]:
    return lambda machine: machine.append("/etc/chrony/chrony.conf", text)


def no_time(machine: Machine) -> None:
    machine.page(counter_id=model.COUNTER_NONE, clock_status=0)
    machine.remove("/etc/chrony/sources.d/pool.sources")


def ntpd_in_place_of_chronyd(machine: Machine, ntp_conf: str) -> None:
    machine.set(shm=["2"])
    machine.write("/etc/ntpsec/ntp.conf", ntp_conf)
    machine.write("/proc/100/comm", "ntpd\n")
    machine.write("/proc/100/cmdline", "/usr/sbin/ntpd\0-p\0/run/ntpd.pid\0")


def segment_of(owner: int, mode: str) -> Callable[[Machine], None]:
    def do(machine: Machine) -> None:
        machine.set(shm=["2"])
        head = "key shmid perms size cpid lpid nattch uid gid cuid cgid\n"
        machine.write("/proc/sysvipc/shm", head + f"{0x4E545032} 0 {mode} 96 1 1 1 {owner} 0 {owner} 0\n")
        machine.set(status="/run/nobody.sock")

    return do


WITHOUT_DAEMON = frozenset({"daemon"})

BROKEN = (
    Broken("hypervisor without", hypervisor_without, "device", "the hypervisor offers no vmclock", "-device vmclock"),
    Broken("module not loaded", module_not_loaded, "device", "the module ptp_vmclock is not loaded", "modprobe"),
    Broken("kernel too old", kernel_too_old, "device", "6.1.0-37-amd64 is too old", "6.13 or later"),
    Broken(
        "simulation gone",
        lambda machine: machine.set(device="/run/page"),
        "device",
        "/run/page is not there",
        "vmclock-refclock simulate /run/page",
    ),
    Broken("kernel without the module", absent, "device", "built without the module", "linux-modules-extra"),
    Broken("driver refused the page", driver_refused, "device", "has refused", "dmesg"),
    Broken(
        "configuration",
        lambda machine: machine.write("/etc/vmclock-refclock.toml", 'sokc = ["/x"]\n'),
        "configuration",
        "no option 'sokc'",
        "there are: device, sock",
    ),
    Broken("no page", lambda machine: machine.page(magic=1), "page", "no vmclock page: magic", "--device"),
    Broken("stalled page", lambda machine: machine.page(seq_count=3), "page", "is being written", "hypervisor's side"),
    Broken("no time, nothing else", no_time, "page-time", "neither a fallback nor an NTP source", "ptp_kvm"),
    Broken(
        "no time, but NTP",
        lambda machine: machine.page(counter_id=model.COUNTER_NONE, clock_status=0),
        "page-time",
        "once NTP has answered",
        "ptp_kvm",
        NOTE,
    ),
    Broken(
        "fallback is the page",
        lambda machine: machine.set(fallback="/dev/ptp0"),
        "fallback",
        "the vmclock page itself",
        "another PTP clock",
    ),
    Broken(
        "fallback missing",
        lambda machine: machine.set(fallback="/dev/ptp9"),
        "fallback",
        "/dev/ptp9 is not there",
        "modprobe ptp_kvm",
    ),
    Broken(
        "unreliable host",
        lambda machine: machine.page(clock_status=model.UNRELIABLE),
        "page-status",
        "the hypervisor's clock is unreliable",
        "those who run it",
    ),
    Broken(
        "picoseconds",
        lambda machine: machine.page(time_maxerror_nanosec=10_000_000),
        "page-bound",
        "in picoseconds, as early vmclock headers had them",
        "newer hypervisor",
    ),
    Broken(
        "wide bound",
        lambda machine: machine.page(time_maxerror_nanosec=5_000_000_000),
        "page-bound",
        "wider than max-error",
        "max-error",
    ),
    Broken("+37", lambda machine: machine.page(tai_offset_sec=37), "tai-sign", "+37 s: the wrong sign", "makers", NOTE),
    Broken(
        "early leap values",
        lambda machine: machine.page(leap_indicator=6),
        "leap-indicator",
        "an early vmclock header",
        "newer hypervisor",
    ),
    Broken(
        "a disruption is announced",
        lambda machine: machine.page(flags=model.TAI_OFFSET_VALID | model.DISRUPTION_IMMINENT),
        "announced",
        "within about an hour",
        "nothing",
        NOTE,
        frozenset({"page-bound"}),
    ),
    Broken(
        "unstable clocksource",
        lambda machine: (
            machine.write(f"{CLOCKSOURCE}/current_clocksource", "hpet\n"),
            machine.write(f"{CLOCKSOURCE}/available_clocksource", "hpet acpi_pm\n"),
        ),
        "clocksource",
        "found " + COUNTER + " unstable",
        "tsc=reliable" if COUNTER == "tsc" else "dmesg",
    ),
    Broken(
        "another clocksource",
        lambda machine: (
            machine.write(f"{CLOCKSOURCE}/current_clocksource", "kvm-clock\n"),
            machine.write(f"{CLOCKSOURCE}/available_clocksource", f"kvm-clock {COUNTER}\n"),
        ),
        "clocksource",
        f"kvm-clock, not {COUNTER}",
        "current_clocksource",
        NOTE,
    ),
    Broken(
        "TAI taken for UTC",
        lambda machine: machine.page(tai_offset_sec=0),
        "offset",
        "37.0 s behind the page: TAI taken for UTC",
        "refclock PHC",
    ),
    Broken("timesyncd", running_program("systemd-timesyn"), "disciplines", "systemd-timesyn", "systemd-timesyncd"),
    Broken("ntpd beside chronyd", running_program("ntpd"), "disciplines", "beside chronyd", "disable --now ntpsec"),
    Broken("phc2sys", running_program("phc2sys"), "disciplines", "phc2sys disciplines", "disable --now phc2sys"),
    Broken(
        "ClockBound in chronyd's place",
        lambda machine: (
            machine.set(chronyd="none"),
            machine.write("/proc/100/comm", "cron\n"),
            machine.write("/proc/200/comm", "clockbound\n"),
        ),
        "disciplines",
        "clockbound disciplines the clock and knows nothing of this daemon",
        "disable --now clockbound",
    ),
    Broken("VMware Tools", running_program("vmtoolsd"), "guest-agents", "vmtoolsd", "timesync disable", NOTE),
    Broken(
        "Hyper-V",
        lambda machine: machine.write("/sys/bus/vmbus/devices/1/class_id", "{9527e630-d0ae-497b-adce-e80ab0175caf}\n"),
        "guest-agents",
        "Hyper-V's time synchronisation",
        "Integration Services",
        NOTE,
    ),
    Broken(
        "daemon does not run",
        lambda machine: machine.set(status="/run/nobody.sock"),
        "daemon",
        "the daemon does not run",
        "systemctl enable --now vmclock-refclock",
    ),
    Broken(
        "chronyd does not run",
        lambda machine: (machine.set(chronyd="/run/none/chronyd.sock"), machine.write("/proc/100/comm", "cron\n")),
        "chronyd",
        "chronyd does not run: its socket /run/none/chronyd.sock is not there",
        "systemctl enable --now chrony",
    ),
    Broken(
        "command socket elsewhere",
        lambda machine: (
            machine.set(chronyd="/run/none/chronyd.sock"),
            machine.append("/etc/chrony/chrony.conf", "bindcmdaddress /run/other/chronyd.sock\n"),
        ),
        "chronyd",
        "command socket is /run/other/chronyd.sock (/etc/chrony/chrony.conf:7)",
        'chronyd = "/run/other/chronyd.sock"',
    ),
    Broken(
        "no refclock line",
        lambda machine: machine.remove("/etc/chrony/conf.d/vmclock.conf"),
        "refclock-line",
        "no refclock line in /etc/chrony/chrony.conf",
        f"add `refclock SOCK {SOCK} refid VMCK poll -4",
        also=frozenset({"chronyd-follows"}),
    ),
    Broken(
        "only another feeder's line",
        lambda machine: machine.write(
            "/etc/chrony/conf.d/vmclock.conf", "refclock SOCK /run/chrony.ttyS0.sock refid GPS\n"
        ),
        "refclock-line",
        "no refclock line in /etc/chrony/chrony.conf",
        f"add `refclock SOCK {SOCK} refid VMCK poll -4",
        also=frozenset({"chronyd-follows"}),
    ),
    Broken(
        "the daemon has no sock",
        lambda machine: (
            machine.replace("/etc/vmclock-refclock.toml", f'sock = ["{SOCK}"]', ""),
            machine.set(status="/run/nobody.sock"),
        ),
        "refclock-line",
        f"chronyd listens on {SOCK} (/etc/chrony/conf.d/vmclock.conf:1), the daemon has no sock",
        f'sock = ["{SOCK}"]',
        also=frozenset({"daemon", "sinks", "chronyd-follows"}),
    ),
    Broken(
        "line with another path",
        lambda machine: machine.replace("/etc/chrony/conf.d/vmclock.conf", SOCK, "/run/chrony.other.sock"),
        "refclock-line",
        f"chronyd listens on /run/chrony.other.sock (/etc/chrony/conf.d/vmclock.conf:1), the daemon writes to {SOCK}",
        'sock = ["/run/chrony.other.sock"]',
        also=frozenset({"chronyd-follows"}),
    ),
    Broken(
        "no configuration of chronyd",
        lambda machine: machine.remove("/etc/chrony/chrony.conf"),
        "refclock-line",
        "chronyd has no configuration",
        "apt install chrony",
        also=frozenset({"chronyd-follows"}),
    ),
    Broken(
        "interval longer than the poll",
        lambda machine: machine.set(interval=1.0),
        "poll-interval",
        "chronyd polls every 0.0625 s",
        "interval = 0.05",
    ),
    Broken(
        "tai in the line",
        lambda machine: machine.replace("/etc/chrony/conf.d/vmclock.conf", "prefer", "prefer tai"),
        "line-options",
        "the refclock line has `tai`",
        "take it out",
    ),
    Broken(
        "claims too much",
        lambda machine: machine.replace("/etc/chrony/conf.d/vmclock.conf", "delay 4e-5", "delay 1e-7"),
        "delay",
        "claims 50 ns",
        "`delay ",
        NOTE,
    ),
    Broken(
        "PHC of the same page",
        chrony_conf("refclock PHC /dev/ptp0 tai poll 0\n"),
        "configured-twice",
        "the same page twice: `refclock PHC /dev/ptp0 tai poll 0` (/etc/chrony/chrony.conf:7)",
        "remove /etc/chrony/chrony.conf:7",
    ),
    Broken(
        "SOCK and SHM",
        lambda machine: (
            machine.set(shm=["2"], status="/run/nobody.sock"),
            machine.append("/etc/chrony/chrony.conf", "refclock SHM 2:perm=0600\n"),
        ),
        "configured-twice",
        "the same page twice: /etc/chrony/conf.d/vmclock.conf:1 and /etc/chrony/chrony.conf:7",
        "keep the SOCK line",
        also=WITHOUT_DAEMON,
    ),
    Broken(
        "PHC missing",
        chrony_conf("refclock PHC /dev/ptp5\n"),
        "phc-missing",
        "chronyd does not start without it",
        "remove /etc/chrony/chrony.conf:7",
    ),
    Broken(
        "makestep at any time",
        lambda machine: machine.replace("/etc/chrony/chrony.conf", "makestep 1 3", "MakeStep 0.1 -1"),
        "makestep",
        "`makestep 0.1 -1` (/etc/chrony/chrony.conf:4)",
        "makestep 1 3",
    ),
    Broken("maxchange", chrony_conf("maxchange 1000 1 2\n"), "panic", "chronyd ends itself", "remove it"),
    Broken("local", chrony_conf("local stratum 10\n"), "local-reference", "are not told", "remove it", NOTE),
    Broken(
        "smeared server",
        lambda machine: machine.write("/etc/chrony/sources.d/x.sources", "server time2.google.com iburst\n"),
        "smeared-servers",
        "time2.google.com (/etc/chrony/sources.d/x.sources:1) smears leap seconds",
        "pool.ntp.org",
    ),
    Broken(
        "expired leap table",
        chrony_conf("leapseclist /etc/leap-seconds.list\n"),
        "leap-table",
        "/etc/leap-seconds.list (/etc/chrony/chrony.conf:7) is not there",
        "tzdata",
    ),
    Broken(
        "expired leap table of the system",
        lambda machine: machine.write("/usr/share/zoneinfo/leap-seconds.list", f"#@ {1_500_000_000 + NTP_ERA_S}\n"),
        "leap-table",
        "expired on 2017-07-14",
        "tzdata",
    ),
    Broken(
        "right/UTC gone",
        lambda machine: machine.remove("/usr/share/zoneinfo/right/UTC"),
        "leap-table",
        "/usr/share/zoneinfo/right/UTC is not there",
        "leapseclist",
    ),
    Broken(
        "ntpd panics",
        lambda machine: ntpd_in_place_of_chronyd(machine, "refclock shm unit 2 refid VMCK\n"),
        "panic",
        "1000 s off (no `tinker panic 0` in /etc/ntpsec/ntp.conf)",
        "tinker panic 0",
        also=frozenset({"ntpd-unit"}),
    ),
    Broken(
        "ntpd reads another unit",
        lambda machine: (
            ntpd_in_place_of_chronyd(machine, "tinker panic 0\nserver 127.127.28.1 prefer # ours\n"),
            machine.set(status="/run/nobody.sock"),
        ),
        "ntpd-unit",
        "ntpd reads shared memory 1 (/etc/ntpsec/ntp.conf), the daemon writes 2",
        'shm = ["1"]',
        also=WITHOUT_DAEMON,
    ),
    Broken("segment of another", segment_of(1234, "600"), "segment", "made by user 1234", "ipcrm", also=WITHOUT_DAEMON),
    Broken("segment for all", segment_of(0, "666"), "segment", "anyone may write", "ipcrm", NOTE, WITHOUT_DAEMON),
    Broken(
        "AppArmor",
        lambda machine: (
            machine.write("/sys/kernel/security/apparmor/profiles", "/usr/sbin/chronyd (enforce)\n"),
            machine.append("/etc/chrony/chrony.conf", "refclock SOCK /var/lib/vmclock/chrony.sock\n"),
        ),
        "apparmor",
        "AppArmor does not let chronyd make /var/lib/vmclock/chrony.sock",
        f"use {SOCK}, or add",
    ),
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.name)
def test_a_broken_machine_is_told_cause_and_cure(broken: Broken, machine: Machine) -> None:
    broken.do(machine)
    if broken.check == "configuration":
        done = run("doctor", "--root", machine.root, "--json")
        assert done.returncode == 1, done.stderr
        said = json.loads(done.stdout)
        findings = [Finding(**finding) for finding in said["findings"]]
    else:
        diagnosis = machine.diagnose()
        findings = diagnosis.findings
        assert diagnosis.good == all(finding.level != PROBLEM for finding in findings)
    found = next((finding for finding in findings if finding.check == broken.check), None)
    assert found is not None, findings
    assert found.level == broken.level
    assert broken.cause in found.what
    assert broken.cure in found.cure
    others = {finding.check for finding in findings if finding.level != GOOD} - {broken.check}
    consequences = {"refclock-line", "sinks"} if broken.check == "configuration" else set()
    assert others <= broken.also | consequences, [finding for finding in findings if finding.check in others]


def test_fifteen_and_more() -> None:
    """Every check has something broken made for it, here or in a test of its own."""
    own = {"permission", "sinks", "sock", "chronyd-follows", "right-to-step", "selinux"}
    assert len(BROKEN) >= 15
    names = {check.__name__.replace("_", "-") for check in CHECKS}
    assert names == {broken.check for broken in BROKEN} | own


def test_the_exit_status_and_the_text(machine: Machine) -> None:
    machine.replace("/etc/chrony/chrony.conf", "makestep 1 3", "makestep 0.1 -1")
    done = run("doctor", "--root", machine.root)
    assert done.returncode == 1
    assert "1 problem" in done.stdout
    assert "-> `makestep 1 3`" in done.stdout
    painted = as_text(machine.diagnose(), colour=True)
    assert "\033[31mproblem" in painted and "\033[32mgood" in painted


# ---- Permissions ---------------------------------------------------------------------------------------------


def diagnose_as(prefix: tuple[str, ...], root: Path) -> dict[str, Finding]:
    done = run("doctor", "--root", root, "--json", prefix=prefix)
    assert done.returncode in (0, 1), done.stderr
    return {finding["check"]: Finding(**finding) for finding in json.loads(done.stdout)["findings"]}


def test_refused_permissions_are_explained(short_path: Path, nobody: tuple[str, ...]) -> None:
    machine = populate(short_path)
    page = write_page(machine.inside("/dev/vmclock0"), make_page())
    page.chmod(0o600)
    (short_path / "run/chrony").mkdir(parents=True)
    with (
        contextlib.closing(bound(machine.inside(SOCK))),
        contextlib.closing(bound(short_path / "run/chrony/chronyd.sock")),
    ):
        found = diagnose_as(nobody, short_path)
    assert found["permission"].level == PROBLEM
    assert "may not read /dev/vmclock0 (mode 0600)" in found["permission"].what
    assert 'KERNEL=="vmclock[0-9]*"' in found["permission"].cure
    assert found["sock"].level == PROBLEM
    assert f"permission refused: this user may not write to {SOCK}" in found["sock"].what
    assert "root" in found["sock"].cure
    assert found["chronyd"].level == PROBLEM
    assert "permission refused: chronyd's socket /run/chrony/chronyd.sock" in found["chronyd"].what
    assert "CAP_DAC_OVERRIDE" in found["chronyd"].cure


def bound(path: Path) -> socket.socket:
    """A socket that root has made, as chronyd does: others may not write to it."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    made.bind(str(path))
    path.chmod(0o755)
    return made


def test_a_socket_that_chronyd_has_not_made(short_path: Path) -> None:
    machine = populate(short_path)
    found = machine_findings(machine)
    assert found["sock"].level == PROBLEM
    assert f"{SOCK} is not there, though /etc/chrony/conf.d/vmclock.conf:1 names it" in found["sock"].what
    assert "restart chronyd" in found["sock"].cure
    machine.write(SOCK, "")
    assert "is no socket" in machine_findings(machine)["sock"].what


def machine_findings(machine: Machine) -> dict[str, Finding]:
    return {finding.check: finding for finding in machine.diagnose().findings}


def with_status(machine: Machine, monkeypatch: pytest.MonkeyPatch, **status: Any) -> dict[str, Finding]:
    """What doctor makes of this answer of the daemon's."""
    answer = {"state": "synchronised", "reason": "", "good": True, "sinks": [], "chronyd": None} | status
    monkeypatch.setattr("refclock.system.ask", lambda path, request: answer)
    return machine_findings(machine)


def test_what_the_daemon_says_of_its_sinks(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = populate(short_path)
    sink = {"name": SOCK, "type": "sock", "ok": False, "sent": 0, "dropped": 9, "error": "Permission denied; ask root"}
    found = with_status(machine, monkeypatch, sinks=[sink])
    assert found["sinks"].level == PROBLEM
    assert f"sock {SOCK}: Permission denied" in found["sinks"].what
    assert "chown" in found["sinks"].cure
    found = with_status(machine, monkeypatch, sinks=[sink | {"error": "No such file or directory; restart chronyd"}])
    assert found["sinks"].cure == "restart chronyd"
    write_page(machine.inside("/dev/vmclock0"), make_page())
    found = with_status(machine, monkeypatch, sinks=[])
    assert "feeds nobody" in found["sinks"].what and SOCK in found["sinks"].cure


def test_what_the_daemon_says_of_itself(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = populate(short_path)
    found = with_status(machine, monkeypatch, good=False, state="unsynchronised", reason="the bound is too wide")
    assert found["daemon"].level == PROBLEM
    assert "unsynchronised: the bound is too wide" in found["daemon"].what


def test_selinux(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = populate(short_path)
    machine.write("/sys/fs/selinux/enforce", "1")
    machine.write("/run/chrony/chronyd.sock", "")
    found = with_status(machine, monkeypatch, chronyd={"ok": False, "error": "chronyd did not answer"})
    assert found["selinux"].level == PROBLEM
    assert "chronyd's answers do not arrive" in found["selinux"].what
    assert "semodule -i" in found["selinux"].cure
    assert with_status(machine, monkeypatch)["selinux"].level == GOOD


def test_the_right_to_step(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = populate(short_path)
    monkeypatch.setattr(System, "is_device", True)
    monkeypatch.setattr(System, "daemon", "42")
    machine.write("/proc/42/status", "Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000002\n")
    found = machine_findings(machine)["right-to-step"]
    assert found.level == PROBLEM
    assert "may not set the clock" in found.what and "CAP_SYS_TIME" in found.cure
    machine.write("/proc/42/status", "Uid:\t0\t0\t0\t0\nCapEff:\t0000000002000002\n")
    assert "right-to-step" not in machine_findings(machine)


def test_a_device_for_root_alone(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = populate(short_path)
    write_page(machine.inside("/dev/vmclock0"), make_page()).chmod(0o600)
    monkeypatch.setattr(System, "is_device", True)
    assert machine_findings(machine)["permission"].level == NOTE
    monkeypatch.setattr(System, "daemon", "42")
    machine.write("/proc/42/status", "Uid:\t990\t990\t990\t990\nCapEff:\t0\n")
    found = machine_findings(machine)["permission"]
    assert found.level == PROBLEM and "the daemon's user (990)" in found.what


def test_chronyd_that_follows_nothing(machine: Machine) -> None:
    """A real chronyd whose only source is never fed."""
    line = LINE.replace(SOCK, str(machine.inside("/run/chrony.silent.sock")))
    with Chronyd(build("chronyd"), [line]) as chronyd:
        system = machine.system()
        system.settings.chronyd = str(chronyd.command_socket)
        system.path = lambda path: path if path.startswith(str(chronyd.workdir)) else System.path(system, path)  # type: ignore[method-assign]
        found = {finding.check: finding for finding in diagnose(system).findings}
    assert found["chronyd"].level == GOOD
    assert found["chronyd-follows"].level == PROBLEM
    assert "not synchronised" in found["chronyd-follows"].what and "chronyc sources" in found["chronyd-follows"].cure


# ---- The real machine ----------------------------------------------------------------------------------------


def test_on_this_machine_it_ends_with_findings(tmp_path: Path) -> None:
    """Whatever this machine is like: no traceback, a sensible exit status, nothing left behind."""
    done = run("doctor", "--json", "--status", tmp_path / "none.sock", "--chronyd", "none")
    assert done.returncode in (0, 1), done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["findings"]


def test_an_empty_root_is_all_questions(tmp_path: Path) -> None:
    done = run("doctor", "--json", "--root", tmp_path)
    assert done.returncode == 1, done.stderr
    found = {finding["check"] for finding in json.loads(done.stdout)["findings"]}
    assert {"device", "daemon", "chronyd", "refclock-line"} <= found
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_option_is_a_usage_error() -> None:
    done = run("doctor", "--fallback", "")
    assert done.returncode == 64
    assert "--fallback" in done.stderr


# ---- chrony.conf ---------------------------------------------------------------------------------------------


def test_chrony_conf_is_read_as_chronyd_reads_it(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write(
        "/etc/chrony.conf",
        "! comment\n  % comment\n\nServer a.example  iburst # words, not a comment\n"
        "include /etc/more/*.x\nconfdir /etc/a /etc/b\ninclude /etc/chrony.conf\n",
    )
    machine.write("/etc/more/2.x", "refclock PHC /dev/ptp0:nocrossts tai PREFER poll 0\n")
    machine.write("/etc/more/1.x", "makestep 1 3\n")
    machine.write("/etc/a/same.conf", "driftfile /a\n")
    machine.write("/etc/b/same.conf", "driftfile /b\n")
    machine.write("/etc/b/other.conf", "rtcsync\n")
    machine.write("/etc/b/not.conf.bak", "local\n")
    system = System(options.Settings({}), str(tmp_path))
    assert system.chrony_conf == "/etc/chrony.conf"
    first = system.chrony[:8]
    assert [(each.name, each.where) for each in first] == [
        ("server", "/etc/chrony.conf:4"),
        ("include", "/etc/chrony.conf:5"),
        ("makestep", "/etc/more/1.x:1"),
        ("refclock", "/etc/more/2.x:1"),
        ("confdir", "/etc/chrony.conf:6"),
        ("rtcsync", "/etc/b/other.conf:1"),
        ("driftfile", "/etc/a/same.conf:1"),
        ("include", "/etc/chrony.conf:7"),
    ]
    assert first[0].words == ["a.example", "iburst", "#", "words,", "not", "a", "comment"]
    clock = system.refclocks[0]
    assert (clock.driver, clock.path, clock.options) == ("PHC", "/dev/ptp0", {"tai": "", "prefer": "", "poll": "0"})
    # A file that includes itself comes to an end.
    assert len(system.chrony) < 200


def test_the_file_that_chronyd_was_given(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    machine.write("/etc/chrony.conf", "rtcsync\n")
    machine.write("/srv/own.conf", "refclock SOCK /run/x.sock\n")
    machine.write("/proc/77/comm", "chronyd\n")
    machine.write("/proc/77/cmdline", "/usr/sbin/chronyd\0-f\0/srv/own.conf\0")
    system = System(options.Settings({}), str(tmp_path))
    assert system.chrony_conf == "/srv/own.conf"
    assert system.refclocks[0].path == "/run/x.sock"


def test_nothing_outside_the_root_is_touched(machine: Machine) -> None:
    assert stat.S_ISREG(os.stat(machine.inside("/dev/vmclock0")).st_mode)
    assert machine.system().glob("/dev/vmclock*") == ["/dev/vmclock0"]
    assert machine.system().path("/../../etc/passwd") == f"{machine.root}/etc/passwd"
