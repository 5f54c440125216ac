"""`doctor`: the checks of chronyd and ntpd, and the line for chrony.conf that fits the page."""

from __future__ import annotations

import os
import stat
import time
from math import ceil, floor, log2, log10
from typing import TYPE_CHECKING

from .chronyconf import PATHS
from .finding import SOCK_PATH, Finding, from_error, good, note, problem
from .show import seconds

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .chronyconf import Refclock
    from .system import System

NSEC_PER_SEC = 1_000_000_000
NTP_SEGMENT_KEY = 0x4E545030
#: Seconds from NTP's era (1900) to POSIX's.
NTP_ERA_S = 2_208_988_800


# ---- chronyd -------------------------------------------------------------------------------------------------


def chronyd(system: System) -> Finding | None:
    """chronyd runs and answers commands."""
    path = system.settings.chronyd
    if path is None or (system.chrony_conf is None and system.ntp[0]):
        return None
    if system.tracking is not None:
        return good(f"chronyd answers on {path}")
    for directive in system.directives("bindcmdaddress"):
        other = "".join(directive.words[:1])
        if other.startswith("/") and other != path:
            return problem(
                f"chronyd's command socket is {other} ({directive.where}), the daemon looks for {path}",
                f'chronyd = "{other}" in the daemon\'s configuration' if other != "/" else "remove that directive",
            )
    if not system.exists(path):
        what = "chronyd does not run" if "chronyd" not in system.programs else "chronyd runs elsewhere"
        return problem(f"{what}: its socket {path} is not there", "`systemctl enable --now chrony` (Fedora: chronyd)")
    if "may not write" in system.chronyd_error:
        cure = "run this as root; the daemon needs to be chronyd's user, or root with CAP_DAC_OVERRIDE"
        return problem(f"permission refused: chronyd's socket {path}", cure)
    return from_error(system.chronyd_error)


def chronyd_follows(system: System) -> Finding | None:
    """chronyd is synchronised, and to the page where that gives time."""
    tracking = system.tracking
    if tracking is None:
        return None
    if not tracking.normal:
        return problem(
            "chronyd is not synchronised",
            "`chronyc sources` shows which sources answer; after a start or a disruption wait for a moment",
        )
    refid = tracking.reference_id.to_bytes(4, "big").rstrip(b"\0")
    name = refid.decode("ascii") if refid.isalnum() else ".".join(map(str, refid))
    if system.kind != "time" or name in [clock.options.get("refid") for clock in system.ours]:
        return good(f"chronyd is synchronised ({name})")
    return note(f"chronyd follows another source than the page ({name})", "add `prefer` to the refclock line")


def refclock_line(system: System) -> Finding | None:
    """chronyd's configuration has a refclock line for the socket that the daemon writes to."""
    if system.settings.chronyd is None or system.kind == "signal":
        return None
    if system.chrony_conf is None:
        if system.ntp[0]:
            return None
        return problem(f"chronyd has no configuration ({' or '.join(PATHS)})", "install chrony: `apt install chrony`")
    if system.ours:
        return good(f"chronyd has its line: {system.ours[0].where}")
    line = suggested_line(system) or f"refclock SOCK {SOCK_PATH} refid VMCK poll -4 filter 1"
    fed = system.fed("sock")
    # Not another feeder's, such as gpsd's.
    meant = next((clock for clock in system.refclocks if clock.driver == "SOCK" and "VMCK" in clock.text), None)
    if meant is not None:
        writes = f"the daemon writes to {fed[0]}" if fed else "the daemon has no sock"
        return problem(
            f"chronyd listens on {meant.path} ({meant.where}), {writes}",
            f'the same path in both: sock = ["{meant.path}"] in the daemon\'s configuration',
        )
    if system.fed("shm") and not fed:
        return problem(
            f"the daemon writes to shared memory {', '.join(system.fed('shm'))}, chronyd has no line for it",
            f'better sock = ["{SOCK_PATH}"] in the daemon\'s configuration and `{line}` in {system.chrony_conf}',
        )
    return problem(f"no refclock line in {system.chrony_conf}", f"add `{line}` and restart chronyd")


