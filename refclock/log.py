"""One line on standard error for each thing worth saying.

Under systemd the journal adds the time and wants a priority in front of each line (sd-daemon(3)); on a
terminal the time comes first.
"""

from __future__ import annotations

import os
import sys
import time

LEVELS = {"error": 3, "warning": 4, "notice": 5, "info": 6, "debug": 7}


class Log:
    """Writes lines whose level is at least ``level``.  Never raises: a full disk must not stop a clock."""

    def __init__(self, level: str = "info") -> None:
        self.level = level
        self._journal = _goes_to_journal()

    def __call__(self, level: str, text: str) -> None:
        if LEVELS[level] > LEVELS[self.level]:
            return
        if self._journal:
            line = f"<{LEVELS[level]}>{text}\n"
        else:
            now = time.time()
            stamp = time.strftime("%H:%M:%S", time.localtime(now))
            line = f"{stamp}.{int(now % 1 * 1000):03d} {level}: {text}\n"
        try:
            sys.stderr.write(line)
            sys.stderr.flush()
        except (OSError, ValueError):
            pass


def _goes_to_journal() -> bool:
    """Whether standard error is the stream that systemd names in JOURNAL_STREAM (systemd.exec(5))."""
    try:
        opened = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{opened.st_dev}:{opened.st_ino}"
