"""What outlives the daemon: the journal of disruptions, and the marker and generation last seen."""

from __future__ import annotations

import json
import os

from .clerk import at_once
from .model import RECORD_KEYS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .clerk import Do
    from .policy import Record

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
LAST_SEEN = "last-seen.json"

#: How many records are kept in memory.
KEPT = 1000
#: The least that a disk writes, whole or not at all.
SECTOR = 512


def _make_directory(path: str) -> None:
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, mode=0o755, exist_ok=True)


class Journal:
    """The journal, appended to: JSON Lines, one for each time a record is seen or closed.

    A disk that refuses is said once.  It does not hold up anything, where ``do`` is a clerk's.  The last KEPT records
    are kept in memory for those who ask: a closed one as its line, which is small; an open one alive.
    """

    def __init__(self, path: str, log: Callable[[str, str], None], do: Do = at_once) -> None:
        self.path = path
        self._log = log
        self._do = do
        self._failed = False
        self._kept: dict[int, str | Record] = {}
        self._left_open: list[dict[str, Any]] = []
        try:
            _make_directory(path)
            for _, fields in latest(read(path)):
                self._keep(fields["id"], _line(fields))
                if fields.get("recovered_after_ns") is None and fields.get("superseded_by") is None:
                    self._left_open.append(fields)
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fail(error)

    @property
    def next_id(self) -> int:
        """An id that no record has yet."""
        return max(self._kept, default=0) + 1

    def records(self) -> list[dict[str, Any]]:
        """The last records, oldest first, as they stand now."""
        return [json.loads(kept) if isinstance(kept, str) else kept.fields() for _, kept in sorted(self._kept.items())]

    def write(self, record: Record) -> None:
        """Appends the record as it stands, in one write.

        The first of a kind that calls for a reaction also closes what an earlier run had to leave open.
        """
        line = _line(record.fields())
        lines = [line]
        if record.kind != "generation":
            for fields in self._left_open:
                lines.append(_line({**fields, "superseded_by": record.id}))
                self._keep(fields["id"], lines[-1])
            self._left_open.clear()
        self._keep(record.id, record if record.is_open else line)
        self._do(self._append, "".join(f"{line}\n" for line in lines).encode())

    def _keep(self, id: int, kept: str | Record) -> None:
        self._kept[id] = kept
        if len(self._kept) > KEPT:
            del self._kept[min(self._kept)]

    def _append(self, text: bytes) -> None:
        try:
            self._write(text)
            self._failed = False
        except OSError as error:
            self._fail(error)

    def _write(self, text: bytes) -> None:
        _make_directory(self.path)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            # A line that was cut short (a crash, a full disk) must not take this one with it.
            size = os.fstat(descriptor).st_size
            if size and os.pread(descriptor, 1, size - 1) != b"\n":
                text = b"\n" + text
            os.write(descriptor, text)
        finally:
            os.close(descriptor)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._log("warning", f"journal {self.path}: {error.strerror}; records are kept in memory only")
        self._failed = True


def _line(fields: dict[str, Any]) -> str:
    return json.dumps(fields, separators=(",", ":"))


def read(path: str) -> Iterable[dict[str, Any]]:
    """Every line of a journal that is a record, oldest first; lines that are none (a crash) are passed over."""
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and record.keys() >= set(RECORD_KEYS) and isinstance(record["id"], int):
                yield record


def latest(records: Iterable[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The records by id, oldest first: of several lines with one id, the last wins."""
    return sorted({record["id"]: record for record in records}.items())


class LastSeen:
    """The marker and generation last seen on a device in this boot, kept in the state directory."""

    def __init__(self, directory: str, device: str, log: Callable[[str, str], None], do: Do = at_once) -> None:
        self._path = os.path.join(directory, LAST_SEEN)
        self._log = log
        self._do = do
        self._failed = False
        self._saved: tuple[int | None, int | None] | None = None
        self._where = {"device": os.path.realpath(device), "boot_id": _boot_id()}
        try:
            _make_directory(self._path)  # before there are threads: chronyd's client changes the umask, which is of all
        except OSError:
            pass  # it is said when there is something to keep

    def load(self) -> tuple[int | None, int | None]:
        """Marker and generation, each None where nothing is known of this device in this boot."""
        try:
            with open(self._path, "rb") as file:
                saved = json.loads(file.read())
            if any(saved[key] != value for key, value in self._where.items()):
                return None, None
            marker, generation = saved["disruption_marker"], saved["generation"]
        except (OSError, ValueError, KeyError, TypeError):
            return None, None
        self._saved = (marker, generation)
        return marker, generation

    def save(self, marker: int | None, generation: int | None) -> None:
        """Keeps them, where they differ from what is kept; what could not be kept is tried again by the next call."""
        if (marker, generation) == self._saved:
            return
        self._saved = (marker, generation)
        values = {**self._where, "disruption_marker": marker, "generation": generation}
        content = json.dumps(values).encode() + b"\n"
        self._do(self._keep, content + b" " * (-len(content) % SECTOR))

    def _keep(self, content: bytes) -> None:
        try:
            self._write(content)
            self._failed = False
        except OSError as error:
            self._saved = None
            if not self._failed:
                cure = "a disruption while this daemon is down will go unnoticed"
                self._log("warning", f"state {self._path}: {error.strerror}; {cure}")
            self._failed = True

    def _write(self, content: bytes) -> None:
        """In place and in one write: a crash leaves the old or the new, and no other file is left behind."""
        _make_directory(self._path)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.pwrite(descriptor, content, 0)
            if os.fstat(descriptor).st_size > len(content):
                os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)


def _boot_id() -> str:
    try:
        with open(BOOT_ID_FILE) as file:
            return file.read().strip()
    except OSError:
        return ""