def sock(system: System) -> Finding | None:
    """chronyd has made the socket that its line names, and the daemon may write to it."""
    for clock in system.ours:
        if clock.driver != "SOCK":
            continue
        there = system.stat(clock.path)
        if there is None:
            what = f"{clock.path} is not there, though {clock.where} names it"
            return problem(what, "restart chronyd: it makes the socket when it starts; its log says if it could not")
        if not stat.S_ISSOCK(there.st_mode):
            return problem(f"{clock.path} is no socket", "remove it and restart chronyd")
        if not os.access(system.path(clock.path), os.W_OK):
            return problem(
                f"permission refused: this user may not write to {clock.path} (owner {there.st_uid})",
                "run this as root; the daemon needs to be root or the socket's owner",
            )
        return good(f"chronyd has made {clock.path}")
    return None


def poll_interval(system: System) -> Finding | None:
    """The daemon sends at least one sample in each of chronyd's polls."""
    between = seconds(system.settings.interval)
    for clock in system.ours:
        poll_s = 2.0 ** clock.number("poll", 4)
        if system.settings.interval > poll_s * NSEC_PER_SEC:
            return problem(
                f"chronyd polls every {poll_s:g} s ({clock.where}), a sample comes every {between}",
                f"interval = {poll_s * 0.8:g}, or `poll {_poll(system)}` in the refclock line",
            )
    return None


def line_options(system: System) -> Finding | None:
    """The refclock line does not move or discard what the daemon feeds: tai, offset, noselect, pps, lock."""
    for clock in system.ours:
        bad = [name for name in ("tai", "pps", "lock", "noselect", "local", "offset") if name in clock.options]
        if bad and not (bad == ["offset"] and clock.number("offset", 0) == 0):
            return problem(
                f"the refclock line has `{' '.join(bad)}` ({clock.where}), wrong for the UTC that it is fed",
                "take it out and restart chronyd",
            )
    return None


def delay(system: System) -> Finding | None:
    """The refclock line claims no better time than the page does."""
    sample = system.sample
    if sample is None or sample.maxerror_ns is None or not system.ours:
        return None
    if sample.maxerror_ns > system.settings.max_error:
        return None  # nothing is fed
    clock = system.ours[0]
    claimed_ns = clock.number("delay", 1e-9) * NSEC_PER_SEC / 2
    if claimed_ns >= sample.maxerror_ns:
        return good("the refclock line's delay covers the page's bound")
    return note(
        f"the refclock line claims {seconds(ceil(claimed_ns))}, the page's bound is {seconds(sample.maxerror_ns)}",
        f"`delay {_text(_delay_s(system))}` in {clock.where}",
    )


def configured_twice(system: System) -> Finding | None:
    """The page comes to chronyd once: not by its PTP clock as well, nor by two sinks."""
    by_name = dict(system.ptp_clocks)
    phcs = [clock for clock in system.refclocks if clock.driver == "PHC" and _is_vmclock(system, clock, by_name)]
    if phcs and system.ours:
        return problem(
            f"chronyd has the same page twice: `{phcs[0].text}` ({phcs[0].where}) beside our line",
            f"remove {phcs[0].where}: two that always agree outvote the honest, and a PHC knows no disruption",
        )
    if phcs:
        return note(
            f"chronyd reads the page's PTP clock ({phcs[0].where}): blind to disruptions, UTC or TAI by the kernel",
            f"in its place: {suggested_line(system) or 'no refclock, as this page gives no time'}",
        )
    if len(system.ours) > 1:
        return problem(
            f"chronyd has the same page twice: {' and '.join(clock.where for clock in system.ours)}",
            "keep the SOCK line, remove the other",
        )
    return None


def _is_vmclock(system: System, clock: Refclock, by_name: dict[str, str]) -> bool:
    real = os.path.realpath(system.path(clock.path))
    device = f"/dev/{os.path.basename(real)}"
    return by_name.get(device, "").startswith("vmclock")


def phc_missing(system: System) -> Finding | None:
    """No PHC that keeps chronyd from starting because it is not there."""
    for clock in system.refclocks:
        if clock.driver == "PHC" and clock.path.startswith("/") and not system.exists(clock.path):
            cure = f"remove {clock.where}, or load the driver before chronyd starts"
            return problem(f"{clock.path} is not there ({clock.where}): chronyd does not start without it", cure)
    return None


def makestep(system: System) -> Finding | None:
    """chronyd does not step on its own, at any time, beside the daemon."""
    for directive in system.directives("makestep"):
        limit = directive.words[1] if len(directive.words) > 1 else ""
        if not limit.startswith("-") or system.kind != "time" or system.settings.on_disruption != "step":
            continue
        return problem(
            f"`{directive.text}` ({directive.where}): chronyd may step at any time, a second step after the daemon's",
            "`makestep 1 3`: at boot only; later the daemon steps, by exactly what was lost",
        )
    return None


