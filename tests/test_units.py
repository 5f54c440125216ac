"""What systemd, udev, AppArmor and SELinux are given: accepted by their own checkers, and as confined as promised."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from refclock import options
from refclock.errors import EX_CONFIG, EX_NOPERM, EX_UNAVAILABLE, EX_USAGE
from refclock.finding import SOCK_PATH
from tests import debs
from tests.harness import ROOT

PACKAGING = ROOT / "packaging"
SYSTEMD = PACKAGING / "systemd"
UNITS = next(filter(Path.is_dir, map(Path, ("/usr/lib/systemd/system", "/lib/systemd/system"))), Path("/nonexistent"))
DISTRIBUTIONS = {"debian": ("_chrony", "chrony.service"), "fedora": ("chrony", "chronyd.service")}

#: The drop-ins in force, and the most exposure that systemd may find then (of 10).
VARIANTS = {
    (): 3.0,
    ("flag-only",): 2.0,
    ("chrony-user-debian",): 3.0,
    ("chrony-user-fedora",): 3.0,
    ("chrony-user-debian", "flag-only"): 2.0,
    ("chrony-user-fedora", "flag-only"): 2.0,
    ("apparmor",): 3.0,
}


def needs(program: str) -> str:
    path = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"NOT TESTED: {program} is not installed")
    return path


def tool(*command: str | Path, timeout_s: float = 30.0) -> str:
    """Runs a checker to its end; what it says. Fails unless it is content."""
    environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_LOG_LEVEL": "info"}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    return said


class Unit(configparser.RawConfigParser):
    """A unit, or drop-in, as far as its settings go; of several lines for one setting all are kept."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False)
        self.text = (SYSTEMD / name).read_text()
        self.read_string(self.text)

    def optionxform(self, optionstr: str) -> str:
        return optionstr

    def all(self, setting: str) -> list[str]:
        return re.findall(rf"^{setting}=(.*)$", self.text, re.MULTILINE)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root with this machine's own targets, our units, and the programs that they name."""
    units = tmp_path / "usr/lib/systemd/system"
    units.mkdir(parents=True)
    for target in UNITS.glob("*.target"):
        if target.is_file():
            shutil.copy(target, units)
    for unit in SYSTEMD.glob("*.service"):
        shutil.copy(unit, units)
    for program in ("usr/bin/vmclock-refclock", "bin/kill", "bin/chown", "bin/true"):
        (tmp_path / program).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / program).touch(0o755)
    yield tmp_path


def drop_in(root: Path, unit: str, name: str) -> None:
    directory = root / "usr/lib/systemd/system" / f"{unit}.d"
    directory.mkdir(exist_ok=True)
    where = re.search(r"/etc/systemd/system/\S+\.d/(\S+\.conf)", (SYSTEMD / f"{name}.conf").read_text())
    assert where, f"{name}.conf does not say where it belongs"
    shutil.copy(SYSTEMD / f"{name}.conf", directory / where.group(1))


def verify(root: Path, unit: str) -> None:
    said = tool(needs("systemd-analyze"), "verify", "--man=no", f"--root={root}", unit)
    assert "vmclock" not in said, said


# ---- systemd -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: "+".join(variant) or "as it is")
def test_the_daemon_s_unit(variant: tuple[str, ...], root: Path) -> None:
    for name in variant:
        drop_in(root, "vmclock-refclock.service", name)
    verify(root, "vmclock-refclock.service")
    exposure(root, "vmclock-refclock.service", VARIANTS[variant])


