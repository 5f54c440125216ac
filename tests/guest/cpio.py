"""A writer of initramfs archives: cpio in the "newc" format, uncompressed, all owned by root."""

from __future__ import annotations

import fnmatch
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path

BLOCK = 512


class Archive:
    """An archive in memory: the same bytes from the same files.

    Paths are given as they are in the guest; the directories above an entry are made as needed.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._names: set[str] = set()
        self._finished = False

    def directory(self, path: str, mode: int = 0o755) -> None:
        name = path.strip("/")
        if name and name not in self._names:
            self._entry(name, stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, mode: int = 0o644, mtime: int = 0) -> None:
        """A file that is there already is replaced: the kernel unpacks in order."""
        self._entry(path, stat.S_IFREG | mode, content, mtime)

    def symlink(self, path: str, target: str) -> None:
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        self._entry(path, stat.S_IFCHR | mode, numbers=(major, minor))

    def copy(self, source: Path, path: str) -> None:
        """One file of this machine, links followed. The time stamp stays: Python's compiled files ask for it."""
        status = source.stat()
        self.file(path, source.read_bytes(), status.st_mode & 0o777, int(status.st_mtime))

    def tree(self, source: Path, path: str, without: Iterable[str] = ()) -> None:
        """A directory of this machine with all below it, save names that fit a pattern of `without`."""
        unwanted = re.compile("|".join(map(fnmatch.translate, without)) or "(?!)")
        for directory, subdirectories, files in os.walk(source):
            subdirectories[:] = sorted(name for name in subdirectories if not unwanted.match(name))
            here = Path(directory)
            place = f"{path}/{here.relative_to(source)}" if here != source else path
            self.directory(place)
            for name in sorted(files):
                if not unwanted.match(name):
                    self.copy(here / name, f"{place}/{name}")

    def finish(self) -> bytes:
        """The archive's bytes, padded so that another one may follow."""
        if not self._finished:
            self._entry("TRAILER!!!", 0)
            self._finished = True
        content = b"".join(self._parts)
        return content + bytes(-len(content) % BLOCK)

    def _entry(
        self, path: str, mode: int, content: bytes = b"", mtime: int = 0, numbers: tuple[int, int] = (0, 0)
    ) -> None:
        name = path.strip("/")
        above = name.rpartition("/")[0]
        if above:
            self.directory(above)
        self._names.add(name)
        encoded = name.encode() + b"\0"
        inode = len(self._parts) + 1
        fields = (inode, mode, 0, 0, 1, mtime, len(content), 0, 0, *numbers, len(encoded), 0)
        header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._parts.append(header + bytes(-len(header) % 4) + content + bytes(-len(content) % 4))
