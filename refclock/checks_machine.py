"""`doctor`: the checks of the hypervisor's page, the machine and the daemon."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

from .errors import NotPermitted, PageInvalid, PageStalled
from .finding import SOCK_PATH, Finding, from_error, good, note, problem
from .model import (
    COUNTER_X86_TSC,
    FREERUNNING,
    LEAPS,
    SYNCHRONIZED,
    clock_status_name,
    time_type_name,
)
from .page import LOCAL_COUNTER_ID
from .show import seconds
from .timescale import odd_tai_sign, why_no_time

if TYPE_CHECKING:
    from collections.abc import Callable

    from .system import System

NSEC_PER_SEC = 1_000_000_000
FIRST_KERNEL = (6, 13)
#: TAI - UTC since 2017, and what it may have become when you read this.
TAI_OFFSETS_S = range(35, 41)


def configuration(system: System) -> Finding | None:
    """The daemon's configuration file can be used."""
    if not system.config_error:
        return None
    what, _, cure = system.config_error.partition("; ")
    return problem(f"the daemon does not start: {what}", cure or "`vmclock-refclock validate FILE` after the change")


# ---- The device ----------------------------------------------------------------------------------------------


def device(system: System) -> Finding | None:
    """The device is there; if not: too old a kernel, no module, or a hypervisor without it."""
    path, release = system.settings.device, system.release
    if system.exists(path):
        return good(f"{path} is there")
    if not path.startswith("/dev/"):
        return problem(f"{path} is not there", f"`vmclock-refclock simulate {path}` makes one; or name the device")
    offered = system.glob("/sys/bus/acpi/devices/AMZNC10C:*") or _in_device_tree(system)
    if not offered:
        return problem(
            f"{path} is not there: the hypervisor offers no vmclock (no ACPI device AMZNC10C)",
            "QEMU 10 or later: add `-device vmclock`; EC2 and Firecracker 1.15 have it; else this machine needs NTP",
        )
    if system.exists("/sys/module/ptp_vmclock") or system.exists("/sys/bus/platform/drivers/vmclock"):
        return problem(
            f"{path} is not there although its driver is loaded: the driver has refused the hypervisor's page",
            "`dmesg | grep vmclock` says why; a page of 4 KiB needs a kernel with pages of 4 KiB",
        )
    indices = [
        f"{base}/modules/{release}/modules.{kind}" for base in ("/lib", "/usr/lib") for kind in ("dep", "builtin")
    ]
    if any("ptp_vmclock" in system.read(index) for index in indices):
        return problem(
            f"{path} is not there: the module ptp_vmclock is not loaded",
            "`modprobe ptp_vmclock`, and `echo ptp_vmclock > /etc/modules-load.d/vmclock.conf` for the next boot",
        )
    if system.version < FIRST_KERNEL:
        return problem(
            f"{path} is not there: Linux {release or 'of this machine'} is too old for the hypervisor's vmclock",
            "boot Linux 6.13 or later (Debian: linux-image-cloud of backports); Amazon Linux has it in 5.10 and 6.1",
        )
    return problem(
        f"{path} is not there: Linux {release} was built without the module ptp_vmclock",
        "install the package with the rest of the modules (linux-modules-extra), or another kernel",
    )


def _in_device_tree(system: System) -> bool:
    base = "/sys/firmware/devicetree/base"
    nodes = [path for depth in ("*", "*/*") for path in system.glob(f"{base}/{depth}/compatible")]
    return any("amazon,vmclock" in system.read(node) for node in nodes)


def permission(system: System) -> Finding | None:
    """The device may be read by this user, by the daemon's, and by others."""
    path = system.settings.device
    there = system.stat(path)
    if there is None:
        return None
    cure = 'a udev rule: KERNEL=="vmclock[0-9]*", GROUP="clock", MODE="0644"; then `udevadm trigger`'
    if isinstance(system.page_error, NotPermitted):
        return problem(f"this user may not read {path} (mode {stat.S_IMODE(there.st_mode):04o})", cure)
    daemon = system.process(system.daemon, "Uid").split()[:1] if system.daemon else []
    if daemon and not there.st_mode & 0o044 and daemon[0] not in ("0", str(there.st_uid)):
        return problem(f"the daemon's user ({daemon[0]}) may not read {path}", cure)
    if system.is_device and not there.st_mode & 0o044:
        return note(f"only root may read {path}", cure)
    return good(f"{path} may be read")


