"""What a guest is made of: QEMU, a kernel and an initramfs, gathered in the cache; nothing is installed.

- QEMU 10 or later has the vmclock device: the machine's own if it is new enough, else Debian's, unpacked.
- The newest of Debian's cloud kernels; from 7.0 on the driver has poll(), and its PTP clock tells TAI.
- The initramfs: busybox and chrony from Debian, **this machine's own Python** (so a wheel built here runs
  there), the driver's module, the agent and the sampler. Uncompressed: emulated, that is the fastest to boot.

``python -m tests.guest.build`` gathers everything and prints where it lies.
"""

from __future__ import annotations

import functools
import hashlib
import lzma
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests import debs
from tests.guest.cpio import Archive

HERE = Path(__file__).parent
USERLAND_SUITE = "trixie"
KERNEL_SUITE = "trixie-backports"
QEMU_PACKAGES = ["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu", "zlib1g"]
USERLAND_PACKAGES = ["chrony", "busybox-static", "zlib1g"]
OLDEST_QEMU = 10
OLDEST_KERNEL = (7, 0)

LIBRARIES = "/usr/lib/x86_64-linux-gnu"
LOADER = "ld-linux-x86-64.so.2"
AGENT = ("agent.py", "counter.py", "install_wheel.py")
MODULE = "/lib/modules/ptp_vmclock.ko"
# What a daemon never imports: patterns of names in the standard library.
WITHOUT = (
    *("test", "tests", "_test*", "idlelib", "*tkinter*", "turtle*", "lib2to3", "ensurepip", "pydoc_data"),
    *("distutils", "site-packages", "dist-packages", "config-*", "*.opt-?.pyc"),
)
INIT = """\
#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/local/bin:/usr/bin:/usr/sbin:/bin HOME=/root LC_ALL=C.UTF-8
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /run/chrony
mount -t tmpfs tmpfs /dev/shm
chmod 0750 /run/chrony
ip link set lo up
exec python3 -S /agent/agent.py
"""
# Seconds since 1900, and TAI - UTC from then on. chronyd looks up 2012 to see whether it can trust the list.
LEAP_SECONDS = """\
#$ 3676924800
#@ 4291747200
3439756800 34 # 2009-01-01
3550089600 35 # 2012-07-01
3644697600 36 # 2015-07-01
3692217600 37 # 2017-01-01
"""


class Image(NamedTuple):
    """A guest, ready to boot."""

    qemu: list[str]
    kernel: Path
    initramfs: Path


@functools.cache
def image() -> Image:
    """Everything, from the cache where it is there. Raises debs.Unobtainable with the reason where it cannot be."""
    if os.uname().machine != "x86_64":
        raise debs.Unobtainable("the guest is an x86-64 machine with this machine's Python, which is of another kind")
    kernel = _kernel()
    return Image(_qemu(), kernel / "vmlinuz", _initramfs(kernel))


def _qemu() -> list[str]:
    installed = shutil.which("qemu-system-x86_64")
    if installed:
        says = subprocess.check_output([installed, "--version"], text=True, timeout=30)
        version = re.search(r"version (\d+)", says)
        if version and int(version[1]) >= OLDEST_QEMU:
            return [installed]
    prefix = debs.unpack(QEMU_PACKAGES, suite=USERLAND_SUITE, with_depends=True)
    share = prefix / "usr/share"
    return [
        *debs.program(prefix, "usr/bin/qemu-system-x86_64"),
        *("-L", str(share / "seabios"), "-L", str(share / "qemu")),
    ]


def _kernel() -> Path:
    """The directory of an unpacked kernel, which holds `vmlinuz` and `kernel/`."""
    prefix = debs.cache_dir() / "guest" / "kernel"
    unpacked = sorted(prefix.glob("usr/lib/modules/*/vmlinuz"))
    if not unpacked:
        offered = {}
        for name in debs.available(r"linux-binary-[0-9.]+\+.*-cloud-amd64", KERNEL_SUITE):
            release = name.removeprefix("linux-binary-")
            offered[tuple(map(int, re.match(r"[0-9.]+", release)[0].split(".")))] = release
        if not offered or max(offered) < OLDEST_KERNEL:
            raise debs.Unobtainable(f"{KERNEL_SUITE} has no cloud kernel from {OLDEST_KERNEL} on")
        release = offered[max(offered)]
        debs.unpack([f"linux-binary-{release}", f"linux-modules-{release}"], prefix, KERNEL_SUITE)
        unpacked = sorted(prefix.glob("usr/lib/modules/*/vmlinuz"))
    return unpacked[-1].parent


def _initramfs(kernel: Path) -> Path:
    userland = userland_prefix()
    versions = f"{sys.version} {sys.base_prefix} {kernel.name} {debs.unpacked(userland)}"
    sources = [HERE / source for source in ("build.py", "cpio.py", "sampler.c", *AGENT)]
    return cached("initramfs", versions, sources, lambda: _pack(userland, kernel))


def userland_prefix() -> Path:
    return debs.unpack(USERLAND_PACKAGES, suite=USERLAND_SUITE, with_depends=True)


