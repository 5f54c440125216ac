"""Reads the vmclock page of a virtual machine, and keeps its clock right across migrations and restores."""

from ._version import __version__
from .errors import ClockDisrupted, NotPermitted, PageInvalid, PageStalled, RefclockError, SampleWithheld, Unavailable
from .model import Snapshot
from .page import Page, Sample

__all__ = [
    "ClockDisrupted",
    "NotPermitted",
    "Page",
    "PageInvalid",
    "PageStalled",
    "RefclockError",
    "Sample",
    "SampleWithheld",
    "Snapshot",
    "Unavailable",
    "__version__",
]
