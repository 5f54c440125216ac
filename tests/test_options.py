"""The options: the contract's table, each on the command line and in the file, and what is said of wrong ones."""

from __future__ import annotations

import os
import tomllib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from refclock import cli, options
from refclock.errors import ConfigError, UsageError
from refclock.options import OPTIONS, Settings, load
from tests.harness import run

S = 10**9

#: Name -> default as the program uses it; None where there is none. From the contract's table.
DEFAULTS: dict[str, Any] = {
    "device": "/dev/vmclock0",
    "sock": [],
    "shm": [],
    "interval": S // 20,
    "watch": S // 100,
    "on-disruption": "step",
    "step-threshold": 1000,
    "max-error": S // 1000,
    "chronyd": "/run/chrony/chronyd.sock",
    "fallback": None,
    "status": "/run/vmclock-refclock/status.sock",
    "state-dir": "/var/lib/vmclock-refclock",
    "journal": "/var/lib/vmclock-refclock/journal.jsonl",
    "metrics": None,
    "log-samples": None,
    "hook": [],
    "log-level": "info",
    "exit-after": None,
}

#: Name -> (as written in TOML, as on the command line, what it comes to).
GOOD: dict[str, list[tuple[str, list[str], Any]]] = {
    "device": [('"/tmp/page"', ["/tmp/page"], "/tmp/page")],
    "sock": [('["/a", "/b"]', ["/a", "/b"], ["/a", "/b"]), ("[]", [], [])],
    "shm": [
        ("[2]", ["2"], [(2, 0o600)]),
        ('["0", "255:perm=0666"]', ["0", "255:perm=0666"], [(0, 0o600), (255, 0o666)]),
        ('["3:perm=640"]', ["3:perm=640"], [(3, 0o640)]),
    ],
    "interval": [
        ("0.25", ["0.25"], S // 4),
        ("2", ["2"], 2 * S),
        ('"0.5"', ["0.5"], S // 2),
        ("1e-3", ["1e-3"], 10**6),
    ],
    "watch": [("0.001", ["0.001"], 10**6), ("10", ["10"], 10 * S)],
    "on-disruption": [('"flag"', ["flag"], "flag"), ('"step"', ["step"], "step")],
    "step-threshold": [("0", ["0"], 0), ("0.5", ["0.5"], S // 2)],
    "max-error": [("0.01", ["0.01"], S // 100), ("1e-9", ["1e-9"], 1)],
    "chronyd": [('"none"', ["none"], None), ('"/x"', ["/x"], "/x")],
    "fallback": [('"none"', ["none"], None), ('"/dev/ptp0"', ["/dev/ptp0"], "/dev/ptp0")],
    "status": [('"/s"', ["/s"], "/s")],
    "state-dir": [('"/d"', ["/d"], "/d")],
    "journal": [('"/j"', ["/j"], "/j")],
    "metrics": [('"/m"', ["/m"], "/m")],
    "log-samples": [('"/l"', ["/l"], "/l")],
    "hook": [('[\'/bin/a b "c d"\', "/e"]', ['/bin/a b "c d"', "/e"], [["/bin/a", "b", "c d"], ["/e"]])],
    "log-level": [('"debug"', ["debug"], "debug"), ('"error"', ["error"], "error")],
    "exit-after": [("1.5", ["1.5"], 3 * S // 2), ("0", ["0"], 0)],
}

#: Name -> values in TOML that are refused; those in quotes are refused on the command line as well.
BAD: dict[str, list[str]] = {
    "device": ['""', "5", "true", '["/a"]', '"a\\u0000b"'],
    "sock": ['"/a"', "[5]", '[""]', f'["{"x" * 108}"]'],
    "shm": [
        "2",
        '["256"]',
        '["-1"]',
        '["x"]',
        '[""]',
        '["1:perm="]',
        '["1:perm=8"]',
        '["1:perm=1777"]',
        '["1:perm=-1"]',
        '["1:mode=0600"]',
        '["1:0600"]',
        "[true]",
        "[1.5]",
        '["²"]',
    ],
    "interval": ["0", "-1", "0.0001", "4000", "true", '"x"', '"nan"', '"inf"', "nan", "inf", "[1]", "1979-05-27"],
    "watch": ["0", "11", '"soon"'],
    "on-disruption": ['"slew"', "1", "true", '["step"]', '"STEP"'],
    "step-threshold": ["-0.1", "3601", '""'],
    "max-error": ["0", "1e-10", "3601", '"1ms"'],
    "chronyd": ['""', "0", "false"],
    "fallback": ['""', "[]"],
    "status": ['""', f'"{"x" * 108}"'],
    "state-dir": ['""', "1"],
    "journal": ['""'],
    "metrics": ['""', "1"],
    "log-samples": ['""', "1"],
    "hook": ['"/bin/a"', '["relative"]', '[""]', '["  "]', "['/bin/a \"unclosed']", "[1]"],
    "log-level": ['"chatty"', "3"],
    "exit-after": ["-1", '"never"'],
}


def parse(*arguments: str) -> Settings:
    """The settings that a command line comes to, with a file that is there but empty."""
    parsed: Namespace = cli._parser().parse_args(["run", *arguments])
    return cli._settings(parsed)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.touch()
    return path


def test_the_table_is_the_contracts() -> None:
    assert [option.name for option in OPTIONS] == list(DEFAULTS)
    assert {option.name for option in OPTIONS if option.repeatable} == {"sock", "shm", "hook"}
    assert set(GOOD) == set(BAD) == set(DEFAULTS)


def test_the_defaults(config: Path) -> None:
    settings = parse("--config", str(config))
    assert {name: getattr(settings, name.replace("-", "_")) for name in DEFAULTS} == DEFAULTS


def test_the_journal_lies_in_the_state_directory_unless_told_otherwise(config: Path) -> None:
    assert parse("--config", str(config), "--state-dir", "/d").journal == "/d/journal.jsonl"
    assert parse("--config", str(config), "--state-dir", "/d", "--journal", "/j").journal == "/j"


@pytest.mark.parametrize("name", GOOD)
def test_good_values(config: Path, name: str) -> None:
    attribute = name.replace("-", "_")
    for in_file, on_line, value in GOOD[name]:
        config.write_text(f"{name} = {in_file}\n")
        assert getattr(parse("--config", str(config)), attribute) == value
        config.write_text("")
        arguments = [word for item in on_line for word in (f"--{name}", item)]
        if arguments:
            assert getattr(parse("--config", str(config), *arguments), attribute) == value


@pytest.mark.parametrize("name", BAD)
def test_bad_values(config: Path, name: str) -> None:
    """With file, line and what is allowed; on the command line with the option."""
    for text in BAD[name]:
        config.write_text(f"# a comment\n\n\n{name} = {text}\n")
        with pytest.raises(ConfigError) as error:
            load(str(config))
        said = str(error.value)
        assert said.startswith(f"{config}:4: {name} = ") and "allowed is" in said and "\n" not in said, said
        assert error.value.exit_status == 78
        config.write_text("")
        (value,) = tomllib.loads(f"value = {text}").values()
        items = value if isinstance(value, list) and options.BY_NAME[name].repeatable else []
        for item in [value, *items]:
            if isinstance(item, str) and "\0" not in item and options.BY_NAME[name].repeatable == (item is not value):
                with pytest.raises(UsageError) as usage:
                    parse("--config", str(config), f"--{name}={item}")
                assert f"--{name} " in str(usage.value) and "allowed is" in str(usage.value)
                assert "\n" not in str(usage.value)
                assert usage.value.exit_status == 64


def test_the_command_line_wins(config: Path) -> None:
    config.write_text('interval = 1\nsock = ["/a", "/b"]\nmax-error = 0.5\n')
    settings = parse("--config", str(config), "--interval", "2", "--sock", "/c")
    assert (settings.interval, settings.sock, settings.max_error) == (2 * S, ["/c"], S // 2)


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("intervall = 1\n", 1, "no option 'intervall'; there are: device, sock"),
        ("\n\n# x\n  on_disruption = 'step'\n", 4, "no option 'on_disruption'"),
        ('device = "/d"\n[sock]\npath = "/a"\n', 2, "sock"),
        ('device = "/d"\n"max-error" = 0\n', 2, "max-error"),
        ("watch.x = 1\n", 1, "watch"),
        ("config = 'x'\n", 1, "no option 'config'"),
    ],
)
def test_keys_that_are_none(config: Path, text: str, line: int, words: str) -> None:
    config.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(str(config))
    assert str(error.value).startswith(f"{config}:{line}: ") and words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content",
    [b"interval 1\n", b"interval = \n", b"= 1", b"interval = 1\ninterval = 2\n", b"\xff\xfe", b"a = '''\n", b"\0"],
)
def test_files_that_are_no_toml(config: Path, content: bytes) -> None:
    config.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load(str(config))
    assert str(config) in str(error.value) and "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ConfigError) as error:
            load(str(path))
        assert words in str(error.value) and error.value.exit_status == 78


def test_the_files_place_is_the_contracts() -> None:
    assert options.CONFIG_PATH == "/etc/vmclock-refclock.toml"


def test_the_file_of_the_contract_is_read_if_it_is_there(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "CONFIG_PATH", str(config))
    config.write_text("interval = 3\n")
    assert parse().interval == 3 * S
    config.unlink()
    assert parse().interval == DEFAULTS["interval"]


# ---- validate, and run ---------------------------------------------------------------------------------------


def test_validate(config: Path) -> None:
    config.write_text('sock = ["/run/chrony.vmclock.sock"]\nshm = ["2:perm=0640"]\nhook = ["/bin/true"]\n')
    done = run("validate", config)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{config}: good\n", "")


@pytest.mark.parametrize("text", ["interval = 'x'\n", "nonsense = 1\n", "[", "shm = 5\n"])
def test_validate_says_what_run_would(config: Path, text: str) -> None:
    config.write_text(text)
    validated = run("validate", config)
    ran = run("run", "--config", config)
    assert validated.returncode == ran.returncode == 78
    assert validated.stdout == ran.stdout == ""
    assert validated.stderr == ran.stderr
    assert validated.stderr.count("\n") == 1 and str(config) in validated.stderr


def test_validate_a_file_that_is_not_there(tmp_path: Path) -> None:
    done = run("validate", tmp_path / "none.toml")
    assert done.returncode == 78 and done.stderr.count("\n") == 1


def test_a_path_that_is_no_utf_8(config: Path) -> None:
    """On the command line it may be any bytes but 0."""
    settings = parse("--config", str(config), "--device", os.fsdecode(b"/d\xff"))
    assert os.fsencode(settings.device) == b"/d\xff"
    done = run("run", "--config", config, "--sock", os.fsdecode(b"/" + b"\xff" * 200), "--status", config)
    assert done.returncode == 64 and done.stderr.count("\n") == 1


def test_help_names_every_option() -> None:
    done = run("run", "--help")
    assert done.returncode == 0
    for option in OPTIONS:
        assert f"--{option.name} " in done.stdout
