"""What outlives the daemon: the journal of disruptions, and the marker and generation last seen."""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .policy import Record

BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
LAST_SEEN = "last-seen.json"


def _make_directory(path: str) -> None:
    directory = os.path.dirname(path)
    if directory:
        os.makedirs(directory, mode=0o755, exist_ok=True)


class Journal:
    """The journal, appended to: JSON Lines, one for each time a record is seen or closed.

    A disk that refuses is said once and does not hold up anything; ``records`` keeps what happened since
    the start for those who ask.
    """

    def __init__(self, path: str, log: Callable[[str, str], None]) -> None:
        self.path = path
        self._log = log
        self._failed = False
        self.records: dict[int, dict[str, Any]] = {}
        try:
            self.records = dict(latest(read(path)))
        except FileNotFoundError:
            pass
        except OSError as error:
            self._fail(error)

    @property
    def next_id(self) -> int:
        """An id that no record has yet."""
        return max(self.records, default=0) + 1

    def write(self, record: Record) -> None:
        """Appends the record as it stands, in one write, and keeps it on the disk."""
        fields = record.fields()
        self.records[record.id] = fields
        try:
            _make_directory(self.path)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                os.write(descriptor, json.dumps(fields, separators=(",", ":")).encode() + b"\n")
            finally:
                os.close(descriptor)
            self._failed = False
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if not self._failed:
            self._log("warning", f"journal {self.path}: {error.strerror}; records are kept in memory only")
        self._failed = True


def read(path: str) -> Iterable[dict[str, Any]]:
    """Every line of a journal that is a record, oldest first; lines that are none (a crash) are passed over."""
    with open(path, "rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("id"), int):
                yield record


def latest(records: Iterable[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The records by id, oldest first: of several lines with one id, the last wins."""
    return sorted({record["id"]: record for record in records}.items())


class LastSeen:
    """The marker and generation last seen on a device in this boot, kept in the state directory."""

    def __init__(self, directory: str, device: str, log: Callable[[str, str], None]) -> None:
        self._path = os.path.join(directory, LAST_SEEN)
        self._log = log
        self._failed = False
        self._saved: tuple[int | None, int | None] | None = None
        self._where = {"device": os.path.realpath(device), "boot_id": _boot_id()}

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
        """Keeps them, where they differ from what is kept: a new file in the place of the old one."""
        if (marker, generation) == self._saved:
            return
        self._saved = (marker, generation)
        values = {**self._where, "disruption_marker": marker, "generation": generation}
        try:
            _make_directory(self._path)
            with open(f"{self._path}.new", "wb") as file:
                file.write(json.dumps(values).encode() + b"\n")
            os.replace(f"{self._path}.new", self._path)
            self._failed = False
        except OSError as error:
            if not self._failed:
                cure = "a disruption while this daemon is down will go unnoticed"
                self._log("warning", f"state {self._path}: {error.strerror}; {cure}")
            self._failed = True


def _boot_id() -> str:
    try:
        with open(BOOT_ID_FILE) as file:
            return file.read().strip()
    except OSError:
        return ""
