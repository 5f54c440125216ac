"""Who may import whom, and what the running daemon never loads."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import PACKAGE_PARENT, ROOT, SockListener, environment, never_set_the_clock

PACKAGE = ROOT / "refclock"
SOURCES = sorted([*PACKAGE.glob("*.py"), *PACKAGE.glob("*.pyx")])
MODULES = {path.stem for path in SOURCES}

#: The layers that judge, and those that feed, may import these modules of ours at run time, and nothing else.
TABLE: dict[str, set[str]] = {
    "errors": set(),
    "model": set(),
    "_version": set(),
    "timescale": {"model"},
    "policy": {"model"},
    "rate": set(),
    "clerk": set(),
    "sink": set(),
    "sock": {"sink", "errors"},
    "segment": {"sink", "errors"},
    "page": {"errors", "model", "timescale"},
    "hypervisor": {"errors"},
    "systemclock": {"errors"},
    "options": {"errors"},
}
SINKS = {"sock", "segment"}

#: What only `if TYPE_CHECKING` may hold, where the table above does not allow it.
FOR_TYPES = {"policy": {"page"}, "sink": {"page"}, "sock": {"page"}}

#: Calls that set the clock. Words of a comment or docstring are no calls.
SETTERS = ("clock_adjtime", "clock_settime", "settimeofday", "adjtimex", "ntp_adjtime", "stime")

#: Too heavy for a daemon that is to fit into 16 MiB.
NEVER = {"dataclasses", "asyncio", "subprocess", "logging", "typing", "pathlib", "tempfile", "threading", "inspect"}


def ours(path: Path) -> Iterator[tuple[str, bool]]:
    """The modules of ours that a source imports, and whether only for the types."""
    if path.suffix == ".pyx":
        for name, names in re.findall(r"^from \.(\w*) import (.+)", path.read_text(), re.MULTILINE):
            yield from ((name, False),) if name else ((word, False) for word in re.findall(r"\w+", names))
        return
    tree = ast.parse(path.read_text())
    only_for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((name.partition(".")[0], node in only_for_types) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refclock"):
            yield (node.module or "").partition(".")[2] or "__init__", node in only_for_types
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("refclock") for alias in node.names), "relative imports only"


IMPORTS = {path.stem: {name for name, for_types in ours(path) if not for_types} for path in SOURCES}
TYPES = {path.stem: {name for name, for_types in ours(path) if for_types} for path in SOURCES}


def test_the_sources_were_understood() -> None:
    assert {"page", "policy", "sock", "segment"} <= IMPORTS["service"]
    assert "page" in TYPES["policy"] and "Sample" not in TYPES["policy"]
    assert "timescale" in IMPORTS["page"] and "sink" in IMPORTS["segment"]
    for name, imported in IMPORTS.items():
        assert imported <= MODULES, name


@pytest.mark.parametrize("module", sorted(TABLE))
def test_the_import_table(module: str) -> None:
    assert IMPORTS[module] <= TABLE[module]
    assert TYPES[module] <= TABLE[module] | FOR_TYPES.get(module, set())


def test_only_the_service_knows_both_ends() -> None:
    both = {name for name, imported in IMPORTS.items() if "page" in imported and imported & SINKS}
    assert both == {"service"}
    assert {name for name, imported in IMPORTS.items() if imported & SINKS} == {"service"}


def test_nobody_but_the_command_line_imports_the_service() -> None:
    assert {name for name, imported in IMPORTS.items() if "service" in imported} == {"cli"}
    assert {name for name, imported in IMPORTS.items() if "cli" in imported} == {"__main__"}


def test_there_is_no_circle() -> None:
    left = dict(IMPORTS)
    while left:
        done = {name for name, imported in left.items() if not imported & left.keys()}
        assert done, f"a circle among {sorted(left)}"
        for name in done:
            del left[name]


def without_comments(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".h":
        return re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    return re.sub(r'"""(?s:.*?)"""|#.*', "", text)


def test_only_one_module_can_set_the_clock() -> None:
    found = {
        path.stem
        for path in [*SOURCES, *PACKAGE.glob("*.h"), *(ROOT / "shm").glob("*.*")]
        if re.search(rf"\b({'|'.join(SETTERS)})\b", without_comments(path))
    }
    assert found == {"systemclock"}


def test_the_shared_layouts_import_nothing_of_ours() -> None:
    for path in (ROOT / "shm").glob("*"):
        assert "refclock" not in re.sub(r"REFCLOCK_\w+", "", without_comments(path)), path


DAEMON = """
import json, os, sys
from refclock import options
options.CONFIG_PATH = "/nonexistent"
from refclock.cli import main
drill = ["/bin/sh", "-c", f"sleep 0.3; kill -USR1 {os.getpid()}; kill -HUP {os.getpid()}"]
os.posix_spawn(drill[0], drill, os.environ)
status = main(["run", "--exit-after", "1", "--chronyd", "none", *sys.argv[1:]])
print(json.dumps([status, sorted(sys.modules)]))
"""


def test_the_daemon_loads_nothing_heavy(
    page_file: Callable[..., Path], listener: SockListener, short_path: Path
) -> None:
    """Fed, drilled, reloaded and ended: the modules that it has loaded."""
    options = ["--device", page_file(), "--sock", listener.path, "--status", short_path / "status.sock"]
    options += ["--state-dir", short_path, "--metrics", short_path / "metrics", "--hook", "/bin/true"]
    options += ["--log-samples", short_path / "samples"]
    command = [sys.executable, "-S", "-c", DAEMON, *map(str, options)]
    env = environment() | {"PYTHONPATH": str(PACKAGE_PARENT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=env, check=False, timeout=20, preexec_fn=never_set_the_clock
    )
    assert done.returncode == 0, done.stderr
    status, modules = json.loads(done.stdout)
    assert status == 0
    assert "recovered from drill" in done.stderr and "loaded anew" in done.stderr, done.stderr
    assert not NEVER & set(modules), sorted(NEVER & set(modules))
    loaded = {name.partition(".")[2] for name in modules if name.startswith("refclock.")}
    assert "service" in loaded
    assert not loaded & {"demo", "simulator", "hypervisor", "doctor", "monitor", "check"}, loaded
