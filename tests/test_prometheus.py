"""The metrics where they are to go: promtool, node_exporter and Prometheus, Debian's own, and examples/prometheus.

They are unpacked beside the system, listen on loopback only, and end with the test.
"""

from __future__ import annotations

import http.server
import json
import re
import shutil
import socket
import subprocess
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refclock.metrics import render
from tests import debs
from tests.harness import ROOT, TIMEOUT_S, Program, RunningDaemon, Simulator, SockListener, run, wait_until
from tests.test_metrics import make_sink, make_status

EXAMPLES = ROOT / "examples" / "prometheus"
STARTING_S = 30.0

#: Program -> the Debian packages that may hold it: promtool has one of its own from Debian 13 on.
TOOLS = {
    "promtool": ["prometheus", "promtool"],
    "prometheus": ["prometheus"],
    "prometheus-node-exporter": ["prometheus-node-exporter"],
}


def tool(name: str) -> list[str]:
    """The command line of one of them; skips the test where it cannot be had."""
    reasons = []
    for package in TOOLS[name]:
        try:
            return debs.program(debs.unpack([package]), f"usr/bin/{name}")
        except debs.Unobtainable as error:
            reasons.append(str(error))
    installed = shutil.which(name)
    if installed is None:
        pytest.skip(f"NOT TESTED: {name} cannot be had: {'; '.join(reasons)}")
    return [installed]


def promtool(*arguments: str | Path, given: str | None = None) -> str:
    """Runs promtool, which must have nothing to complain of; what it says."""
    done = subprocess.run(
        [*tool("promtool"), *map(str, arguments)],
        input=given,
        stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- promtool ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status",
    [
        make_status(),
        make_status(kind=None, clock_status=None, offset_ns=None, last_disruption=None, chronyd=None, sinks=[]),
        make_status(device='/dev/"vm\\clock\n', sinks=[make_sink("shm", "2"), make_sink("shm", "2", sent=1)]),
    ],
    ids=["good", "nothing yet", "odd"],
)
def test_promtool_has_nothing_to_complain_of(status: dict[str, Any]) -> None:
    assert promtool("check", "metrics", given=render(status)) == ""


def test_promtool_reads_the_daemon(
    simulate: Callable[..., Simulator], daemon: Callable[..., RunningDaemon], listener: SockListener, short_path: Path
) -> None:
    simulate()
    path = short_path / "vmclock.prom"
    running = daemon(sock=listener.path, metrics=path)
    running.wait_state("synchronised")
    assert promtool("check", "metrics", given=run("metrics", "--status", running.status_path).stdout) == ""
    wait_until(path.exists)
    assert promtool("check", "metrics", given=path.read_text()) == ""


def test_the_rules() -> None:
    assert "SUCCESS" in promtool("check", "rules", EXAMPLES / "vmclock.rules.yml")
    assert "SUCCESS" in promtool("test", "rules", EXAMPLES / "vmclock.rules.test.yml")
    assert "SUCCESS" in promtool("check", "config", EXAMPLES / "prometheus.yml")


def test_every_alert_is_tested_both_ways() -> None:
    tests = (EXAMPLES / "vmclock.rules.test.yml").read_text()
    alerts = re.findall(r"alert: (\w+)", (EXAMPLES / "vmclock.rules.yml").read_text())
    assert len(alerts) == len(set(alerts)) > 10
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n\s+exp_alerts:\n", tests), f"{alert} is never expected"
        assert re.search(rf"alertname: {alert}, exp_alerts: \[\]", tests), f"{alert} is never expected to be silent"


# ---- The dashboard -----------------------------------------------------------------------------------------


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "vmclock.dashboard.json").read_text())
    return found


def expressions() -> list[str]:
    """What the dashboard asks Prometheus for, with Grafana's variables filled in."""
    board = dashboard()
    found = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    found += [annotation["expr"] for annotation in board["annotations"]["list"]]
    return [text.replace("$__rate_interval", "1m").replace("$instance", ".*") for text in found]


def test_the_dashboard_is_in_order() -> None:
    board = dashboard()
    assert {variable["name"] for variable in board["templating"]["list"]} == {"datasource", "instance"}
    taken: dict[tuple[int, int], int] = {}
    for panel in board["panels"]:
        assert panel["title"] and panel["description"] and panel["targets"], panel["id"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert taken.setdefault((x, y), panel["id"]) == panel["id"], f"{panel['title']} lies over another"
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_rules_and_dashboard_name_metrics_that_exist() -> None:
    names = set(re.findall(r"^# TYPE (\w+)", render(make_status()), re.MULTILINE))
    for text in (*expressions(), (EXAMPLES / "vmclock.rules.yml").read_text()):
        used = set(re.findall(r"\bvmclock_\w+", text))
        assert used <= names, used - names


# ---- The whole way -----------------------------------------------------------------------------------------


class HttpServer(Program):
    """A program that serves HTTP on a free port of loopback; `options` gives its command line for that port."""

    def __init__(self, name: str, options: Callable[[str], list[str]], directory: Path, ready: str) -> None:
        for attempt in range(3):  # somebody else may take the port in between
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self.address = f"127.0.0.1:{probe.getsockname()[1]}"
            super().__init__(
                f"{name}-{attempt}", [*tool(name), *options(self.address)], directory, stdout=subprocess.DEVNULL
            )
            wait_until(lambda: not self.running or self._answers(ready), STARTING_S, f"answer of {name}")
            if self.running:
                return
        raise AssertionError(f"{name} does not run; its log:\n{self.log()}")

    def _answers(self, path: str) -> bool:
        try:
            self.get(path)
        except OSError:
            return False
        return True

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=TIMEOUT_S) as answer:
            text: str = answer.read().decode()
            return text


