"""The file of all samples, as CSV: the contract's fields of `sample`, a header first."""

from __future__ import annotations

from .page import Sample

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

HEADER = ",".join(Sample.FIELDS)


def row(sample: Sample) -> str:
    """One sample as a line of CSV; what the page does not give is empty."""
    values = (getattr(sample, name) for name in Sample.FIELDS)
    return ",".join("" if value is None else str(value) for value in values)


class SampleLog:
    """Appends samples to ``path`` (None: nowhere).  A disk that refuses is said once, and tried again on reopen."""

    def __init__(self, path: str | None, log: Callable[[str, str], None]) -> None:
        self._log = log
        self._file: IO[str] | None = None
        self.reopen(path)

    def reopen(self, path: str | None) -> None:
        """Opens the file of that name anew, as after a rotation."""
        self.close()
        if path is None:
            return
        self._path = path
        try:
            self._file = open(path, "a", buffering=1, encoding="ascii")  # noqa: SIM115 - closed by close()
            if self._file.tell() == 0:
                self._file.write(HEADER + "\n")
        except OSError as error:
            self._give_up(error)

    def write(self, sample: Sample) -> None:
        """Appends one sample."""
        if self._file is None:
            return
        try:
            self._file.write(row(sample) + "\n")
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._log("warning", f"samples are not logged to {self._path}: {error.strerror}; SIGHUP tries again")
        self.close()

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError:
                pass
            self._file = None