def page(system: System) -> Finding | None:
    """What the device holds is a page, and stands still long enough to be read."""
    error = system.page_error
    if system.page is None:
        if isinstance(error, PageStalled):
            cure = "the hypervisor's side is broken: tell those who run it; until then NTP has to do"
            return problem(str(error).partition("; ")[0], cure)
        if isinstance(error, PageInvalid):
            return problem(
                str(error).partition("; ")[0], "name the vmclock device with --device, or upgrade this program"
            )
        return None
    what = "a device" if system.is_device else "a plain file, so a simulation: the clock is never set from it"
    return good(f"{system.settings.device} holds a page: {what}")


def page_time(system: System) -> Finding | None:
    """The page gives time; if not, there is a fallback, or at least chronyd has other sources."""
    snapshot = system.page
    if snapshot is None:
        return None
    if system.kind == "time":
        return good(f"the page gives time ({time_type_name(snapshot.time_type)})")
    why = why_no_time(snapshot, LOCAL_COUNTER_ID) or "the page gives no time"
    if system.settings.fallback is not None:
        return good(f"{why}; the fallback is {system.settings.fallback}")
    candidate = next((clock for clock in system.ptp_clocks if not clock[1].startswith("vmclock")), None)
    cure = (
        f'fallback = "{candidate[0]}" ({candidate[1]})'
        if candidate
        else '`modprobe ptp_kvm`, then fallback = "/dev/ptp0"'
    )
    if system.directives("server", "pool", "peer"):
        return note(f"{why}, and there is no fallback: after a restore the clock is right once NTP has answered", cure)
    return problem(f"{why}, and there is neither a fallback nor an NTP source", cure + "; or add an NTP server")


def fallback(system: System) -> Finding | None:
    """The fallback is there, and is not the same page once more."""
    path = system.settings.fallback
    if path is None:
        return None
    name = system.read(f"/sys/class/ptp/{os.path.basename(path)}/clock_name").strip()
    if name.startswith("vmclock"):
        return problem(f"the fallback {path} is the vmclock page itself", "name another PTP clock: ptp_kvm, ptp_hyperv")
    if not system.exists(path):
        return problem(
            f"the fallback {path} is not there", "`modprobe ptp_kvm`, or name another PTP clock with --fallback"
        )
    return good(f"the fallback {path} is there{f' ({name})' if name else ''}")


# ---- What the page says --------------------------------------------------------------------------------------


def page_status(system: System) -> Finding | None:
    """The hypervisor calls its own clock good."""
    if system.page is None or system.kind != "time":
        return None
    word = clock_status_name(system.page.status)
    if system.page.status == SYNCHRONIZED:
        return good("the hypervisor's clock is synchronized")
    if system.page.status == FREERUNNING:
        return note(
            "the hypervisor's clock is freerunning: good as long as its bound is", "tell those who run the host"
        )
    return problem(f"the hypervisor's clock is {word}: nothing is fed", "it is the host's clock: tell those who run it")


def page_bound(system: System) -> Finding | None:
    """The page gives a bound, one that is not too wide; picoseconds taken for nanoseconds look too wide."""
    sample, limit_ns = system.sample, system.settings.max_error
    if sample is None or system.page is None:
        return None
    bound_ns = sample.maxerror_ns
    if bound_ns is None:
        return note("the page gives no bound for its error", "give the refclock line a `delay` that you believe in")
    if bound_ns <= limit_ns:
        return good(f"the page's bound is {seconds(bound_ns)}")
    what = f"the page's bound is {seconds(bound_ns)}, wider than max-error ({seconds(limit_ns)}): nothing is fed"
    cure = "tell those who run the host, or set max-error to what you can live with"
    raw_ns = system.page.time_maxerror_nanosec or 0
    if raw_ns > limit_ns > raw_ns // 1000:
        what += f"; in picoseconds, as early vmclock headers had them, it would be {seconds(raw_ns // 1000)}"
        cure = "ask for a newer hypervisor if it means picoseconds, else " + cure
    return problem(what, cure)


def tai_sign(system: System) -> Finding | None:
    """The page's TAI offset has the sign that the ABI wants."""
    if system.page is None or not odd_tai_sign(system.page):
        return None
    return note(
        f"the page says UTC - TAI = +{system.page.tai_offset_sec} s: the wrong sign, here taken as meant",
        "tell the hypervisor's makers; do not use the kernel's PTP clock of this page, which is 74 s off",
    )


def leap_indicator(system: System) -> Finding | None:
    """The page's leap indicator is one that the ABI knows."""
    if system.page is None or (system.page.leap_indicator or 0) < len(LEAPS):
        return None
    return problem(
        f"the page's leap indicator is {system.page.leap_indicator}: from an early vmclock header, or nonsense",
        "ask for a newer hypervisor; until then nothing is fed while it stays so",
    )