def exposure(root: Path, unit: str, most: float) -> None:
    analyze = needs("systemd-analyze")
    if "--offline" not in tool(analyze, "--help"):
        pytest.skip("NOT TESTED: systemd is older than 250, whose `systemd-analyze security` wants a running manager")
    said = tool(
        analyze, "security", "--offline=true", "--no-pager", f"--threshold={most * 10:.0f}", f"--root={root}", unit
    )
    found = re.search(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert found and float(found.group(1)) <= most, said


def test_the_waiting_unit(root: Path) -> None:
    verify(root, "vmclock-refclock-wait.service")
    exposure(root, "vmclock-refclock-wait.service", 1.0)
    unit = Unit("vmclock-refclock-wait.service")
    assert unit["Unit"]["Before"] == "time-sync.target"
    assert "time-sync.target" in unit["Unit"]["Wants"]
    # systemd must not lose patience before the command does.
    limit = re.search(r"--timeout (\d+)", unit["Service"]["ExecStart"])
    assert limit and int(unit["Service"]["TimeoutStartSec"]) > int(limit.group(1))


def test_the_daemon_s_unit_keeps_its_promises() -> None:
    unit = Unit("vmclock-refclock.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert float(service["WatchdogSec"]) >= 10  # a machine that is resumed is slow for a while
    # A device that is not there is waited for: no condition on it, and no end that would be restarted in a loop.
    assert not unit.all("Condition.*") and not unit.all("Requires")
    assert not unit.all("BindsTo")
    prevented = {int(status) for status in service["RestartPreventExitStatus"].split()}
    assert prevented == {EX_USAGE, EX_NOPERM, EX_CONFIG}
    assert EX_UNAVAILABLE not in prevented
    after = unit["Unit"]["After"].split()
    assert {"chronyd.service", "chrony.service"} <= set(after)
    assert service["DevicePolicy"] == "closed"
    # A path that is not there at the start would stay forbidden.
    assert unit.all("DeviceAllow") == ["char-misc r", "char-ptp r"]
    # What the daemon reads and shares must stay within its reach.
    for setting in ("ProtectClock", "ProcSubset", "PrivateIPC", "RemoveIPC", "PrivateDevices", "DynamicUser"):
        assert not unit.all(setting), setting
    assert "/run" in unit.all("ReadWritePaths")
    assert service["RuntimeDirectory"] == Path(options.STATUS_PATH).parent.name
    assert service["StateDirectory"] == Path(options.STATE_DIR).name
    assert set(service["CapabilityBoundingSet"].split()) == {"CAP_SYS_TIME", "CAP_DAC_OVERRIDE"}


def test_flag_only_has_no_right_to_set_the_clock() -> None:
    unit = Unit("flag-only.conf")
    assert unit.all("CapabilityBoundingSet") == ["", "CAP_DAC_OVERRIDE"]
    assert unit.all("AmbientCapabilities") == [""]
    command = unit.all("ExecStart")[-1]
    assert command.endswith("run --on-disruption flag")
    assert command.startswith(Unit("vmclock-refclock.service")["Service"]["ExecStart"])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_as_chrony_s_user(distribution: str, root: Path) -> None:
    user, chronyd = DISTRIBUTIONS[distribution]
    unit = Unit(f"chrony-user-{distribution}.conf")
    assert unit["Service"]["User"] == user
    assert unit.all("CapabilityBoundingSet") == ["", "CAP_SYS_TIME"]
    opening = Unit(f"open-sock-{distribution}.conf")
    # "-": a chronyd without the socket starts all the same; "+": chrony's unit has dropped what chown needs.
    assert opening["Service"]["ExecStartPost"] == f"-+/bin/chown {user} {SOCK_PATH}"
    assert f"/etc/systemd/system/{chronyd}.d/" in opening.text
    service = root / "usr/lib/systemd/system" / chronyd
    service.write_text("[Service]\nExecStart=/bin/true\n")
    drop_in(root, chronyd, f"open-sock-{distribution}")
    verify(root, chronyd)


def test_the_group_that_the_rule_names_is_made(tmp_path: Path) -> None:
    """Really made, in another root: the group, and the directories, whose owner a unit may have changed."""
    (tmp_path / "etc").mkdir()
    sysusers, tmpfiles = needs("systemd-sysusers"), needs("systemd-tmpfiles")
    tool(sysusers, f"--root={tmp_path}", SYSTEMD / "vmclock-refclock.sysusers")
    group = (tmp_path / "etc/group").read_text()
    assert re.search(r"^clock:", group, re.MULTILINE)
    rule = (PACKAGING / "udev/60-vmclock.rules").read_text()
    assert 'KERNEL=="vmclock[0-9]*"' in rule and 'GROUP="clock"' in rule and 'MODE="0644"' in rule
    for unit in SYSTEMD.glob("chrony-user-*.conf"):
        assert Unit(unit.name)["Service"]["SupplementaryGroups"] == "clock"

    tool(tmpfiles, f"--root={tmp_path}", "--create", SYSTEMD / "vmclock-refclock.tmpfiles")
    made = [tmp_path / Path(options.STATUS_PATH).parent.relative_to("/"), tmp_path / options.STATE_DIR.lstrip("/")]
    for directory in made:
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755
    if os.geteuid() == 0:
        os.chown(made[1], 12345, 12345)
        tool(tmpfiles, f"--root={tmp_path}", "--create", SYSTEMD / "vmclock-refclock.tmpfiles")
        assert made[1].stat().st_uid == 12345


def test_installed_without_a_package(tmp_path: Path) -> None:
    """packaging/install.sh, into another root, for a command somewhere else."""
    script = PACKAGING / "install.sh"
    command = "/opt/vmclock-refclock/bin/vmclock-refclock"
    said = subprocess.run(
        [script, command],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
        env={**os.environ, "DESTDIR": str(tmp_path)},
    ).stdout
    assert f"refclock SOCK {SOCK_PATH}" in said  # no conf.d there: the line is for the user to add
    for file in tmp_path.rglob("*"):
        if file.is_file() and file.suffix != ".toml":
            assert "/usr/bin/vmclock-refclock" not in file.read_text(), file
    units = tmp_path / "etc/systemd/system"
    assert f"ExecStart={command} run\n" in (units / "vmclock-refclock.service").read_text()
    assert f"ExecStart={command} wait " in (units / "vmclock-refclock-wait.service").read_text()
    drop_ins = {file.name for file in (tmp_path / "usr/share/vmclock-refclock/systemd").iterdir()}
    assert drop_ins == {file.name for file in SYSTEMD.glob("*.conf")}
    configuration = tmp_path / options.CONFIG_PATH.lstrip("/")
    assert options.load(str(configuration)) == {"sock": [SOCK_PATH]}
    configuration.write_text("# the user's own\n")
    subprocess.run(
        [script, command], capture_output=True, check=True, timeout=30, env={**os.environ, "DESTDIR": str(tmp_path)}
    )
    assert configuration.read_text() == "# the user's own\n"
    refused = subprocess.run(
        [script, "/root/venv/bin/vmclock-refclock"], capture_output=True, text=True, check=False, timeout=30
    )
    assert refused.returncode == EX_USAGE and "/usr/local or /opt" in refused.stderr


# ---- udev, AppArmor, SELinux ---------------------------------------------------------------------------------


def test_the_udev_rule(tmp_path: Path) -> None:
    udevadm = shutil.which("udevadm", path="/usr/bin:/bin:/usr/sbin:/sbin")
    command = [udevadm] if udevadm and "verify" in tool(udevadm, "--help") else newer_udevadm()
    arguments = ["verify", "--resolve-names=never", str(PACKAGING / "udev/60-vmclock.rules")]
    assert "Fail:    0" in tool(*command, *arguments)
    wrong = tmp_path / "60-wrong.rules"
    wrong.write_text('KERNEL="vmclock[0-9]*", GROUP="clock"\n')
    assert subprocess.run([*command, "verify", wrong], capture_output=True, check=False, timeout=30).returncode != 0


def newer_udevadm() -> list[str]:
    """This machine's is older than 254: the one of a newer Debian."""
    try:
        prefix = debs.unpack(["udev"], suite="trixie", with_depends=True)
        command = debs.program(prefix, "usr/bin/udevadm")
    except debs.Unobtainable as error:
        pytest.skip(f"NOT TESTED: no udevadm that can verify rules: {error}")
    (private,) = prefix.glob("usr/lib/*/systemd/libsystemd-shared-*.so")
    return [
        f"{word}:{private.parent}" if before == "--library-path" else word for before, word in pairwise(["", *command])
    ]


def test_the_apparmor_profile() -> None:
    profile = PACKAGING / "apparmor/vmclock-refclock"
    said = tool(needs("apparmor_parser"), "--skip-kernel-load", "--skip-cache", profile)
    assert "Warning" not in said, said
    named = Unit("apparmor.conf")["Service"]["AppArmorProfile"]
    text = profile.read_text()
    assert re.search(rf"^profile {named} ", text, re.MULTILINE)
    # What the daemon opens by default, in the profile's words.
    for path in (options.CONFIG_PATH, "/dev/vmclock[0-9]* r", "/dev/ptp[0-9]* r", "@{run}/chrony.*.sock w"):
        assert path in text
    assert f"{options.STATE_DIR}/{{,**}} rw" in text


def test_the_selinux_module(tmp_path: Path) -> None:
    """Compiled with as much of a policy around it as it takes."""
    secilc = needs("secilc")
    base = tmp_path / "base.cil"
    base.write_text(
        "(handleunknown allow)(mls true)(sid kernel)(sidorder (kernel))"
        "(class unix_dgram_socket (sendto))(class process (transition))(classorder (unix_dgram_socket process))"
        "(sensitivity s0)(sensitivityorder (s0))(user u)(role r)(userrole u r)(userlevel u (s0))"
        "(userrange u ((s0)(s0)))(type chronyd_t)(type unconfined_service_t)(roletype r chronyd_t)"
        "(roletype r unconfined_service_t)(sidcontext kernel (u r chronyd_t ((s0)(s0))))\n"
    )
    module = PACKAGING / "selinux/vmclock-refclock.cil"
    tool(secilc, "-o", tmp_path / "policy", "-f", tmp_path / "contexts", base, module)
    assert (tmp_path / "policy").stat().st_size > 0


# ---- chronyd's line ------------------------------------------------------------------------------------------


def test_the_line_for_chronyd_is_where_the_daemon_writes() -> None:
    lines = [
        line.split()
        for line in (PACKAGING / "chrony/vmclock-refclock.conf").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert [line[:3] for line in lines] == [["refclock", "SOCK", SOCK_PATH]]
