"""Fixtures: a guest that ends with its test, and that leaves its logs behind where the test failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests import debs
from tests.guest import build, figures
from tests.guest.guest import Guest

NO_GUEST = "NO GUEST"


@pytest.fixture(scope="session", autouse=True)
def guest_image() -> build.Image:
    """What every test here needs: without it they are skipped."""
    try:
        return build.image()
    except debs.Unobtainable as error:
        pytest.skip(f"{NO_GUEST}: {error}")


@pytest.fixture
def boot(guest_image: build.Image, request: pytest.FixtureRequest) -> Iterator[Callable[..., Guest]]:
    """Boots a guest (the arguments are those of Guest). All are ended after the test."""
    guests = []

    def start(**options: object) -> Guest:
        guests.append(Guest(**options))
        return guests[-1]

    yield start
    failed = getattr(request.node, "failed", False)
    for guest in guests:
        if failed:
            title = f"console of {guest.directory}"
            request.node.add_report_section("teardown", title, guest.console()[-2000:])
        guest.keep = guest.keep or failed
        guest.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was measured, beside what is promised."""
    if figures.kept:
        terminalreporter.section("figures of the guest")
        lines = [*figures.table(figures.kept), *figures.others(figures.kept), f"all of them: {figures.results()}"]
        terminalreporter.write_line("\n".join(lines))
    missed = [report for report in terminalreporter.stats.get("skipped", ()) if NO_GUEST in str(report.longrepr)]
    if missed:
        terminalreporter.section(f"{len(missed)} TESTS HAVE NOT SEEN A GUEST", red=True)
        terminalreporter.write_line(str(missed[0].longrepr[2]))