def announced(system: System) -> Finding | None:
    """The hypervisor announces a disruption."""
    if system.page is None or system.page.warning is None:
        return None
    span = "an hour" if system.page.warning == "imminent" else "a day"
    return note(f"the hypervisor announces a disruption within about {span}", "nothing: the daemon will deal with it")


def offset(system: System) -> Finding | None:
    """The system clock agrees with the page; 37 s between them is TAI taken for UTC."""
    sample = system.sample
    if sample is None:
        return None
    off_s = abs(sample.offset_ns) / NSEC_PER_SEC
    side = "behind" if sample.offset_ns > 0 else "ahead of"
    if any(abs(off_s - factor * tai_s) < 1 for tai_s in TAI_OFFSETS_S for factor in (1, 2)):
        return problem(
            f"the system clock is {off_s:.1f} s {side} the page: TAI taken for UTC somewhere",
            "look for a source that tells TAI: `refclock PHC` without `tai` on Linux 7.0 or later, phc2sys without -O",
        )
    if abs(sample.offset_ns) > system.settings.max_error:
        cure = "start the daemon, and chronyd with its refclock line; `vmclock-refclock wait` tells when it is good"
        return note(f"the system clock is {seconds(abs(sample.offset_ns))} {side} the page", cure)
    return good(f"the system clock is within {seconds(abs(sample.offset_ns) + sample.uncertainty_ns)} of the page")


# ---- The machine ---------------------------------------------------------------------------------------------


def clocksource(system: System) -> Finding | None:
    """The system clock runs on the page's counter, which the kernel trusts."""
    base = "/sys/devices/system/clocksource/clocksource0"
    current = system.read(f"{base}/current_clocksource").strip()
    available = system.read(f"{base}/available_clocksource").split()
    if not current:
        return None
    counter = "tsc" if LOCAL_COUNTER_ID == COUNTER_X86_TSC else "arch_sys_counter"
    if current == counter:
        return good(f"the clocksource is {current}, the page's counter")
    if counter not in available:
        return problem(
            f"the clocksource is {current}: the kernel has found {counter} unstable and given it up",
            f"boot with {counter}=reliable on the kernel's command line" if counter == "tsc" else "see `dmesg`",
        )
    return note(
        f"the clocksource is {current}, not {counter}, the page's counter: less exact after a migration",
        f"`echo {counter} > {base}/current_clocksource`, and clocksource={counter} on the kernel's command line",
    )


#: Programs that discipline the clock, by the name of the process (15 letters at most), and what ends them.
DISCIPLINES = {
    "systemd-timesyn": "systemctl disable --now systemd-timesyncd",
    "ntpd": "systemctl disable --now ntpsec ntp ntpd",
    "openntpd": "systemctl disable --now openntpd",
    "ntp-daemon": "systemctl disable --now ntpd-rs",
    "phc2sys": "systemctl disable --now phc2sys",
    "ntpdate": "remove the job that runs it",
    "sntp": "remove the job that runs it",
    "clockbound": "systemctl disable --now clockbound",
}
CONSUMERS = ("ntpd", "ntp-daemon")

#: Programs that set the clock when the host asks for it, mostly after a restore, and how to keep them from it.
GUEST_AGENTS = {
    "vmtoolsd": "`vmware-toolbox-cmd timesync disable`, and time.synchronize.* = 0 in the machine's .vmx",
    "VBoxService": "`VBoxService --disable-timesync`",
    "qemu-ga": "block-rpcs=guest-set-time in qemu-ga.conf",
    "prltoolsd": "turn the time synchronisation off in the machine's settings",
    "xe-daemon": "xenstore: platform/timeoffset, and independent_wallclock=1",
}

#: The class of Hyper-V's time synchronisation among the devices of its bus (the kernel's include/linux/hyperv.h).
HYPERV_TIMESYNC = "9527e630-d0ae-497b-adce-e80ab0175caf"


def disciplines(system: System) -> Finding | None:
    """One program disciplines the clock, not two."""
    running = [name for name in DISCIPLINES if name in system.programs]
    if "chronyd" in system.programs:
        # Beside chronyd ClockBound leaves the clock alone.
        fighting = [name for name in running if name != "clockbound"]
    else:
        # Without chronyd one consumer of ours is as it should be.
        keeper = next((name for name in CONSUMERS if name in running), None)
        fighting = [name for name in running if name != keeper] if keeper else running
    if not fighting:
        return good("no two programs discipline the clock")
    beside = "beside chronyd" if "chronyd" in system.programs else "and knows nothing of this daemon"
    return problem(
        f"{', '.join(fighting)} disciplines the clock {beside}: they work against each other",
        "; ".join(f"`{DISCIPLINES[name]}`" for name in fighting),
    )


