"""Everything in examples/ loads and does what it says: configurations by the real programs, scripts by running them."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from refclock import options
from refclock.samplelog import HEADER
from tests import consumers
from tests.consumers import build
from tests.consumers.chronyd import Chronyd
from tests.consumers.ntpsec import Ntpd
from tests.harness import (
    NSEC_PER_SEC,
    ROOT,
    RunningDaemon,
    Simulator,
    command,
    environment,
    run,
    wait_until,
)

EXAMPLES = ROOT / "examples"
#: What is checked here, by the way of its name's end; directories are somebody else's.
KNOWN = {".sh", ".py", ".toml", ".conf"}
EX_NO, EX_USAGE, EX_UNAVAILABLE, EX_CONFIG = 1, 64, 69, 78


def test_every_file_is_checked_here() -> None:
    assert {path.suffix for path in EXAMPLES.iterdir() if path.is_file()} <= KNOWN


# ---- Configurations ------------------------------------------------------------------------------------------------


def test_toml_is_valid(tmp_path: Path) -> None:
    """As it stands, and with everything that is commented out in force."""
    example = EXAMPLES / "vmclock-refclock.toml"
    full = tmp_path / "full.toml"
    full.write_text(re.sub(r"^#([a-z-]+ = )", r"\1", example.read_text(), flags=re.MULTILINE))
    for file in (example, full):
        done = run("validate", file)
        assert (done.returncode, done.stderr) == (0, "")
    values = tomllib.loads(full.read_text())
    assert list(values.keys() - options.BY_NAME.keys()) == []
    assert list(options.BY_NAME.keys() - values.keys()) == []
    for option in options.OPTIONS:
        if option.default is not None and option.name != "fallback":
            assert option.parse(values[option.name]) == option.parse(option.default), option.name


@pytest.mark.parametrize("suite", consumers.SUITES["chronyd"])
def test_chrony_conf(suite: str, short_path: Path, simulate: Callable[..., Simulator]) -> None:
    """chronyd takes each line of it, and follows the page by its refclock line."""
    chronyd = build("chronyd", suite)
    example = EXAMPLES / "chrony.conf"
    printed = subprocess.run(
        [*chronyd.command("usr/sbin/chronyd"), "-p", "-f", str(example)],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert (printed.returncode, printed.stderr) == (0, "")
    lines = [line for line in example.read_text().splitlines() if line and not line.startswith("#")]
    assert printed.stdout.split("\n") == [*lines, ""]

    page = simulate("--offset", "0.002").path
    sock = str(short_path / "sock")
    ours = [line.replace("/run/chrony.vmclock.sock", sock) for line in lines if not line.startswith("driftfile")]
    assert sum(sock in line for line in ours) == 1
    with Chronyd(chronyd, ours) as running, _daemon(short_path, page, sock, running.command_socket):
        running.wait_normal()
        assert running.believed_offset_s() == pytest.approx(0.002, abs=1e-4)


@pytest.mark.parametrize("suite", consumers.SUITES["ntpd"])
def test_ntp_conf(suite: str, short_path: Path, simulate: Callable[..., Simulator]) -> None:
    """NTPsec's ntpd takes each line of it without a complaint, and follows the page."""
    text = (EXAMPLES / "ntp.conf").read_text()

    class Example(Ntpd):
        """ntpd with the example for its configuration, and no line of its own for the clock."""

        def _launch(self) -> subprocess.Popen[bytes]:
            self._line = re.sub(r"\bunit 2\b", f"unit {self.unit}", text)
            self._line = self._line.replace("/var/lib/ntpsec", str(self.workdir))
            assert f"unit {self.unit}" in self._line
            return super()._launch()

    page = simulate("--offset", "0.002").path
    with Example(build("ntpd", suite)) as ntpd, _daemon(short_path, page, unit=ntpd.unit):
        ntpd.wait_selected()
        assert ntpd.believed_offset_s() == pytest.approx(0.002, abs=1e-4)
        complaints = [line for line in ntpd.log().splitlines() if "syntax error" in line]
        assert complaints == []


