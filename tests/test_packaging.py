"""The package as users get it: a source distribution, a wheel, and Debian's package; tried away from the tree."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import refclock
from tests import debs
from tests.harness import ROOT, SockListener, make_page, never_set_the_clock, write_page

PACKAGING = ROOT / "packaging"
EXTENSIONS = ("hypervisor", "page", "segment", "systemclock")

pytestmark = pytest.mark.timeout(600)


def done(*command: str | Path, timeout_s: float = 300.0, **environment: str) -> str:
    """Runs a command in a directory that holds nothing of ours; what it prints. Fails if it does."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    ended = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        cwd="/",
        env=kept | {"LC_ALL": "C.UTF-8"} | environment,
        preexec_fn=never_set_the_clock,
    )
    assert ended.returncode == 0, f"{command[0]}: {ended.stdout[-4000:]}\n{ended.stderr[-4000:]}"
    return ended.stdout


def without_build_products(place: Path) -> Path:
    """A copy of the tree as it is in the repository: what is built in it comes from there."""
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.so", "__pycache__", "*.egg-info", ".hypothesis", ".*_cache", ".benchmarks"
    )
    return Path(shutil.copytree(ROOT, place / "tree", ignore=ignored))


# ---- Wheel and source distribution ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with what packaging/build-wheel.sh makes."""
    place = tmp_path_factory.mktemp("wheel")
    probe = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place / "probe"), "build"]
    if subprocess.run(probe, capture_output=True, check=False, timeout=60).returncode != 0:
        pytest.skip("NOT TESTED: the tools that build a wheel cannot be had from a package index here")
    done(without_build_products(place) / "packaging/build-wheel.sh", place / "dist")
    return place / "dist"