def cached(name: str, versions: str, sources: list[Path], pack: Callable[[], bytes]) -> Path:
    """An archive in the cache, packed where there is none from these versions and sources yet."""
    made_from = hashlib.sha256(versions.encode())
    for source in sources:
        made_from.update(source.read_bytes())
    directory = debs.cache_dir() / "guest"
    path = directory / f"{name}-{made_from.hexdigest()[:16]}.cpio"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(pack())
        unfinished.rename(path)
        for old in sorted(directory.glob(f"{name}-*.cpio"), key=lambda old: old.stat().st_mtime)[:-3]:
            old.unlink(missing_ok=True)
    return path


def _pack(userland: Path, kernel: Path) -> bytes:
    archive = Archive()
    for directory in ["proc", "sys", "dev", "tmp", "run", "root", "var/lib/chrony"]:
        archive.directory(directory)
    archive.symlink("lib64", "usr/lib64")
    archive.device("dev/console", 5, 1)
    archive.device("dev/null", 1, 3, 0o666)
    archive.file("init", INIT.encode(), 0o755)
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n_chrony:x:100:100::/:/bin/false\n")
    archive.file("etc/group", b"root:x:0:\n_chrony:x:100:\n")
    archive.file("etc/hosts", b"127.0.0.1 localhost\n")
    archive.file("etc/chrony/leap-seconds.list", LEAP_SECONDS.encode())
    archive.file(MODULE, lzma.decompress((kernel / "kernel/drivers/ptp/ptp_vmclock.ko.xz").read_bytes()))
    archive.copy(userland / "usr/bin/busybox", "bin/busybox")
    archive.copy(userland / "usr/sbin/chronyd", "usr/sbin/chronyd")
    archive.copy(userland / "usr/bin/chronyc", "usr/bin/chronyc")
    for source in AGENT:
        archive.copy(HERE / source, f"agent/{source}")
    archive.file("usr/bin/sampler", _sampler(), 0o755)

    _add_python(archive)
    for name, library in sorted(shared_libraries().items()):
        archive.copy(library, f"{LIBRARIES}/{name}")
    archive.symlink(f"usr/lib64/{LOADER}", f"{LIBRARIES}/{LOADER}")
    return archive.finish()


def _python() -> tuple[Path, Path]:
    """This machine's Python: the program, and the standard library."""
    return Path(os.path.realpath(sys._base_executable)), Path(sysconfig.get_path("stdlib"))


def _add_python(archive: Archive) -> None:
    """Adds this machine's Python, moved below /usr: a service that may not see /root or /home must find it."""
    executable, standard_library = _python()
    program = f"/usr/bin/{executable.name}"
    archive.copy(executable, program)
    archive.symlink("usr/bin/python3", program)
    archive.tree(standard_library, f"/usr/{standard_library.relative_to(sys.base_prefix)}", WITHOUT)


@functools.cache
def shared_libraries() -> dict[str, Path]:
    """The image's shared libraries, by name."""
    userland = userland_prefix()
    of_chrony = libraries([userland / "usr/sbin/chronyd", userland / "usr/bin/chronyc"], userland)
    executable, standard_library = _python()
    extensions = (standard_library / "lib-dynload").glob("*.so")
    of_python = libraries([executable, *(extension for extension in extensions if "tkinter" not in extension.name)])
    return merged(of_python, of_chrony)


def merged(first: dict[str, Path], second: dict[str, Path]) -> dict[str, Path]:
    """Of two libraries with the same name the newer serves both; which system's is newer, its libc tells."""
    return first | second if _libc(second) >= _libc(first) else second | first


def libraries(programs: list[Path], root: Path | None = None) -> dict[str, Path]:
    """The shared libraries that programs need, by name; from an unpacked prefix, or from this machine."""
    loader = Path("/lib64", LOADER)
    command = [str(loader)]
    if root:
        directories = debs.library_dirs(root)
        loader = next(path for path in (directory / LOADER for directory in directories) if path.exists())
        directories += [directory / "systemd" for directory in directories]  # where its own lie
        command = [str(loader), "--library-path", ":".join(map(str, directories))]
    found = {LOADER: loader}
    for program in programs:
        listing = [*command, "--list", str(program)]
        listed = subprocess.run(listing, capture_output=True, text=True, timeout=30, check=True)
        for name, path in re.findall(r"^\s+(\S+) => (/\S+)", listed.stdout, re.MULTILINE):
            found[name] = Path(path)
    return found


def _libc(found: dict[str, Path]) -> tuple[int, ...]:
    command = [str(found[LOADER]), str(found["libc.so.6"])]
    says = subprocess.check_output(command, text=True, timeout=30)
    return tuple(map(int, re.search(r"version (\d+)\.(\d+)", says).groups()))


def _sampler() -> bytes:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise debs.Unobtainable("no C compiler for the guest's sampler")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "sampler"
        command = [compiler, "-O2", "-static", "-s", "-o", str(program), str(HERE / "sampler.c")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode != 0:
            raise debs.Unobtainable(f"the guest's sampler does not compile: {done.stderr}")
        return program.read_bytes()


if __name__ == "__main__":
    try:
        made = image()
    except debs.Unobtainable as error:
        sys.exit(f"no guest: {error}")
    print("qemu     ", *made.qemu)
    print("kernel   ", made.kernel)
    print("initramfs", made.initramfs, f"({made.initramfs.stat().st_size >> 20} MiB)")
