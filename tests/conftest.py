"""Fixtures: a short directory, the simulator and the daemon as real processes, and their logs where a test failed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import consumers
from tests.harness import NATIVE, ROOT, RunningDaemon, Simulator, SockListener, environment, make_page, write_page


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory with a short path: a Unix socket's may have 107 bytes. Others may look into it."""
    directory = Path(tempfile.mkdtemp(prefix="vmclock-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def page_file(short_path: Path) -> Callable[..., Path]:
    """Writes a page with these fields over a sound one into a file, which is returned."""

    def write(name: str = "page", length: int = 4096, **fields: int) -> Path:
        return write_page(short_path / name, make_page(**fields), length)

    return write


@pytest.fixture
def simulate(short_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., Simulator]]:
    """Starts `simulate` (options as on the command line), by default on `short_path / "page"`."""
    with _ending(request) as programs:

        def start(*options: str, path: Path | None = None) -> Simulator:
            name = f"simulate-{len(programs)}" if programs else "simulate"
            programs.append(Simulator(path or short_path / "page", short_path, *options, name=name))
            return programs[-1]

        yield start


@pytest.fixture
def daemon(short_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., RunningDaemon]]:
    """Starts `run` on paths of its own; see RunningDaemon for the options."""
    with _ending(request) as programs:

        def start(**options: Any) -> RunningDaemon:
            name = f"daemon-{len(programs)}" if programs else "daemon"
            programs.append(RunningDaemon(short_path, **{"name": name} | options))
            return programs[-1]

        yield start


@pytest.fixture
def listener(short_path: Path) -> Iterator[SockListener]:
    """A fake chronyd that listens on `short_path / "sock"`."""
    with SockListener(short_path / "sock") as listening:
        yield listening


@pytest.fixture(scope="session")
def native(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Compiles tests/native/NAME.c with these additional flags, once; the program."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED: no C compiler")
    built: dict[tuple[str, ...], Path] = {}

    def build(name: str, *flags: str) -> Path:
        key = (name, *flags)
        if key not in built:
            program = tmp_path_factory.mktemp("native") / name
            warnings = ["-Wall", "-Wextra", "-Werror"]
            source = ["-I", str(ROOT / "shm"), str(NATIVE / f"{name}.c"), "-o", str(program)]
            command_line = [compiler, "-std=gnu11", "-O2", *warnings, *flags, *source]
            done = subprocess.run(command_line, capture_output=True, text=True, check=False, timeout=60)
            assert done.returncode == 0, done.stderr
            built[key] = program
        return built[key]

    return build


@pytest.fixture(scope="session")
def nobody() -> tuple[str, ...]:
    """What to put before a command line so that it runs as nobody, without any right."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("NOT TESTED: running as nobody needs root, and setpriv")
    prefix = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all")
    probe = [*prefix, sys.executable, "-c", "import refclock.page"]
    if subprocess.run(probe, env=environment(), cwd="/", check=False, timeout=10).returncode != 0:
        pytest.skip("NOT TESTED: nobody may not run this Python")
    return prefix


@contextlib.contextmanager
def _ending(request: pytest.FixtureRequest) -> Iterator[list[Any]]:
    """Programs that end with the test; where it failed, their logs are shown. None may have said a traceback."""
    programs: list[Any] = []
    try:
        yield programs
    finally:
        for program in reversed(programs):
            program.close()
            if getattr(request.node, "failed", False):
                request.node.add_report_section("teardown", f"log of {program.name}", program.log()[-4000:])
    for program in programs:
        assert "Traceback" not in program.log(), program.log()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    report: pytest.TestReport = yield
    item.failed = getattr(item, "failed", False) or report.failed  # type: ignore[attr-defined]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Which real consumers were there, and which were not."""
    lines = consumers.report().lines()
    if lines:
        terminalreporter.section("consumers")
        terminalreporter.write_line("\n".join(lines))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Without chronyd and ntpd the tests have not shown what they are for (tests/run.sh asks for them)."""
    if os.environ.get("VMCLOCK_REQUIRE_CONSUMERS") and consumers.report().missing():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