@pytest.fixture(scope="module")
def installed(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a clean virtual environment that has the wheel, and nothing else."""
    place = tmp_path_factory.mktemp("venv")
    done(sys.executable, "-m", "venv", place)
    done(place / "bin/pip", "install", "--quiet", "--no-index", "--no-deps", *built.glob("*.whl"))
    return place / "bin"


def test_the_wheel_holds_what_it_takes_and_no_sources(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name.startswith(f"vmclock_refclock-{refclock.__version__}-")
    assert "manylinux" in wheel.name, "auditwheel found a library that not every distribution has"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(f"vmclock_refclock-{refclock.__version__}.dist-info/METADATA").decode()
    assert not [name for name in names if name.endswith((".c", ".h", ".pyx", ".pxd"))]
    assert not [name for name in names if name.startswith(("tests", "shm", "docs", "packaging"))]
    for extension in EXTENSIONS:
        assert [name for name in names if re.fullmatch(rf"refclock/{extension}\..*\.so", name)], extension
        assert f"refclock/{extension}.pyi" in names
    sources = {f"refclock/{file.name}" for file in (ROOT / "refclock").glob("*.py")}
    assert sources <= set(names)
    assert "refclock/py.typed" in names
    # The daemon needs nothing but the standard library.
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == []


def test_the_source_distribution_is_whole(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    for name in (
        "refclock/page.pyx",
        "refclock/sigbus.h",
        "shm/vmclock_page.h",
        "shm/vmclock_page.pxd",
        "tests/harness.py",
        "tests/run.sh",
        "tests/native/layout.c",
        "docs/man/vmclock-refclock.8",
        "packaging/debian/rules",
        "packaging/systemd/vmclock-refclock.service",
        "examples/chrony.conf",
        "LICENSE",
    ):
        assert name in names
    assert not [name for name in names if name.startswith("refclock/") and name.endswith((".c", ".so"))]
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_installed_wheel_works(installed: Path, short_path: Path) -> None:
    command = installed / "vmclock-refclock"
    assert done(command, "--version").strip() == f"vmclock-refclock {refclock.__version__}"
    where = done(installed / "python", "-I", "-c", "import refclock; print(refclock.__file__)").strip()
    assert Path(where).is_relative_to(installed.parent)
    page = write_page(short_path / "page", make_page())
    assert json.loads(done(command, "show", "--device", page, "--json"))["kind"] == "time"
    assert json.loads(done(installed / "python", "-I", "-m", "refclock", "sample", "--device", page, "--json"))
    done(command, "validate", ROOT / "examples/vmclock-refclock.toml")
    assert "vmclock-refclock" in done(command, "--help")
    with SockListener(short_path / "sock") as listener:
        paths = ["--state-dir", short_path / "state", "--status", short_path / "status.sock", "--config", "/dev/null"]
        done(
            command,
            "run",
            "--device",
            page,
            "--sock",
            listener.path,
            "--chronyd",
            "none",
            "--exit-after",
            "0.5",
            *paths,
        )
        assert listener.wait(1)


def test_the_version_stands_in_one_place() -> None:
    """Debian's changelog has to name it too; build-deb.sh refuses another than the program's."""
    changelog = (PACKAGING / "debian/changelog").read_text()
    assert changelog.startswith(f"vmclock-refclock ({refclock.__version__}-")
    literal = f'"{refclock.__version__}"'
    files = [*ROOT.glob("*.toml"), ROOT / "setup.py", *(ROOT / "refclock").glob("*.py"), *(ROOT / "docs").glob("*.py")]
    assert [file.name for file in files if literal in file.read_text()] == ["_version.py"]


# ---- Debian --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Debian's package, built by dpkg-buildpackage with Debian's Python."""
    for program in ("dpkg-buildpackage", "dh", "dh_apparmor", "pybuild", "lintian"):
        if shutil.which(program) is None:
            pytest.skip(f"NOT TESTED: {program} is not installed")
    place = tmp_path_factory.mktemp("deb")
    # The script ends with an error where lintian has an error or a warning.
    done(without_build_products(place) / "packaging/build-deb.sh", place / "out")
    (package,) = place.glob("out/vmclock-refclock_*.deb")
    return package


@pytest.fixture(scope="module")
def scratch(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root that holds the package and nothing else."""
    root = tmp_path_factory.mktemp("root")
    done("dpkg", "-x", deb, root)
    yield root


@pytest.mark.slow
def test_debian_s_package_has_everything_in_its_place(scratch: Path) -> None:
    usr_or_not = [scratch / "usr/lib/systemd/system", scratch / "lib/systemd/system"]
    units = next(directory for directory in usr_or_not if directory.exists())
    for unit in ("vmclock-refclock.service", "vmclock-refclock-wait.service"):
        assert (units / unit).read_bytes() == (PACKAGING / "systemd" / unit).read_bytes()
    for path, source in {
        "etc/vmclock-refclock.toml": "../examples/vmclock-refclock.toml",
        "etc/chrony/conf.d/vmclock-refclock.conf": "chrony/vmclock-refclock.conf",
        "etc/apparmor.d/vmclock-refclock": "apparmor/vmclock-refclock",
        "usr/lib/udev/rules.d/60-vmclock.rules": "udev/60-vmclock.rules",
        "usr/lib/sysusers.d/vmclock-refclock.conf": "systemd/vmclock-refclock.sysusers",
        "usr/lib/tmpfiles.d/vmclock-refclock.conf": "systemd/vmclock-refclock.tmpfiles",
        "usr/share/vmclock-refclock/systemd/flag-only.conf": "systemd/flag-only.conf",
    }.items():
        assert (scratch / path).read_bytes() == (PACKAGING / source).read_bytes(), path
    pages = {page.name for page in scratch.glob("usr/share/man/man*/*")}
    assert pages == {"vmclock-refclock.1.gz", "vmclock-refclock.toml.5.gz", "vmclock-refclock.8.gz"}


@pytest.mark.slow
def test_debian_s_package_runs_from_its_root(scratch: Path, short_path: Path) -> None:
    command = ["/usr/bin/python3", scratch / "usr/bin/vmclock-refclock"]
    path = str(scratch / "usr/lib/python3/dist-packages")
    assert done(*command, "--version", PYTHONPATH=path).strip() == f"vmclock-refclock {refclock.__version__}"
    page = write_page(short_path / "page", make_page())
    assert json.loads(done(*command, "sample", "--device", page, "--json", PYTHONPATH=path))["clock_status"]
    done(*command, "validate", scratch / "etc/vmclock-refclock.toml", PYTHONPATH=path)


# ---- Under systemd -------------------------------------------------------------------------------------------

#: What is done in the container, step by step; after each the daemon's status is written down.
STEPS = """
report() {
    for _ in $(seq 100); do
        vmclock-refclock status --json >/root/now 2>/dev/null && grep -q "$2" /root/now && break
        sleep 0.2
    done
    pid=$(systemctl show --property=MainPID --value vmclock-refclock)
    user=$(stat -c %U /proc/$pid)
    printf '{"step": "%s", "user": "%s", "status": %s}\n' "$1" "$user" "$(cat /root/now)" >>/root/report
}
vmclock-refclock status --json >/root/now; report waiting '"waiting"'
systemctl start page; report "the page comes" synchronised
report "chronyd follows" '"normal": true'
systemctl restart chrony; sleep 1; report "chronyd restarted" '"ok": true.*"normal": true'
systemctl stop chrony; sleep 1; ls -d /run/chrony >>/root/log 2>&1
systemctl start chrony; sleep 1; report "chronyd stopped and started" '"ok": true.*"normal": true'
systemctl start vmclock-refclock-wait && echo '{"step": "wait"}' >>/root/report
S=/usr/share/vmclock-refclock/systemd D=/etc/systemd/system/vmclock-refclock.service.d
mkdir -p $D && cp $S/chrony-user-debian.conf $D/40-chrony-user.conf
cp $S/open-sock-debian.conf /etc/systemd/system/chrony.service.d/50-vmclock-refclock.conf
systemctl daemon-reload; systemctl restart chrony vmclock-refclock
report "as chrony's user" '"ok": true.*"normal": true'
systemctl stop chrony; systemctl start chrony; sleep 1; report "chronyd started anew" '"ok": true.*"normal": true'
cp $S/flag-only.conf $D/50-flag-only.conf
systemctl daemon-reload; systemctl restart vmclock-refclock; report "flag only" '"ok": true.*"normal": true'
rm -r $D; echo 'nonsense = 1' >>/etc/vmclock-refclock.toml
systemctl daemon-reload; systemctl restart vmclock-refclock; sleep 5
restarts=$(systemctl show --property=NRestarts --value vmclock-refclock)
printf '{"step": "wrong", "restarts": "%s"}\n' "$restarts" >>/root/report
journalctl --no-pager -u vmclock-refclock -u chrony >>/root/log
"""

PAGE_SERVICE = """[Service]
ExecStart=/bin/sh -c 'sleep infinity | vmclock-refclock simulate /dev/shm/page'
"""
STEPS_SERVICE = """[Service]
Type=oneshot
ExecStart=/bin/bash /root/steps
ExecStopPost=/bin/systemctl poweroff --no-block
TimeoutStartSec=240
[Install]
WantedBy=multi-user.target
"""


@pytest.fixture(scope="module")
def container(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A root with a whole Debian of this machine's release: systemd, chrony as it is installed, and our package.

    Its chronyd has ``-x``, and the container no right to set the clock.
    """
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: a container with systemd needs root")
    for program in ("debootstrap", "systemd-nspawn"):
        if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            pytest.skip(f"NOT TESTED: {program} is not installed")
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    base = debs.cache_dir() / f"container-{suite}"
    if not (base / "complete").exists():
        shutil.rmtree(base, ignore_errors=True)
        packages = "systemd,systemd-sysv,dbus,udev,chrony,python3,procps"
        done(
            "/usr/sbin/debootstrap",
            "--variant=minbase",
            f"--include={packages}",
            suite,
            base / "root",
            debs._mirror()[0],
        )
        (base / "complete").touch()
    root = tmp_path_factory.mktemp("container") / "root"
    done("cp", "-a", base / "root", root)
    shutil.copy(deb, root / "root/package.deb")
    path = "/usr/sbin:/usr/bin:/sbin:/bin"
    done("chroot", root, "dpkg", "-i", "/root/package.deb", DEBIAN_FRONTEND="noninteractive", PATH=path)
    (root / "etc/default/chrony").write_text('DAEMON_OPTS="-x"\n')
    drop_ins = root / "etc/systemd/system/chrony.service.d"
    drop_ins.mkdir()
    (drop_ins / "test.conf").write_text("[Unit]\nConditionCapability=\n")
    with open(root / "etc/vmclock-refclock.toml", "a") as configuration:
        configuration.write('device = "/dev/shm/page"\n')
    (root / "etc/systemd/system/page.service").write_text(PAGE_SERVICE)
    (root / "etc/systemd/system/steps.service").write_text(STEPS_SERVICE)
    (root / "etc/systemd/system/multi-user.target.wants/steps.service").symlink_to("/etc/systemd/system/steps.service")
    (root / "root/steps").write_text(STEPS)
    yield root


@pytest.mark.slow
def test_the_installed_package_works_under_systemd(container: Path) -> None:
    """Installed and started, and chronyd started anew in every way, with each of the unit's variants."""
    options = ["--quiet", "--private-network", "--drop-capability=CAP_SYS_TIME", "--register=no", "--keep-unit"]
    # Where this machine has the old hierarchy of control groups, a newer systemd wants to be told that it may use it.
    boot = ["--boot", "SYSTEMD_CGROUP_ENABLE_LEGACY_FORCE=1"]
    done("systemd-nspawn", *options, "-D", container, *boot, timeout_s=400)
    log = (container / "root/log").read_text()
    steps = [json.loads(line) for line in (container / "root/report").read_text().splitlines()]
    reports = {step["step"]: step for step in steps}
    assert reports["waiting"]["status"]["state"] == "waiting", log
    users = {
        "the page comes": "root",
        "chronyd follows": "root",
        "chronyd restarted": "root",
        "chronyd stopped and started": "root",
        "as chrony's user": "_chrony",
        "chronyd started anew": "_chrony",
        "flag only": "_chrony",
    }
    for step, user in users.items():
        report = reports[step]
        assert report["user"] == user, step
        assert report["status"]["state"] == "synchronised", (step, log)
        assert [sink["error"] for sink in report["status"]["sinks"]] == [None], (step, log)
        assert report["status"]["chronyd"]["ok"], (step, log)
    assert "wait" in reports, log
    # With it went the directory that a mount of its own would have held on to.
    assert "'/run/chrony': No such file" in log
    # A configuration that is wrong does not get better by trying again.
    assert reports["wrong"]["restarts"] == "0"
