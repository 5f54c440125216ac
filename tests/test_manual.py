"""The manual pages: up to date with the program's own tables, and without a fault in their form."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refclock import cli, options
from tests.harness import ROOT

PAGES = sorted((ROOT / "docs/man").glob("vmclock-refclock*.[158]"))


def ended(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def needs(program: str) -> str:
    if shutil.which(program) is None:
        pytest.skip(f"NOT TESTED: {program} is not installed")
    return program


def test_what_is_generated_is_up_to_date() -> None:
    done = ended(sys.executable, "docs/generate.py", "--check")
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run `python docs/generate.py`"


def test_the_check_sees_a_difference(tmp_path: Path) -> None:
    for name in ("docs", "refclock", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    table = tmp_path / "refclock/options.py"
    table.write_text(table.read_text().replace("time between samples", "time from sample to sample"))
    stale = ended(sys.executable, tmp_path / "docs/generate.py", "--check")
    assert stale.returncode == 1
    assert {line.partition(":")[0] for line in stale.stdout.splitlines()} >= {
        "docs/man/vmclock-refclock.8",
        "docs/man/vmclock-refclock.toml.5",
    }
    assert ended(sys.executable, tmp_path / "docs/generate.py").returncode == 0
    assert "time from sample to sample" in (tmp_path / "docs/man/vmclock-refclock.8").read_text().lower()
    assert ended(sys.executable, tmp_path / "docs/generate.py", "--check").returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_finds_no_fault(page: Path) -> None:
    done = ended(needs("mandoc"), "-T", "lint", page)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_groff_has_no_warning(page: Path) -> None:
    done = ended(needs("man"), "--warnings", "--encoding=UTF-8", "--local-file", "-Tutf8", "-Z", page, MANROFFSEQ="")
    assert (done.returncode, done.stderr) == (0, "")


def test_there_are_three_of_them() -> None:
    assert [page.name for page in PAGES] == ["vmclock-refclock.1", "vmclock-refclock.8", "vmclock-refclock.toml.5"]


def test_every_option_and_every_command_is_in_them() -> None:
    text = {page.name: page.read_text().replace("\\-", "-").replace("\\&", "") for page in PAGES}
    for name in options.BY_NAME:
        assert f'"--{name}"' in text["vmclock-refclock.8"]
        assert f'"{name}"' in text["vmclock-refclock.toml.5"]
    usage = cli._parser().format_help()
    for command in re.findall(r"^    ([a-z]+)  ", usage, re.MULTILINE):
        assert re.search(rf"^\.SS {command}( |$)", text["vmclock-refclock.1"], re.MULTILINE), command
