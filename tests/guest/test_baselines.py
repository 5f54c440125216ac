"""What a user has without this project, measured in the same run: what there is to beat."""

from __future__ import annotations

import pytest

from tests.guest import baselines
from tests.guest.figures import RESTORED_S, keep

pytestmark = [pytest.mark.guest, pytest.mark.timeout(300)]


@pytest.mark.parametrize("name", ["phc-poll-2-lose-0.1:20", "phc-poll-2-restore-20"])
def test_baseline(name: str) -> None:
    row = keep({"name": f"without the daemon: {name}", **baselines.measure(baselines.ROWS[name])})
    assert row["over_1ms_while_normal_s"] > RESTORED_S, "chronyd alone needs no help"
