"""Every error that this package raises on purpose, each with the exit status that it means for a command.

The numbers are those of sysexits.h.  A message is one line: what is wrong, then what to do about it.
"""

from __future__ import annotations

EX_OK = 0
EX_NO = 1
EX_USAGE = 64
EX_UNAVAILABLE = 69
EX_OSERR = 71
EX_NOPERM = 77
EX_CONFIG = 78


class RefclockError(Exception):
    """The family.  ``errno`` is the operating system's number where there was one, else None."""

    exit_status = EX_OSERR

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class UsageError(RefclockError):
    """A command line that makes no sense."""

    exit_status = EX_USAGE


class ConfigError(RefclockError):
    """A configuration file, or a value in it, that cannot be used.  Says file, line and what is allowed."""

    exit_status = EX_CONFIG


class NotPermitted(RefclockError):
    """The kernel or another program refused: EACCES, EPERM.  Says which right is missing."""

    exit_status = EX_NOPERM


class Unavailable(RefclockError):
    """The device, the daemon or chronyd is not there (yet): wait for it, or start it."""

    exit_status = EX_UNAVAILABLE


class PageInvalid(Unavailable):
    """What the device or file holds is no vmclock page that this version understands."""


class PageStalled(RefclockError):
    """The sequence stayed odd, or never stood still, for the whole bounded wait: the writer died while writing."""


class SampleWithheld(RefclockError):
    """The page is sound but gives no time just now; ``reason`` says why in a few words.

    ``reason`` starts with one of the words of :data:`refclock.model.WITHHELD`, by which it is counted.
    """

    exit_status = EX_NO

    def __init__(self, cause: str, reason: str) -> None:
        super().__init__(reason)
        self.cause = cause
        self.reason = reason


class ClockDisrupted(RefclockError):
    """The marker moved while the clock was being relied upon, or the clock was not good to begin with."""

    exit_status = EX_NO


def from_os(error: OSError, what: str, cure: str = "") -> RefclockError:
    """The member of the family for an :class:`OSError` met while doing ``what``, its errno kept."""
    from errno import EACCES, ECONNREFUSED, ENODEV, ENOENT, ENOTDIR, ENXIO, EPERM

    kind: type[RefclockError] = RefclockError
    if error.errno in (EACCES, EPERM):
        kind = NotPermitted
    elif error.errno in (ECONNREFUSED, ENOENT, ENOTDIR, ENODEV, ENXIO):
        kind = Unavailable
    message = f"{what}: {error.strerror or error}"
    return kind(f"{message}; {cure}" if cure else message, error.errno)