def panic(system: System) -> Finding | None:
    """No consumer ends itself because the clock is far off after a restore."""
    for directive in system.directives("maxchange"):
        return problem(
            f"`{directive.text}` ({directive.where}): chronyd ends itself when the clock is far off after a restore",
            "remove it: the daemon checks what it feeds",
        )
    path, lines = system.ntp
    if not path or ("ntpd" not in system.programs and system.chrony_conf is not None):
        return None
    options = [word for line in system.command_lines("ntpd") for word in line[1:]]
    allowed = any(words[0] == "tinker" and _pair(words, "panic") in ("0", "0.0") for words in lines if words)
    if not allowed and not any(_allows_panic(word) for word in options):
        return problem(
            f"ntpd ends itself when the clock is more than 1000 s off (no `tinker panic 0` in {path})",
            f"`tinker panic 0` in {path}, or `ntpd -g`",
        )
    return good("ntpd does not end itself over a large step")


def _allows_panic(option: str) -> bool:
    return option == "--panicgate" or (option[:1] == "-" and option[1:].isalpha() and "g" in option)


def local_reference(system: System) -> Finding | None:
    """With `local` chronyd's own clients are not told of a disruption."""
    for directive in system.directives("local"):
        what = f"`{directive.text}` ({directive.where}): chronyd's NTP clients are not told when its clock is disrupted"
        return note(what, "remove it unless they must have time at any price")
    return None


#: Servers that smear leap seconds over hours, by the ends of their names, and the addresses of some.
SMEARING = (
    "time.google.com",
    "time1.google.com",
    "time2.google.com",
    "time3.google.com",
    "time4.google.com",
    "time.android.com",
    "time.facebook.com",
    "time1.facebook.com",
    "time2.facebook.com",
    "time3.facebook.com",
    "time4.facebook.com",
    "time5.facebook.com",
    "time.aws.com",
    "169.254.169.123",
    "fd00:ec2::123",
    "metadata.google.internal",
)


def smeared_servers(system: System) -> Finding | None:
    """No server that smears leap seconds stands beside the page's time, which does not."""
    servers = [(words.words[0], words.where) for words in system.directives("server", "pool", "peer") if words.words]
    path, lines = system.ntp
    servers += [(words[1], path) for words in lines if words[0] in ("server", "pool") and len(words) > 1]
    smearing = [(name, where) for name, where in servers if _smears(name)]
    if not smearing or system.kind == "signal":
        return None
    name, where = smearing[0]
    return problem(
        f"{name} ({where}) smears leap seconds, the page does not: up to half a second apart on such a day",
        "take servers that do not smear (pool.ntp.org), or none beside the page",
    )


def _smears(server: str) -> bool:
    server = server.lower().rstrip(".")
    return any(server == name or server.endswith("." + name) for name in SMEARING)


def leap_table(system: System) -> Finding | None:
    """The leap second table that chronyd or ntpd is told to use is there and has not expired."""
    files = [(words.words[0], words.where) for words in system.directives("leapseclist") if words.words]
    path, lines = system.ntp
    files += [(words[1], path) for words in lines if words[0] == "leapfile" and len(words) > 1]
    cure = "`apt install --only-upgrade tzdata` (Fedora: dnf), and restart the one that reads it"
    for file, where in files:
        expiry_s = _expiry(system.read(file))
        if expiry_s is None:
            return problem(f"the leap second table {file} ({where}) is not there, or says no date", cure)
        if expiry_s < time.time():
            return problem(f"the leap second table {file} ({where}) expired on {_date(expiry_s)}", cure)
    for directive in system.directives("leapsectz"):
        zone = f"/usr/share/zoneinfo/{''.join(directive.words[:1])}"
        if not system.exists(zone):
            return problem(
                f"`{directive.text}` ({directive.where}): {zone} is not there",
                "`leapseclist /usr/share/zoneinfo/leap-seconds.list` in its place (or install tzdata-legacy)",
            )
        expiry_s = _expiry(system.read("/usr/share/zoneinfo/leap-seconds.list"))
        if expiry_s is not None and expiry_s < time.time():
            return problem(f"the time zones' leap second table expired on {_date(expiry_s)} ({directive.where})", cure)
    return good("the leap second table is in force") if files or system.directives("leapsectz") else None


