"""systemd for a guest: an archive on top of the image, with which it boots into Debian's systemd, udevd and journald.

    Guest(layers=[systemd.layer()])

The agent is a service there. Nothing is started beside it: no coldplug, no logins. Debian's units are taken as they
are, chrony's among them, which is not enabled; AppArmor's parser is there for those who have a profile.
"""

from __future__ import annotations

from pathlib import Path

from tests import debs
from tests.guest import build
from tests.guest.cpio import Archive

PROGRAMS = (
    *("usr/bin/systemctl", "usr/bin/journalctl", "usr/bin/udevadm", "usr/bin/systemd-sysusers"),
    *("usr/bin/systemd-tmpfiles", "usr/lib/systemd/systemd", "usr/lib/systemd/systemd-executor"),
    *("usr/lib/systemd/systemd-journald", "usr/lib/systemd/systemd-udevd", "usr/sbin/apparmor_parser"),
)
TARGETS = (
    *("sysinit", "basic", "multi-user", "local-fs", "sockets", "paths", "timers", "slices", "swap"),
    *("shutdown", "umount", "time-set", "time-sync"),
)
SERVICES = (
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
    *("systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"),
)
UNITS_DIRECTORY = "usr/lib/systemd/system"
RULES = "usr/lib/udev/rules.d/50-udev-default.rules"
#: As the image's, but for the mounts, which systemd makes itself.
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
exec /usr/lib/systemd/systemd
"""
AGENT = """\
[Unit]
After=multi-user.target

[Service]
ExecStart=/usr/bin/python3 -S /agent/agent.py
Environment=PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin HOME=/root LC_ALL=C.UTF-8 SYSTEMD_PAGER=
"""


def layer() -> Path:
    """The archive, from the cache. Raises debs.Unobtainable."""
    prefix = debs.unpack(["systemd", "udev", "apparmor"], suite=build.USERLAND_SUITE, with_depends=True)
    versions = f"{debs.unpacked(prefix)} {build.image().initramfs.name}"
    return build.cached("systemd", versions, [Path(__file__)], lambda: _pack(prefix))


def _pack(prefix: Path) -> bytes:
    archive = Archive()
    archive.file("init", INIT.encode(), 0o755)
    archive.file("etc/machine-id", b"0123456789abcdef0123456789abcdef\n")  # without one it would be a first boot
    archive.file("etc/systemd/system/agent.service", AGENT.encode())
    archive.symlink("etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")
    archive.symlink("etc/systemd/system/multi-user.target.wants/agent.service", "../agent.service")
    units = prefix / UNITS_DIRECTORY
    names = [*(f"{target}.target" for target in TARGETS), *SERVICES]
    for name in names:
        archive.copy(units / name, f"{UNITS_DIRECTORY}/{name}")
    for wanted in sorted(units.glob("*.wants/*")):
        if wanted.name in names:
            archive.symlink(f"{UNITS_DIRECTORY}/{wanted.relative_to(units)}", f"../{wanted.name}")
    archive.copy(prefix / RULES, RULES)
    for directory in ("abi", "abstractions", "tunables"):
        archive.tree(prefix / "etc/apparmor.d" / directory, f"etc/apparmor.d/{directory}")
    userland = build.userland_prefix()
    for path in (f"{UNITS_DIRECTORY}/chrony.service", "etc/default/chrony"):
        archive.copy(userland / path, path)
    for program in PROGRAMS:
        archive.copy(prefix / program, program)
    there = build.shared_libraries()
    needed = build.libraries([prefix / program for program in PROGRAMS], prefix)
    for name, library in sorted(build.merged(there, needed).items()):
        if library != there.get(name):
            archive.copy(library, f"{build.LIBRARIES}/{name}")
    return archive.finish()
