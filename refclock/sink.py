"""What every sink is: somewhere that samples go, with a memory of how that went.

A sink is three verbs (put, invalidate, close) over what it inherits from here.  It judges nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .page import Sample


class Sink:
    """Counts, and says once for each change whether the other side takes what it gets.

    ``error`` is None, or in one line why samples do not arrive and what to do about it.
    """

    type = ""

    def __init__(self, name: str, log: Callable[[str, str], None]) -> None:
        self.name = name
        self.sent = 0
        self.dropped = 0
        self.error: str | None = None
        self._log = log
        self._said: str | None = ""

    def put(self, sample: Sample) -> bool:
        """Hands over one sample; whether it is the first that arrives, or arrives again.

        Never blocks, never raises for what the other side does.
        """
        is_news = self._note(self._put(sample))
        if self.error is None:
            self.sent += 1
        else:
            self.dropped += 1
        return is_news and self.error is None

    def invalidate(self) -> None:
        """Takes back what can be taken back: the other side must not use samples put before this."""

    def close(self) -> None:
        """Leaves nothing behind that looks like time."""

    def _put(self, sample: Sample) -> str | None:
        """Hands over one sample; None, or why it could not be."""
        raise NotImplementedError

    def _note(self, error: str | None) -> bool:
        """Whether that is something new."""
        self.error = error
        if error == self._said:
            return False
        if error is not None:
            self._log("warning", f"{self.type} {self.name}: {error}")
        else:
            self._log("info", f"{self.type} {self.name}: samples arrive{' again' if self.sent else ''}")
        self._said = error
        return True

    def status(self) -> dict[str, object]:
        """The contract's view of a sink."""
        return {
            "name": self.name,
            "type": self.type,
            "ok": self.error is None and self.sent > 0,
            "sent": self.sent,
            "dropped": self.dropped,
            "error": self.error,
        }
