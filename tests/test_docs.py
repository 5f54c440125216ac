"""The documents say what is so: links lead somewhere, tables match the code, what is to be typed in is accepted."""

from __future__ import annotations

import ast
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as ElementTree
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refclock import cli, model, options, sock
from refclock.page import Sample
from refclock.policy import Record
from refclock.service import Service
from tests.consumers import build
from tests.harness import ROOT, RunningDaemon, Simulator

DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), *ROOT.glob("examples/**/*.md")])
SHM = ROOT / "shm"
BITS = {"u8": 8, "u16": 16, "u32": 32, "u64": 64, "i16": 16, "i32": 32, "i64": 64, "f64": 64}


def each_page(function: Callable[..., None]) -> Callable[..., None]:
    named = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
    decorated: Callable[..., None] = named(function)
    return decorated


# ---- Reading Markdown ----------------------------------------------------------------------------------------------


def tables(page: Path) -> dict[str, list[list[str]]]:
    """The last table below each heading: its rows without the head, the cells' text."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in page.read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        elif line.startswith("|---"):
            found[heading] = []
        elif line.startswith("|") and heading in found:
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found[heading].append([cell.strip() for cell in cells])
    return found


def fields(rows: list[list[str]]) -> list[tuple[int, str, str]]:
    """Offset, type and name of each row of a byte table."""
    return [(int(row[0], 0), row[1], row[2]) for row in rows]


def byte_tables() -> dict[str, list[list[str]]]:
    """Those of layouts.md with an offset in front; of two below a heading the first."""
    found: dict[str, list[list[str]]] = {}
    heading, head = "", ""
    for line in (DOCS / "layouts.md").read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("#").strip()
        elif line.startswith("|") and not head:
            head = line
        elif line.startswith("|") and head.startswith("| offset ") and not line.startswith("|---"):
            found.setdefault(heading, []).append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif not line.startswith("|"):
            head = ""
    return found


def code(page: Path) -> Iterator[tuple[str, str]]:
    """Every block of code: the language that its fence names (indented ones: none), and its text."""
    text = page.read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield language, block
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    for block in re.findall(r"(?:^    .*\n|^\n(?=    ))+", unfenced, re.MULTILINE):
        if block.strip():
            yield "", re.sub(r"^    ", "", block, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


# ---- Links and pictures --------------------------------------------------------------------------------------------


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there), target


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (DOCS / "README.md").read_text()))
    assert listed == {page.name for page in DOCS.glob("*.md")} - {"README.md"}


def test_pictures() -> None:
    pictures = sorted((DOCS / "images").iterdir())
    assert {picture.suffix for picture in pictures} <= {".svg", ".png"}
    used = "".join(page.read_text() for page in PAGES)
    for picture in pictures:
        assert picture.name in used, picture
        assert picture.stat().st_size < 150_000, picture
        if picture.suffix == ".svg":
            assert ElementTree.parse(picture).getroot().tag == "{http://www.w3.org/2000/svg}svg"


# ---- Layouts -------------------------------------------------------------------------------------------------------

HEADERS = {
    "The vmclock page": ("vmclock_page.h", "vmclock_page"),
    "NTP's shared memory": ("ntp_segment.h", "ntp_segment"),
}


@pytest.mark.parametrize("heading", HEADERS)
def test_layout_as_the_compiler_has_it(heading: str, tmp_path: Path) -> None:
    """Every field of the C structure, with its offset, size and sign; and no other."""
    header, name = HEADERS[heading]
    documented = fields(byte_tables()[heading])
    declared = re.search(rf"struct {name} {{(.*?)}};", (SHM / header).read_text(), re.DOTALL)
    assert declared is not None
    declarations = re.findall(r"^\s*(\w+)_t (\w+)(?:\[(\d+)\])?;", declared[1], re.MULTILINE)
    types = {
        field: ("u" if kind.startswith("u") else "i") + re.sub(r"\D", "", kind) + (f"[{number}]" if number else "")
        for kind, field, number in declarations
    }
    assert {field: kind for _, kind, field in documented} == types

    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED: no C compiler")
    lines = [
        f'printf("%zu %zu\\n", offsetof(struct {name}, {field}), sizeof(((struct {name} *)0)->{field}));'
        for _, _, field in documented
    ]
    program = tmp_path / "layout.c"
    includes = f'#include <stdio.h>\n#include "{header}"\n'
    program.write_text(f"{includes}int main(void) {{ {' '.join(lines)} return 0; }}\n")
    built = [compiler, "-std=gnu11", "-I", str(SHM), str(program), "-o", str(tmp_path / "layout")]
    subprocess.run(built, check=True, timeout=60)
    told = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True, timeout=10).stdout
    assert [(offset, _bytes(kind)) for offset, kind, _ in documented] == [
        tuple(map(int, line.split())) for line in told.splitlines()
    ]


def _bytes(kind: str) -> int:
    base, _, number = kind.partition("[")
    return BITS[base] // 8 * int(number.rstrip("]") or 1)


def test_page_as_the_simulator_and_the_tests_have_it() -> None:
    documented = fields(byte_tables()["The vmclock page"])
    codes = {"I": "u32", "H": "u16", "B": "u8", "Q": "u64", "h": "i16"}
    assert [(offset, codes[letter], name) for name, offset, letter in model.FIELDS] == [
        row for row in documented if row[2] != "pad"
    ]
    assert _bytes(documented[-1][1]) + documented[-1][0] == model.PAGE_BYTES


def test_words_of_the_page() -> None:
    meaning = {row[2]: row[3] for row in byte_tables()["The vmclock page"]}

    def words(field: str) -> list[str]:
        numbered = re.findall(r"(\d+) ([\w -]+)", meaning[field])
        assert [int(number) for number, _ in numbered] == list(range(len(numbered)))
        return [word.strip().lower().replace(" ", "-") for _, word in numbered]

    assert words("clock_status") == list(model.CLOCK_STATUSES)
    assert words("leap_indicator") == list(model.LEAPS)
    assert words("time_type") == list(model.TIME_TYPES)
    flags = tables(DOCS / "layouts.md")["The vmclock page"]
    assert [(int(row[0]), row[1]) for row in flags] == list(enumerate(model.FLAGS))


def test_sock_datagram() -> None:
    documented = fields(byte_tables()["chrony's SOCK datagram"])
    letters = {"i64": "q", "f64": "d", "i32": "i"}
    format = "=" + "".join(letters[kind] for _, kind, _ in documented)
    assert format == sock.MESSAGE.format
    assert [struct.calcsize(format[: 1 + number]) for number in range(len(documented))] == [
        offset for offset, _, _ in documented
    ]
    sample = Sample(system_ns=1_800_000_000_123_456_789, reference_ns=1_800_000_000_123_457_000, leap=1)
    values = dict(zip((name for _, _, name in documented), sock.MESSAGE.unpack(sock.encode(sample)), strict=True))
    assert values == {
        "tv_sec": 1_800_000_000,
        "tv_usec": 123_456,
        "offset": 211e-9,
        "pulse": 0,
        "leap": 1,
        "padding": 0,
        "magic": 0x534F434B,
    }


# ---- The status socket, records, samples, words --------------------------------------------------------------------


def test_status_socket(simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon]) -> None:
    page = tables(DOCS / "status-socket.md")
    words = {row[0].strip("`") for row in page["The status socket"]}
    assert words == {name.removeprefix("_answer_") for name in dir(Service) if name.startswith("_answer_")}

    running = daemon(device=simulate().path)
    documented = {row[0].strip("`"): row[1] for row in page["The status"]}
    status = running.wait_state("synchronised")
    assert documented.keys() == status.keys()
    record = running.ask("drill") and running.wait_until(lambda told: told["last_recovery_ns"])["last_disruption"]
    documented_record = {row[0].strip("`"): row[1] for row in page["A record"]}
    assert record.keys() == documented_record.keys() - {"superseded_by"}
    assert set(Record.__slots__) - {"detected_ns"} == documented_record.keys()
    source = (ROOT / "refclock/reaction.py").read_text()
    names = re.findall(r'(?:note\(\s*now_ns, |_command\((?:self\._)?record, )"([\w-]+)"', source)
    assert {row[0].strip("`") for row in page["What was done"]} == {*names, "step", "step-rest"}
    for described, object_ in ((documented, running.status()), (documented_record, record)):
        for key, value in object_.items():
            assert _is(value, described[key]), (key, value)
    assert running.ask("no-such-word").keys() == {"refused"}
    assert isinstance(running.ask("metrics"), str)
    assert running.ask("history") == [record]


def _is(value: Any, described: str) -> bool:
    """Whether a value is of a type as the tables have it: `integer or null`."""
    kinds: dict[str, Any] = {
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
        "object": dict,
        "list": list,
        "null": type(None),
    }
    if isinstance(value, bool):
        return "boolean" in described
    return any(isinstance(value, kinds[word]) for word in described.split(" or "))


def test_sample_columns() -> None:
    rows = tables(DOCS / "measuring.md")["Every sample in a file"]
    assert [row[0].strip("`") for row in rows] == list(Sample.FIELDS)


def test_words() -> None:
    page = tables(DOCS / "glossary.md")
    assert [row[0].strip("`") for row in page["States of the system clock"]] == list(model.STATES)
    assert {row[0].strip("`") for row in page["Why a sample is withheld"]} == set(model.WITHHELD)


# ---- What is to be typed in ----------------------------------------------------------------------------------------


def subcommands() -> dict[str, ArgumentParser]:
    (actions,) = (action for action in cli._parser()._actions if isinstance(action, _SubParsersAction))
    return dict(actions.choices)


def commands(page: Path) -> Iterator[list[str]]:
    """The words after `vmclock-refclock` wherever a command is written, in blocks and in the text."""
    blocks = [block for _, block in code(page)]
    inline = re.findall(r"`([^`\n]+)`", page.read_text())
    for text in [*blocks, *inline]:
        for line in text.splitlines():
            for found in re.findall(r"(?:^|[\s;&])vmclock-refclock ([a-z][^#&|;>]*)", line):
                yield found.split()


@each_page
def test_commands_exist(page: Path) -> None:
    known = subcommands()
    for words in commands(page):
        assert words[0] in known, words
        parser = known[words[0]]
        flags = {flag for action in parser._actions for flag in action.option_strings}
        for word in words[1:]:
            if word.startswith("-"):
                assert word.partition("=")[0] in flags, words


@each_page
def test_options_exist(page: Path) -> None:
    """An option that is named alone is one of the daemon's, or of a command's."""
    flags = {flag for parser in subcommands().values() for action in parser._actions for flag in action.option_strings}
    scripts = "".join(path.read_text() for path in [*(ROOT / "examples").glob("*.*"), ROOT / "tests/run.sh"])
    for option in re.findall(r"`(--[a-z-]+)", page.read_text()):
        assert option in flags or option in scripts, option


@each_page
def test_code_parses(page: Path) -> None:
    yaml = pytest.importorskip("yaml", reason="NOT TESTED: no pyyaml")
    for language, block in code(page):
        if language == "python":
            ast.parse(block)
        elif language == "xml":
            ElementTree.fromstring(block)
        elif language == "yaml":
            list(yaml.safe_load_all(block))
        else:
            assert language in ("", "dockerfile", "console"), language


def test_kubernetes_objects_hang_together() -> None:
    """Mounts have their volumes, selectors their labels, and the arguments are ones that the program takes."""
    yaml = pytest.importorskip("yaml", reason="NOT TESTED: no pyyaml")
    objects = [yaml.safe_load(block) for language, block in code(DOCS / "containers.md") if language == "yaml"]
    assert [one["kind"] for one in objects] == ["Pod", "DaemonSet"]
    for one in objects:
        spec = one["spec"]
        if one["kind"] == "DaemonSet":
            assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
            spec = spec["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert {mount["name"] for mount in container.get("volumeMounts", [])} <= volumes
            probes = [container[probe]["exec"]["command"] for probe in container if probe.endswith("Probe")]
            assert all(command[0] == "vmclock-refclock" for command in probes)
            for arguments in [*(command[1:] for command in probes), container.get("args")]:
                if arguments is not None:
                    cli._parser().parse_args(arguments)


def test_refclock_lines_are_chronyds() -> None:
    """Every line for chrony.conf, by chronyd itself."""
    lines = {
        line.strip()
        for page in PAGES
        for _, block in code(page)
        for line in block.splitlines()
        if line.strip().startswith("refclock SOCK /")
    }
    assert lines
    chronyd = build("chronyd").command("usr/sbin/chronyd")
    for line in lines:
        done = subprocess.run([*chronyd, "-p", line], capture_output=True, text=True, timeout=10, check=False)
        assert (done.returncode, done.stdout) == (0, f"{line}\n"), done.stderr


def test_lines_are_those_of_the_examples() -> None:
    examples = {name: (ROOT / "examples" / name).read_text() for name in ("ntp.conf", "ntpd-rs.toml", "chrony.conf")}
    ntpd, ntpd_rs, chrony = (
        "\n".join(block for _, block in code(DOCS / name)) for name in ("ntpd.md", "ntpd-rs.md", "chrony.md")
    )
    for line in re.findall(r"^(?:refclock|server|fudge) .*$", ntpd, re.MULTILINE):
        assert line in examples["ntp.conf"], line
    for line in re.findall(r"^(?:\[.*|[a-z-]+ = .*)$", ntpd_rs, re.MULTILINE):
        assert line in examples["ntpd-rs.toml"], line
    for line in re.findall(r"^refclock .*$", chrony, re.MULTILINE):
        assert line in examples["chrony.conf"], line


def test_defaults_in_the_text_are_the_programs() -> None:
    """Paths of the daemon that a page names are those of its own defaults."""
    text = "".join(page.read_text() for page in PAGES)
    for path in (options.STATUS_PATH, options.STATE_DIR, options.DEVICE_PATH, options.CONFIG_PATH):
        assert path in text
    assert set(re.findall(r"/run/vmclock-refclock/[\w.-]+", text)) == {options.STATUS_PATH}
    journals = set(re.findall(r"/var/lib/vmclock-refclock/[\w.-]+", text))
    assert journals == {options.Settings({}).journal}


def test_every_command_is_named() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for name in subcommands():
        assert f"vmclock-refclock {name}" in text or f"`{name}`" in text, name