def guest_agents(system: System) -> Finding | None:
    """A guest agent may set the clock as well, after a restore: a second step, by less exact time."""
    running = [name for name in GUEST_AGENTS if name in system.programs]
    if running:
        cure = "; ".join(GUEST_AGENTS[name] for name in running)
        return note(f"{', '.join(running)} may set the clock too when the host asks for it", cure)
    if any(HYPERV_TIMESYNC in system.read(path) for path in system.glob("/sys/bus/vmbus/devices/*/class_id")):
        cure = "turn off Time Synchronization in the machine's Integration Services"
        return note("Hyper-V's time synchronisation may set the clock too", cure)
    return None


def apparmor(system: System) -> Finding | None:
    """AppArmor lets chronyd make the SOCK where its configuration says."""
    profiles = system.read("/sys/kernel/security/apparmor/profiles")
    if "chronyd (enforce)" not in profiles:
        return None
    rules = system.read("/etc/apparmor.d/local/usr.sbin.chronyd") + system.read("/etc/apparmor.d/usr.sbin.chronyd")
    for clock in system.refclocks:
        if clock.driver == "SOCK" and not _allowed(clock.path) and clock.path not in rules:
            return problem(
                f"AppArmor does not let chronyd make {clock.path} ({clock.where})",
                f"use {SOCK_PATH}, or add `{clock.path} rw,` to /etc/apparmor.d/local/usr.sbin.chronyd and reload it",
            )
    return good("AppArmor lets chronyd make its sockets")


def _allowed(path: str) -> bool:
    """The forms that Debian's profile of chronyd allows: /run/chrony/* and /run/chrony.*.sock."""
    directory, name = os.path.split(path.replace("/var/run/", "/run/", 1) if path.startswith("/var/run/") else path)
    return directory == "/run/chrony" or (directory == "/run" and name.startswith("chrony.") and name.endswith(".sock"))


def selinux(system: System) -> Finding | None:
    """SELinux lets chronyd answer the daemon."""
    if system.read("/sys/fs/selinux/enforce").strip() != "1":
        return None
    chronyd = (system.status or {}).get("chronyd")
    if chronyd is not None and not chronyd["ok"] and system.exists(system.settings.chronyd or ""):
        return problem(
            "SELinux is enforcing and chronyd's answers do not arrive",
            "`semodule -i vmclock-refclock.cil` (packaging/selinux); `ausearch -m avc -ts recent` shows the denial",
        )
    return good("SELinux is enforcing, and chronyd is not kept from answering")


# ---- The daemon ----------------------------------------------------------------------------------------------


def daemon(system: System) -> Finding | None:
    """The daemon runs, and calls the clock good."""
    status = system.status
    if status is None:
        what = system.status_error.partition("; ")[0]
        return problem(f"the daemon does not run: {what}", "`systemctl enable --now vmclock-refclock`")
    state = status["state"] + (f": {status['reason']}" if status["reason"] else "")
    if status["good"]:
        return good(f"the daemon says {state}")
    return problem(f"the daemon says {state}", "the other findings say why; `vmclock-refclock status` shows the rest")


def right_to_step(system: System) -> Finding | None:
    """A daemon that is to step the clock may do so."""
    if system.settings.on_disruption != "step" or not system.is_device or system.daemon_may_set_clock is not False:
        return None
    return problem(
        "the daemon may not set the clock: after a disruption it can only flag it",
        'give it CAP_SYS_TIME (AmbientCapabilities= in its unit), or choose on-disruption = "flag"',
    )


def sinks(system: System) -> Finding | None:
    """What the daemon sends arrives."""
    status = system.status
    failing = [sink for sink in status["sinks"] if sink["error"]] if status is not None else []
    for sink in failing:
        found = from_error(f"{sink['type']} {sink['name']}: {sink['error']}")
        if "ermission" in found.what:
            cure = "run the daemon as root, or chown the socket to its user after each start of chronyd"
            return problem(found.what, cure + " (the unit's comments tell how)")
        return found
    if status is not None and status["sinks"]:
        return good(f"{sum(sink['sent'] for sink in status['sinks'])} samples have gone out")
    if system.kind == "time" and not system.fed("sock") and not system.fed("shm"):
        return problem(
            "the daemon feeds nobody: neither sock nor shm is set", f'sock = ["{SOCK_PATH}"] in its configuration'
        )
    return None


CHECKS: tuple[Callable[[System], Finding | None], ...] = (
    configuration,
    device,
    permission,
    page,
    page_time,
    fallback,
    page_status,
    page_bound,
    tai_sign,
    leap_indicator,
    announced,
    clocksource,
    offset,
    disciplines,
    guest_agents,
    apparmor,
    selinux,
    daemon,
    right_to_step,
    sinks,
)