@pytest.mark.parametrize("suite", consumers.SUITES["ntpd-rs"])
def test_ntpd_rs_toml(suite: str, tmp_path: Path) -> None:
    """By its own `ntp-ctl validate`; before 1.6 in the way that the example's comment says."""
    ntpd_rs = build("ntpd-rs", suite)
    text = (EXAMPLES / "ntpd-rs.toml").read_text()
    if ntpd_rs.upstream < (1, 6):
        text = re.sub(r"^precision = .*\n", "", text, flags=re.MULTILINE)
        text = text.replace("#measurement_noise_estimate", "measurement_noise_estimate")
    file = tmp_path / "ntp.toml"
    file.write_text(text)
    done = subprocess.run(
        [*ntpd_rs.command("usr/bin/ntp-ctl"), "validate", "-c", str(file)],
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---- Shell scripts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.name)
def test_shell_script_parses(script: Path) -> None:
    first = script.read_text().splitlines()[0]
    shell = "sh" if first.endswith("/sh") else "bash"
    done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if script.name != "prepare.sh":
        assert os.access(script, os.X_OK)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="NOT TESTED: no shellcheck")
def test_shellcheck() -> None:
    scripts = [str(path.relative_to(ROOT)) for path in sorted(EXAMPLES.glob("*.sh"))]
    done = subprocess.run(["shellcheck", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.fixture
def with_command(short_path: Path) -> dict[str, str]:
    """An environment in which `vmclock-refclock` is the package under test."""
    directory = short_path / "bin"
    directory.mkdir()
    program = directory / "vmclock-refclock"
    program.write_text(f'#!/bin/sh\nexec {" ".join(command())} "$@"\n')
    program.chmod(0o755)
    return environment() | {"PATH": f"{directory}:{os.environ['PATH']}"}


def test_wait_for_clock(
    short_path: Path, simulate: Callable[..., Simulator], with_command: dict[str, str], tmp_path: Path
) -> None:
    """The command starts when the clock is good, not before; it gets the caller's place and its status is passed on."""
    script = str(EXAMPLES / "wait_for_clock.sh")
    status = str(short_path / "status.sock")

    def wait(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [script, *arguments], env=with_command, capture_output=True, text=True, timeout=20, check=False
        )

    assert wait().returncode == EX_USAGE
    assert wait("-x", "true").returncode == EX_USAGE
    assert wait("-t", "0.3", "-s", status, "true").returncode == EX_UNAVAILABLE

    simulator = simulate("--status", "unknown")
    started = tmp_path / "started"
    with _daemon(short_path, simulator.path):
        late = wait("-t", "0.3", "-s", status, "touch", str(started))
        assert (late.returncode, started.exists()) == (EX_NO, False)
        assert "not good" in late.stderr

        body = f'touch {started}; echo "$$ $1"; exit 7'
        waiting = subprocess.Popen(
            [script, "-s", status, "sh", "-c", body, "sh", "two words"],
            env=with_command,
            stdout=subprocess.PIPE,
            text=True,
        )
        with waiting:
            simulator.do("status synchronized")
            output, _ = waiting.communicate(timeout=20)
        assert (waiting.returncode, output) == (7, f"{waiting.pid} two words\n")
        assert started.exists()


# ---- The hook ------------------------------------------------------------------------------------------------------

RECORD = {
    "id": 1,
    "kind": "disruption",
    "marker_before": 1,
    "marker_after": 2,
    "generation_before": None,
    "generation_after": None,
    "detected_at_ns": 1_800_000_000 * NSEC_PER_SEC,
    "offset_ns": 20 * NSEC_PER_SEC,
    "frequency_ppm": None,
    "actions": [],
    "recovered_after_ns": None,
}
COPY = {"generation_before": 4, "generation_after": 5}


@pytest.fixture
def systemctl(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """An environment in which systemctl writes down what it was asked for, and refuses bad.service."""
    log = tmp_path / "asked"
    log.touch()
    fake = tmp_path / "systemctl"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{log}\ncase "$*" in *bad.service) exit 5 ;; esac\n')
    fake.chmod(0o755)
    return environment() | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, log


@pytest.mark.parametrize(
    ("event", "change", "arguments", "restarted"),
    [
        ("recovered", {}, ["a.service", "b.service"], ["a.service", "b.service"]),
        ("recovered", {}, ["--off-by", "30", "a.service"], []),
        ("recovered", {"offset_ns": None}, ["--off-by", "30", "a.service"], ["a.service"]),
        ("recovered", COPY, ["--off-by", "30", "a.service"], ["a.service"]),
        ("recovered", {"kind": "drill"}, ["a.service"], []),
        ("recovered", {"kind": "drill"}, ["--drills", "a.service"], ["a.service"]),
        (
            "generation",
            {"kind": "generation", "offset_ns": None, **COPY},
            ["--off-by", "30", "a.service"],
            ["a.service"],
        ),
        ("disrupted", COPY, ["a.service"], []),
        ("soon", {}, ["a.service"], []),
    ],
)
def test_restart_after_clone(
    systemctl: tuple[dict[str, str], Path],
    event: str,
    change: dict[str, Any],
    arguments: list[str],
    restarted: list[str],
) -> None:
    setting, log = systemctl
    done = _hook(setting | {"VMCLOCK_EVENT": event}, RECORD | change, arguments)
    assert done.returncode == 0, done.stderr
    assert log.read_text().splitlines() == [f"try-restart -- {unit}" for unit in restarted]


def test_restart_after_clone_says_what_failed(systemctl: tuple[dict[str, str], Path]) -> None:
    setting, log = systemctl
    done = _hook(setting | {"VMCLOCK_EVENT": "recovered"}, RECORD, ["bad.service", "a.service"])
    assert done.returncode == 1
    assert log.read_text().splitlines() == ["try-restart -- bad.service", "try-restart -- a.service"]


@pytest.mark.parametrize(("generation", "asks"), [({}, False), (COPY, True)])
def test_reseed_only_in_a_copy(generation: dict[str, Any], asks: bool) -> None:
    """As nobody, who may write to the pool but not have it taken up at once: the complaint tells that it was tried."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("NOT TESTED: running without a right needs root, and setpriv")
    prefix = ("setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin")
    setting = environment() | {"VMCLOCK_EVENT": "disrupted"}
    done = _hook(setting, RECORD | generation, ["--reseed"], prefix)
    assert ("CAP_SYS_ADMIN" in done.stderr) is asks
    assert done.returncode == int(asks)


def test_hook_as_the_daemon_runs_it(
    short_path: Path, simulate: Callable[..., Simulator], systemctl: tuple[dict[str, str], Path]
) -> None:
    """A migration to a copy: disrupted and recovered, with the same record; the unit is restarted once."""
    setting, log = systemctl
    path = setting["PATH"].split(":")[0]
    wrapper = short_path / "hook"
    hook = f"{sys.executable} {EXAMPLES / 'restart_after_clone.py'} a.service"
    wrapper.write_text(f"#!/bin/sh\nPATH={path}:$PATH\nexec {hook}\n")
    wrapper.chmod(0o755)
    simulator = simulate()
    simulator.do("flags +vm-gen-counter-present")
    with _daemon(short_path, simulator.path, hook=wrapper) as daemon:
        daemon.wait_state("synchronised")
        simulator.do("disrupt offset=0.0001 generation")
        daemon.wait_until(lambda status: status["disruptions"] == 1 and status["state"] == "synchronised")
        wait_until(log.read_text, what="restart")
        assert log.read_text() == "try-restart -- a.service\n"


def _hook(
    setting: dict[str, str], record: dict[str, Any], arguments: list[str], prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, str(EXAMPLES / "restart_after_clone.py"), *arguments],
        input=json.dumps(record),
        env=setting,
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


# ---- The monitor ---------------------------------------------------------------------------------------------------


def monitor(*arguments: str | Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("scapy", reason="NOT TESTED: offset_monitor.py needs scapy")
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "offset_monitor.py"), *map(str, arguments)],
        **{"env": environment(), "capture_output": True, "text": True, "timeout": 30, "check": False} | settings,
    )


@pytest.fixture
def server(short_path: Path, simulate: Callable[..., Simulator]) -> Iterator[tuple[Simulator, Chronyd]]:
    """A page that is 5 ms ahead of this machine, and a chronyd that follows it and serves it."""
    simulator = simulate("--offset", "0.005")
    sock = short_path / "sock"
    line = f"refclock SOCK {sock} refid VMCK poll -4 filter 1 precision 1e-9 delay 2e-5 prefer"
    with (
        Chronyd(build("chronyd"), [line]) as chronyd,
        _daemon(short_path, simulator.path, sock, chronyd.command_socket),
    ):
        chronyd.wait_normal()
        yield simulator, chronyd


def test_monitor_agrees(server: tuple[Simulator, Chronyd], tmp_path: Path) -> None:
    simulator, chronyd = server
    name = f"127.0.0.1:{chronyd.ntp_address[1]}"
    file = tmp_path / "offsets.csv"
    options = ("--device", simulator.path, "--interval", "0.05", "--csv", file)
    done = monitor(*options, "--count", "4", name)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(f"{name}: agrees, ") == 4
    assert "stratum 1 VMCK" in done.stdout
    done = monitor(*options, "--count", "1", name, f"localhost:{chronyd.ntp_address[1]}")
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 6  # appended, with one heading
    for row in rows[:4]:
        assert (row["server"], row["verdict"], row["stratum"], row["refid"]) == (name, "agrees", "1", "VMCK")
        assert int(row["offset_ns"]) == pytest.approx(5_000_000, abs=10_000)
        # chronyd serves what it made of the page: a copy of it, as far as a socket on loopback can tell.
        assert abs(int(row["difference_ns"])) < int(row["bound_ns"]) < 10_000_000
        assert 0 < int(row["page_bound_ns"]) < int(row["bound_ns"])
        assert int(row["delay_ns"]) > 0
        assert abs(int(row["time_ns"]) - time.time_ns()) < 60 * NSEC_PER_SEC


def test_monitor_disagrees(server: tuple[Simulator, Chronyd], short_path: Path) -> None:
    """The server follows one page; against another, which is 10 ms apart, one of the two must be wrong."""
    _, chronyd = server
    other = Simulator(short_path / "other", short_path, "--offset", "0.015", name="other")
    try:
        done = monitor("--device", other.path, "--count", "1", f"127.0.0.1:{chronyd.ntp_address[1]}")
    finally:
        other.close()
    assert done.returncode == EX_NO
    difference_ms = re.search(r"disagrees, ([-+.\d]+) ms", done.stdout)
    assert difference_ms and float(difference_ms[1]) == pytest.approx(-10, abs=1), done.stdout


def test_monitor_without_an_answer(simulate: Callable[..., Simulator]) -> None:
    """A chronyd without a source, one that is stopped, and a port that nobody has."""
    page = simulate().path
    with Chronyd(build("chronyd")) as chronyd:
        name = f"127.0.0.1:{chronyd.ntp_address[1]}"
        done = monitor("--device", page, "--count", "1", name)
        assert (done.returncode, done.stderr) == (EX_NO, "")
        assert "unsynchronised (leap 3" in done.stdout
        chronyd.pause()
        done = monitor("--device", page, "--count", "1", "--timeout", "0.2", name)
        assert done.returncode == EX_NO and "silent (no answer in 0.2 s)" in done.stdout
        chronyd.resume()
    done = monitor("--device", page, "--count", "2", "--interval", "0", name)
    assert done.returncode == EX_NO and done.stdout.count("refused (Connection refused)") == 2


def test_monitor_among_forgers(simulate: Callable[..., Simulator]) -> None:
    """Rubbish and answers to other questions are passed over; a server that asks to be left alone is."""
    page = simulate().path
    asked: list[bytes] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while True:
                question, client = sock.recvfrom(2048)
                if question == b"end":
                    return
                asked.append(question)
                kiss = bytes([0b11_100_100, 0, 0, 0]) + bytes(8) + b"RATE" + bytes(8)
                sock.sendto(b"?", client)
                sock.sendto(kiss + bytes(24), client)  # the origin is not what was asked
                sock.sendto(bytes([0b11_100_011]) + kiss[1:] + question[40:48] + bytes(16), client)  # a client's
                sock.sendto(kiss + question[40:48] + bytes(16) + bytes(range(64)), client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        name = f"127.0.0.1:{sock.getsockname()[1]}"
        done = monitor("--device", page, "--count", "3", "--interval", "0", name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as ending:
            ending.sendto(b"end", sock.getsockname())
        thread.join(10)
    assert (done.returncode, done.stderr) == (EX_NO, "")
    assert done.stdout.endswith(f"{name}: refused (it asks to be left alone: RATE)\n")
    assert done.stdout.count("\n") == len(asked) == 1
    # A question tells nothing of the machine that asks: version, mode, and a time stamp by chance.
    assert len(asked[0]) == 48 and asked[0][:40] == bytes([0b00_100_011]) + bytes(39)


def test_monitor_page_without_time(simulate: Callable[..., Simulator], short_path: Path) -> None:
    page = simulate("--no-time").path
    done = monitor("--device", page, "--count", "1", "127.0.0.1:9")
    assert done.returncode == EX_NO
    assert done.stderr.count("\n") == 1 and "disruptions only" in done.stderr
    page = simulate("--status", "unreliable", path=short_path / "unreliable").path
    done = monitor("--device", page, "--count", "1", "127.0.0.1:9")
    assert done.returncode == EX_NO and "no page time" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((), EX_USAGE),
        (("--count", "-1", "127.0.0.1"), EX_USAGE),
        (("--timeout", "0", "127.0.0.1"), EX_USAGE),
        (("127.0.0.1:http",), EX_USAGE),
        (("[::1",), EX_USAGE),
        (("no-such-host.invalid",), EX_UNAVAILABLE),
        (("--device", "/nonexistent/page", "127.0.0.1"), EX_UNAVAILABLE),
        (("--csv", "/nonexistent/file", "127.0.0.1"), EX_UNAVAILABLE),
    ],
)
def test_monitor_refuses(arguments: tuple[str, ...], status: int) -> None:
    done = monitor(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr and done.stderr.splitlines()[-1].startswith("offset_monitor: ")


def test_monitor_live_table(server: tuple[Simulator, Chronyd]) -> None:
    """On a terminal a table is drawn over and over, until Ctrl-C."""
    simulator, chronyd = server
    name = f"127.0.0.1:{chronyd.ntp_address[1]}"
    pytest.importorskip("scapy", reason="NOT TESTED: offset_monitor.py needs scapy")
    ours, terminal = pty.openpty()
    program = [
        sys.executable,
        str(EXAMPLES / "offset_monitor.py"),
        "--interval",
        "0.05",
        "--device",
        str(simulator.path),
    ]
    process = subprocess.Popen([*program, name], env=environment(), stdout=terminal, stderr=terminal)
    os.close(terminal)
    try:
        seen = b""

        def drawn_thrice() -> bool:
            nonlocal seen
            while select.select([ours], [], [], 0.01)[0]:
                seen += os.read(ours, 65536)
            return seen.count(b"SERVER - PAGE") >= 3

        wait_until(drawn_thrice, what="third drawing")
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    frames = re.split(rb"\x1b\[\d+F", seen)
    lines = frames[1].replace(b"\x1b[K", b"").decode().splitlines()
    assert lines[0].split()[:2] == ["SERVER", "ST"]
    assert lines[1].startswith(name) and lines[1].endswith("agrees")
    assert "page - system +5.00" in lines[3]


# ---- The plot ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def plot() -> ModuleType:
    pytest.importorskip("matplotlib", reason="NOT TESTED: offset_plot.py needs matplotlib")
    pytest.importorskip("numpy", reason="NOT TESTED: offset_plot.py needs numpy")
    specification = importlib.util.spec_from_file_location("offset_plot", EXAMPLES / "offset_plot.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["offset_plot"] = module
    specification.loader.exec_module(module)
    return module


def samples(
    offsets_ns: list[int], interval_ns: int = 62_500_000, marker: int = 1, start_ns: int = 1_800_000_000 * NSEC_PER_SEC
) -> str:
    """Lines as the daemon writes them."""
    lines = []
    for number, offset_ns in enumerate(offsets_ns):
        reference_ns = start_ns + number * interval_ns
        lines.append(
            f"{reference_ns - offset_ns},{reference_ns},{offset_ns},20,900,10000,0,synchronized,{marker},{number}"
        )
    return "".join(f"{line}\n" for line in lines)


def test_plot_reads_what_the_daemon_writes(
    plot: ModuleType, short_path: Path, simulate: Callable[..., Simulator]
) -> None:
    """--log-samples, `sample --format csv` and chrony's refclocks.log of the same page agree; a drill is marked."""
    simulator = simulate("--offset", "0.002")
    sock, log = short_path / "sock", short_path / "samples.csv"
    line = f"refclock SOCK {sock} refid VMCK poll -4 filter 1 precision 1e-9 delay 2e-5 prefer"
    with Chronyd(build("chronyd"), [line], extra_conf="log refclocks") as chronyd:
        with _daemon(short_path, simulator.path, sock, chronyd.command_socket, log_samples=log) as daemon:
            chronyd.wait_normal()
            simulator.do("disrupt offset=0.0005")
            daemon.wait_until(lambda status: status["disruptions"] == 1 and status["state"] != "disrupted")
            fed = daemon.status()["samples"]
            daemon.wait_until(lambda status: status["samples"] > fed + 20)
        journal = daemon.state_dir / "journal.jsonl"
        ours = plot.read([str(log)])
        # chronyd holds its log back until it is full or chronyd ends.
        chronyd.stop()
        theirs = plot.read([str(chronyd.workdir / "log" / "refclocks.log")])
        assert len(ours) >= 30 and len(theirs) >= 30
        for record in (ours, theirs):
            assert record.offset_ns[0] == pytest.approx(2_000_000, abs=5_000)
            assert record.offset_ns[-1] == pytest.approx(500_000, abs=5_000)
        assert set(ours.marker.tolist()) == {1, 2}
        assert ours.bound_ns.min() >= 10_000
        picture = short_path / "offset.png"
        assert plot.main([str(log), "--journal", str(journal), "--output", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    by_command = short_path / "command.csv"
    done = run("sample", "--device", simulator.path, "--count", "20", "--interval", "0", "--format", "csv")
    by_command.write_text(done.stdout)
    assert len(plot.read([str(by_command)])) == 20


def test_samples_go_on_in_a_new_file_after_a_rotation(
    plot: ModuleType, short_path: Path, simulate: Callable[..., Simulator]
) -> None:
    """As logrotate does it: rename, SIGHUP. Both files have the heading, and no sample is missing between them."""
    log, old = short_path / "samples.csv", short_path / "samples.csv.1"
    with _daemon(short_path, simulate().path, log_samples=log, interval="0.02") as daemon:
        daemon.wait_until(lambda status: status["samples"] > 20)
        log.rename(old)
        daemon.send_signal(signal.SIGHUP)
        wait_until(log.exists, what="new file")
        fed = daemon.status()["samples"]
        daemon.wait_until(lambda status: status["samples"] > fed + 20)
    assert all(file.read_text().startswith(f"{HEADER}\n") for file in (log, old))
    record = plot.read([str(log), str(old)])
    assert len(record) == len(plot.read([str(log)])) + len(plot.read([str(old)]))
    assert (record.time_ns[1:] > record.time_ns[:-1]).all()
    assert len(plot.segments(record)) == 1


def test_plot_of_rough_files(plot: ModuleType, tmp_path: Path) -> None:
    """Rotated and packed, put together with their headings, with half a line in between and one at the end."""
    first, second = samples([1, 2, 3]), samples([4, 5, 6], start_ns=1_800_000_001 * NSEC_PER_SEC)
    old = tmp_path / "samples.csv.1.gz"
    old.write_bytes(gzip.compress(f"{HEADER}\n{first}".encode()))
    whole = tmp_path / "whole.csv"
    whole.write_text(f"{HEADER}\n{first}1800000000,18000\n{HEADER}\n{second}1800000002000000000,1800000002")
    assert plot.read([str(whole)]).offset_ns.tolist() == [1, 2, 3, 4, 5, 6]
    new = tmp_path / "samples.csv"
    new.write_text(f"{HEADER}\n{second.replace(',10000,', ',,')}")
    record = plot.read([str(new), str(old)])
    assert record.offset_ns.tolist() == [1, 2, 3, 4, 5, 6]
    assert record.bound_ns.tolist() == [10_020, 10_020, 10_020, -1, -1, -1]
    assert plot.main([str(new), "--output", str(tmp_path / "a.png")]) == 0


@pytest.mark.parametrize(
    ("content", "status", "says"),
    [
        (None, EX_UNAVAILABLE, "No such file"),
        ("what is this?\n", EX_CONFIG, "neither"),
        ("", EX_CONFIG, "neither"),
        (f"{HEADER}\n", EX_CONFIG, "fewer than two"),
        (f"{HEADER}\n" + samples([1]), EX_CONFIG, "fewer than two"),
        (f"{HEADER}\n" + samples([1, 2]).replace(",2,", ",x,"), EX_CONFIG, "x"),
        ("system_ns,offset_ns\n1,2\n", EX_CONFIG, "no column"),
    ],
)
def test_plot_refuses(
    plot: ModuleType, tmp_path: Path, capfd: Any, content: str | None, status: int, says: str
) -> None:
    file = tmp_path / "file"
    if content is not None:
        file.write_text(content)
    assert plot.main([str(file), "--output", str(tmp_path / "a.png")]) == status
    error = capfd.readouterr().err
    assert error.startswith("offset_plot: ") and error.count("\n") == 1 and says in error


def test_allan_deviation(plot: ModuleType) -> None:
    """White phase noise has a deviation of sqrt(3) sigma/tau; a constant rate none; steps and gaps do not count."""
    import numpy

    count, tau0_ns, sigma_ns = 100_000, 62_500_000, 50
    noise = numpy.random.default_rng(1).normal(0, sigma_ns, count)
    times = 1_800_000_000 * NSEC_PER_SEC + tau0_ns * numpy.arange(count)
    rate = 100 * numpy.arange(count)  # ns at each sample: 1.6 ppm
    marker = numpy.ones(count, dtype=numpy.int64)
    bound = marker * 10_000

    def allan(offset_ns: Any, times: Any = times, marker: Any = marker) -> Any:
        record = plot.Record(times, numpy.rint(offset_ns).astype(numpy.int64), bound, marker)
        taus, deviations = plot.allan_deviation(record)
        assert taus[0] == 0.0625 and taus[-1] > 800
        return deviations[taus < 100], taus[taus < 100]

    deviations, taus = allan(noise + rate)
    expected = 3**0.5 * sigma_ns * 1e-9 / taus
    assert deviations == pytest.approx(expected, rel=0.1)
    assert allan(rate)[0] == pytest.approx(0, abs=1e-15)

    second_half = numpy.arange(count) >= count // 2
    stepped = allan(noise + numpy.where(second_half, 20e9, 0))
    moved = noise + numpy.where(second_half, 3000, 0)
    after_a_gap = allan(moved, times=times + numpy.where(second_half, 3600 * NSEC_PER_SEC, 0))
    disrupted = allan(moved, marker=numpy.where(second_half, 2, 1))
    for deviations, _ in (stepped, after_a_gap, disrupted):
        assert deviations == pytest.approx(expected, rel=0.1)
    assert allan(moved)[0][-1] > 2 * expected[-1]  # nothing parts it


def test_plot_of_a_day(plot: ModuleType, tmp_path: Path) -> None:
    """A day of samples at 16 a second: read and drawn in seconds, and no outlier is lost."""
    day = 86_400 * 16
    file = tmp_path / "day.csv"
    with open(file, "w") as out:
        out.write(f"{HEADER}\n")
        for first in range(0, day, 10_000):
            start_ns = (1_800_000_000 * 16 + first) * 62_500_000
            out.write(samples([number % 7 for number in range(min(10_000, day - first))], start_ns=start_ns))
    outlier = samples([987_654_321], start_ns=1_800_000_000 * NSEC_PER_SEC + 40_000 * NSEC_PER_SEC + 1)
    with open(file, "a") as out:
        out.write(outlier)
    started = time.monotonic()
    assert plot.main([str(file), "--output", str(tmp_path / "day.png")]) == 0
    took_s = time.monotonic() - started
    record = plot.read([str(file)])
    assert len(record) == day + 1
    assert plot.envelope(record, record.offset_ns)[3].max() == 987_654_321
    print(f"a day, {len(record)} samples: {took_s:.1f} s")
    assert took_s < 30  # 3 s on an idle machine


# ---- What these tests share ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _daemon(
    directory: Path, page: Path, sock: Path | str | None = None, chronyd: Path | str = "none", **settings: Any
) -> Iterator[RunningDaemon]:
    """The daemon on this page, until the end of the block."""
    if sock is not None:
        settings["sock"] = sock
    if "unit" in settings:
        settings["shm"] = f"{settings.pop('unit')}:perm=0666"
    daemon = RunningDaemon(directory, device=page, chronyd=chronyd, **settings)
    try:
        yield daemon
    finally:
        daemon.close()