def _expiry(text: str) -> int | None:
    """When a leap-seconds.list expires (its line ``#@``, in seconds since 1900), as POSIX time."""
    for line in text.splitlines():
        if line.startswith("#@"):
            number = "".join(line[2:].split()[:1])
            return int(number) - NTP_ERA_S if number.isdigit() else None
    return None


def _date(posix_s: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(posix_s))


# ---- ntpd ----------------------------------------------------------------------------------------------------


def _pair(words: Iterable[str], name: str) -> str:
    """The word after ``name``."""
    rest = iter(words)
    return next((next(rest, "") for word in rest if word == name), "")


def ntpd_unit(system: System) -> Finding | None:
    """ntpd reads the unit of shared memory that the daemon writes."""
    path, lines = system.ntp
    units = system.fed("shm")
    if not path or (not units and "ntpd" not in system.programs):
        return None
    read = [_pair(words, "unit") or "0" for words in lines if words[:2] == ["refclock", "shm"]]
    read += [
        words[1].rpartition(".")[2]
        for words in lines
        if words[0] == "server" and words[1:] and words[1].startswith("127.127.28.")
    ]
    if set(read) & set(units):
        return good(f"ntpd reads the unit that the daemon writes: {path}")
    unit = units[0] if units else "2"
    if not read:
        return problem(
            f"no line for shared memory in {path}",
            f"add `refclock shm unit {unit} refid VMCK minpoll 0 maxpoll 4 prefer`",
        )
    return problem(
        f"ntpd reads shared memory {', '.join(read)} ({path}), the daemon writes {', '.join(units) or 'none'}",
        f'shm = ["{read[0]}"] in the daemon\'s configuration',
    )


def segment(system: System) -> Finding | None:
    """Nobody else has made the shared memory, nor may write to it."""
    rows = [line.split() for line in system.read("/proc/sysvipc/shm").splitlines()[1:]]
    for unit in system.fed("shm"):
        for row in rows:
            if len(row) < 8 or int(row[0]) & 0xFFFFFFFF != NTP_SEGMENT_KEY + int(unit):
                continue
            cure = f"`ipcrm -M {NTP_SEGMENT_KEY + int(unit):#x}`, then start the daemon before its reader; or use SOCK"
            owner, mode = int(row[7]), int(row[2], 8) & 0o777
            daemon = system.process(system.daemon, "Uid").split()[:1] if system.daemon else []
            if owner != 0 and [str(owner)] != daemon:
                return problem(f"the shared memory of unit {unit} was made by user {owner}", cure)
            if mode & 0o002:
                return note(f"anyone may write to the shared memory of unit {unit} (mode {mode:03o})", cure)
            return good(f"the shared memory of unit {unit} is root's or the daemon's")
    return None


# ---- The line for chrony.conf --------------------------------------------------------------------------------


def suggested_line(system: System) -> str | None:
    """The refclock line whose delay, precision and poll fit this page; None for a page that is not fed.

    chronyd takes half the delay for the source's own error: delay is twice the page's bound.  precision is what
    the pairing is certain to.  poll is the shortest in which a sample comes every time.
    """
    sample = system.sample
    if sample is None or (sample.maxerror_ns or 0) > system.settings.max_error:
        return None
    paths = system.fed("sock") or [SOCK_PATH]
    precision_s = _round_up(max(sample.uncertainty_ns, 1) / NSEC_PER_SEC)
    options = f"poll {_poll(system)} filter 1 precision {_text(precision_s)} delay {_text(_delay_s(system))} prefer"
    return f"refclock SOCK {paths[0]} refid VMCK {options}"


def _poll(system: System) -> int:
    return max(-6, ceil(log2(system.settings.interval / NSEC_PER_SEC)))


def _delay_s(system: System) -> float:
    assert system.sample is not None
    bound_ns = system.sample.maxerror_ns
    return _round_up(2 * (system.settings.max_error if bound_ns is None else max(bound_ns, 1)) / NSEC_PER_SEC)


def _text(seconds: float) -> str:
    return f"{seconds:g}".replace("e-0", "e-")


def _round_up(value: float) -> float:
    """To two significant digits, away from zero."""
    unit = 10.0 ** (floor(log10(value)) - 1)
    return ceil(value / unit - 1e-9) * unit


CHECKS: tuple[Callable[[System], Finding | None], ...] = (
    chronyd,
    chronyd_follows,
    refclock_line,
    sock,
    poll_interval,
    line_options,
    delay,
    configured_twice,
    phc_missing,
    makestep,
    panic,
    local_reference,
    smeared_servers,
    leap_table,
    ntpd_unit,
    segment,
)
