"""refclock.journal: what outlives the daemon, on disks that refuse and after crashes."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from refclock import journal
from refclock.journal import KEPT, LAST_SEEN, SECTOR, Journal, LastSeen, latest, read
from refclock.policy import Record


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []

    def __call__(self, level: str, text: str) -> None:
        self.lines.append((level, text))


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal.jsonl"


def record(id: int, kind: str = "disruption", recovered_after_ns: int | None = None) -> Record:
    made = Record(id, kind, (id, id + 1), (None, None), 0, 1_700_000_000_000_000_000)
    made.note(5, "step", True, "+5 ns")
    made.recovered_after_ns = recovered_after_ns
    return made


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seen_and_closed(path: Path, log: Log) -> None:
    kept = Journal(str(path), log)
    one = record(kept.next_id)
    kept.write(one)
    assert kept.records() == [one.fields()] == lines(path)
    one.note(7, "reset-sources", True)
    assert kept.records() == [one.fields()], "an open record is told as it stands"
    one.recovered_after_ns = 90
    kept.write(one)
    one.note(100, "too-late", True)
    assert kept.records() == [lines(path)[-1]], "a closed one as it was closed"
    assert len(lines(path)) == 2 and lines(path)[-1]["recovered_after_ns"] == 90
    assert dict(latest(read(str(path)))) == {1: lines(path)[-1]}
    assert path.stat().st_mode & 0o777 == 0o644 and not log.lines


def test_ids_go_on_after_a_restart(path: Path, log: Log) -> None:
    for expected in (1, 2, 3):
        kept = Journal(str(path), log)
        assert kept.next_id == expected
        kept.write(record(expected, recovered_after_ns=1))
    assert [fields["id"] for fields in Journal(str(path), log).records()] == [1, 2, 3]


def test_what_an_earlier_run_left_open_is_closed_by_the_next(path: Path, log: Log) -> None:
    first = Journal(str(path), log)
    first.write(record(1, recovered_after_ns=3))
    first.write(record(2))
    first.write(record(3, "drill"))
    second = Journal(str(path), log)
    second.write(record(4, "generation", recovered_after_ns=0))
    assert "superseded_by" not in second.records()[1]
    second.write(record(5))
    second.write(record(5, recovered_after_ns=8))
    by_id = dict(latest(read(str(path))))
    assert [by_id[id].get("superseded_by") for id in (1, 2, 3, 4, 5)] == [None, 5, 5, None, None]
    assert by_id[2]["recovered_after_ns"] is None and by_id[2]["actions"]
    assert [fields for _, fields in latest(read(str(path)))] == second.records()
    assert len(lines(path)) == 8, "each once"


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_a_line_that_was_cut_short(path: Path, log: Log, cut: int) -> None:
    Journal(str(path), log).write(record(1, recovered_after_ns=1))
    Journal(str(path), log).write(record(2, recovered_after_ns=2))
    os.truncate(path, path.stat().st_size - cut)
    kept = Journal(str(path), log)
    kept.write(record(7, recovered_after_ns=7))
    expected = [1, 2, 7] if cut == 1 else [1, 7]
    assert [fields["id"] for fields in Journal(str(path), log).records()] == expected


@pytest.mark.parametrize("rubbish", [b"\n", b"[]\n", b'{"id": "1"}\n', b"\xff\xfe\n", b"null\n", b"{\n", b"\0" * 100])
def test_rubbish_is_passed_over(path: Path, log: Log, rubbish: bytes) -> None:
    Journal(str(path), log).write(record(1, recovered_after_ns=1))
    with path.open("ab") as file:
        file.write(rubbish)
    kept = Journal(str(path), log)
    kept.write(record(kept.next_id, recovered_after_ns=1))
    assert [fields["id"] for fields in Journal(str(path), log).records()] == [1, 2]


def test_memory_holds_the_last_ones(path: Path, log: Log) -> None:
    kept = Journal(str(path), log)
    for id in range(1, KEPT + 51):
        kept.write(record(id, recovered_after_ns=1))
    assert [fields["id"] for fields in kept.records()] == list(range(51, KEPT + 51))
    again = Journal(str(path), log)
    assert again.records() == kept.records() and again.next_id == KEPT + 51
    assert len(latest(read(str(path)))) == KEPT + 50


def test_a_disk_that_refuses(path: Path, log: Log) -> None:
    path.parent.mkdir()
    path.mkdir()
    kept = Journal(str(path), log)
    for id in range(1, 6):
        kept.write(record(id, recovered_after_ns=1))
    assert [fields["id"] for fields in kept.records()] == [1, 2, 3, 4, 5]
    assert len(log.lines) == 1 and os.strerror(errno.EISDIR) in log.lines[0][1]
    path.rmdir()
    kept.write(record(6, recovered_after_ns=1))
    assert [fields["id"] for fields in lines(path)] == [6]
    path.unlink()
    path.mkdir()
    kept.write(record(7, recovered_after_ns=1))
    assert len(log.lines) == 2, "once for each time that it begins to refuse"


# ---- The last marker -------------------------------------------------------------------------------------


def test_the_last_marker(tmp_path: Path, log: Log) -> None:
    directory = tmp_path / "a" / "b"
    seen = LastSeen(str(directory), "/dev/vmclock0", log)
    assert seen.load() == (None, None)
    seen.save((1 << 64) - 1, None)
    assert LastSeen(str(directory), "/dev/vmclock0", log).load() == ((1 << 64) - 1, None)
    seen.save(5, 6)
    assert LastSeen(str(directory), "/dev/vmclock0", log).load() == (5, 6)
    assert [file.name for file in directory.iterdir()] == [LAST_SEEN] and not log.lines


def test_of_another_device_or_boot(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    LastSeen(str(tmp_path), "/dev/vmclock0", log).save(5, 6)
    assert LastSeen(str(tmp_path), "/dev/vmclock1", log).load() == (None, None)
    boot = tmp_path / "boot_id"
    boot.write_text("another\n")
    monkeypatch.setattr(journal, "BOOT_ID_FILE", str(boot))
    assert LastSeen(str(tmp_path), "/dev/vmclock0", log).load() == (None, None)


def test_the_same_device_by_another_name(tmp_path: Path, log: Log) -> None:
    (tmp_path / "page").touch()
    (tmp_path / "link").symlink_to("page")
    LastSeen(str(tmp_path), str(tmp_path / "link"), log).save(5, 6)
    assert LastSeen(str(tmp_path), str(tmp_path / "page"), log).load() == (5, 6)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b"\xff", b'{"device": "/dev/vmclock0"}', b"{" * 5000])
def test_a_file_that_makes_no_sense(tmp_path: Path, log: Log, content: bytes) -> None:
    (tmp_path / LAST_SEEN).write_bytes(content)
    seen = LastSeen(str(tmp_path), "/dev/vmclock0", log)
    assert seen.load() == (None, None)
    seen.save(1, 2)
    assert LastSeen(str(tmp_path), "/dev/vmclock0", log).load() == (1, 2)


def test_a_state_directory_that_refuses(tmp_path: Path, log: Log) -> None:
    directory = tmp_path / "file"
    directory.touch()
    seen = LastSeen(str(directory), "/dev/vmclock0", log)
    seen.save(1, 2)
    seen.save(1, 2)
    assert len(log.lines) == 1 and "will go unnoticed" in log.lines[0][1]
    directory.unlink()
    seen.save(1, 2)
    assert LastSeen(str(directory), "/dev/vmclock0", log).load() == (1, 2), "it is tried again"


def test_what_is_kept_is_not_written_again(tmp_path: Path, log: Log) -> None:
    seen = LastSeen(str(tmp_path), "/dev/vmclock0", log)
    seen.save(1, 2)
    os.utime(tmp_path / LAST_SEEN, ns=(0, 0))
    seen.save(1, 2)
    again = LastSeen(str(tmp_path), "/dev/vmclock0", log)
    again.load()
    again.save(1, 2)
    assert (tmp_path / LAST_SEEN).stat().st_mtime_ns == 0


def test_it_is_written_in_place(tmp_path: Path, log: Log) -> None:
    """A rename over it waits for the disk; so it is one sector, whole or not at all."""
    seen = LastSeen(str(tmp_path), "/dev/vmclock0", log)
    for marker, generation in [((1 << 64) - 1, (1 << 64) - 1), (1, None), (12345, 6)]:
        seen.save(marker, generation)
        assert (tmp_path / LAST_SEEN).stat().st_size == SECTOR
        assert LastSeen(str(tmp_path), "/dev/vmclock0", log).load() == (marker, generation)
    long = "/dev/" + "x" * 600
    LastSeen(str(tmp_path), long, log).save(1, 2)
    LastSeen(str(tmp_path), "/dev/vmclock0", log).save(3, 4)
    assert LastSeen(str(tmp_path), "/dev/vmclock0", log).load() == (3, 4)