class Prometheus(HttpServer):
    """Prometheus with the example's rules, scraping these addresses every second."""

    def __init__(self, targets: dict[str, str], directory: Path) -> None:
        configuration = directory / "prometheus.yml"
        jobs = [
            {"job_name": job, "static_configs": [{"targets": [address]}], "scrape_interval": "1s"}
            for job, address in targets.items()
        ]
        # JSON is YAML.
        configuration.write_text(
            json.dumps(
                {
                    "global": {"evaluation_interval": "1s"},
                    "rule_files": [str(EXAMPLES / "vmclock.rules.yml")],
                    "scrape_configs": jobs,
                }
            )
        )

        def options(address: str) -> list[str]:
            storage = f"--storage.tsdb.path={directory / 'tsdb'}"
            return [f"--config.file={configuration}", storage, f"--web.listen-address={address}"]

        super().__init__("prometheus", options, directory, "/-/ready")

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression gives just now."""
        answer = json.loads(self.get("/api/v1/query?" + urllib.parse.urlencode({"query": expression})))
        assert answer["status"] == "success", answer
        result: list[dict[str, Any]] = answer["data"]["result"]
        return result

    def value(self, expression: str) -> float | None:
        """The value of an expression that gives one series, or None."""
        found = self.query(expression)
        assert len(found) <= 1, found
        return float(found[0]["value"][1]) if found else None

    def types(self) -> dict[str, set[str]]:
        """What type each metric is said to be of."""
        answer = json.loads(self.get("/api/v1/metadata"))
        return {name: {entry["type"] for entry in entries} for name, entries in answer["data"].items()}


@pytest.fixture
def openmetrics(short_path: Path) -> Iterator[str]:
    """The address of a server that gives out what `metrics` prints, as OpenMetrics."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = run("metrics", "--status", short_path / "status.sock").stdout.encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/openmetrics-text; version=1.0.0; charset=utf-8")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join(TIMEOUT_S)


@pytest.fixture
def ending() -> Iterator[list[Program]]:
    """Programs that end with the test."""
    programs: list[Program] = []
    yield programs
    for program in reversed(programs):
        program.close()


def test_from_the_page_to_an_alert(
    simulate: Callable[..., Simulator],
    daemon: Callable[..., RunningDaemon],
    listener: SockListener,
    openmetrics: str,
    ending: list[Program],
    short_path: Path,
) -> None:
    collected = short_path / "collected"
    collected.mkdir()
    simulator = simulate("--offset", "0.0002", "--maxerror", "20000")
    running = daemon(metrics=collected / "vmclock.prom", sock=listener.path)
    running.wait_state("synchronised")
    wait_until((collected / "vmclock.prom").exists)

    exporter = HttpServer(
        "prometheus-node-exporter",
        lambda address: [
            "--collector.disable-defaults",
            "--collector.textfile",
            f"--collector.textfile.directory={collected}",
            f"--web.listen-address={address}",
        ],
        short_path,
        "/metrics",
    )
    ending.append(exporter)
    served = exporter.get("/metrics")
    assert "node_textfile_scrape_error 0" in served
    assert "# TYPE vmclock_disruptions_total counter" in served
    assert f'node_textfile_mtime_seconds{{file="{collected}/vmclock.prom"}}' in served

    prometheus = Prometheus({"node": exporter.address, "direct": openmetrics}, short_path)
    ending.append(prometheus)
    for job in ("node", "direct"):
        wait_until(lambda job=job: prometheus.value(f'vmclock_good{{job="{job}"}}'), what=f"metrics by {job}")  # type: ignore[misc]
        found = prometheus.value(f'vmclock_offset_seconds{{job="{job}"}}')
        assert found == pytest.approx(2e-4, abs=2e-5)
        assert prometheus.value(f'up{{job="{job}"}}') == 1
    assert prometheus.types()["vmclock_disruptions_total"] == {"counter"}
    assert prometheus.types()["vmclock_offset_seconds"] == {"gauge"}

    simulator.do("disrupt offset=-0.0003")
    seen = 'vmclock_disruptions_total{job="node",kind="disruption"}'
    wait_until(lambda: prometheus.value(seen) == 1, what="the disruption in Prometheus")
    wait_until(lambda: prometheus.value('vmclock_recovery_seconds{job="node"}'), what="the recovery in Prometheus")
    offset = 'vmclock_offset_seconds{job="node"}'
    wait_until(lambda: (prometheus.value(offset) or 0) < 0, what="the new offset in Prometheus")
    assert prometheus.value(offset) == pytest.approx(-3e-4, abs=2e-5)
    assert not prometheus.query('ALERTS{alertname="VmclockClockNotGood"}')

    empty = [text for text in expressions() if not prometheus.query(text)]
    # There is no chronyd here.
    assert all("chronyd" in text for text in empty), empty

    simulator.do("status unreliable")
    alert = 'ALERTS{alertname="VmclockClockNotGood",state="unsynchronised",job="node"}'
    wait_until(lambda: prometheus.query(alert), what="the alert")

    assert running.stop() == 0
    wait_until(lambda: "vmclock_" not in exporter.get("/metrics"), what="end of the metrics with the daemon")
