"""How well and how fast a sample is taken, beside the same in C.  An idle machine, please.

python -m tests.bench_sample
"""

from __future__ import annotations

import csv
import io
import statistics
import subprocess
import sys
import tempfile
import timeit
from pathlib import Path

import refclock

ROOT = Path(__file__).resolve().parent.parent
RUNS = 20


def detrended_sigma(times: list[float], offsets: list[float]) -> float:
    """The standard deviation of the offsets, their linear trend taken out."""
    slope, intercept = statistics.linear_regression(times, offsets)
    return statistics.pstdev(offset - slope * time - intercept for time, offset in zip(times, offsets, strict=True))


def quartiles(values: list[float]) -> str:
    low, median, high = statistics.quantiles(values, n=4)
    return f"median {median:.2f}  quartiles {low:.2f} to {high:.2f}  worst {max(values):.2f}"


def from_the_command(page: Path) -> tuple[list[float], list[float]]:
    """Sigma and median uncertainty of each run of `sample`."""
    sigmas, uncertainties = [], []
    for _ in range(RUNS):
        command = [sys.executable, "-m", "refclock", "sample", "--device", str(page)]
        command += ["--count", "1000", "--interval", "0", "--format", "csv"]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        rows = list(csv.DictReader(io.StringIO(output)))
        times = [float(int(row["system_ns"]) - int(rows[0]["system_ns"])) for row in rows]
        offsets = [float(int(row["offset_ns"]) - int(rows[0]["offset_ns"])) for row in rows]
        sigmas.append(detrended_sigma(times, offsets))
        uncertainties.append(statistics.median(float(row["uncertainty_ns"]) for row in rows))
    return sigmas, uncertainties


def from_c(page: Path, directory: Path) -> tuple[list[float], list[float]]:
    """Sigma and nanoseconds a sample of each run of the C program."""
    program = directory / "bench_pair"
    source = ROOT / "tests" / "native" / "bench_pair.c"
    subprocess.run(["cc", "-O2", "-std=gnu11", f"-I{ROOT / 'shm'}", source, "-o", program], check=True)
    sigmas, costs = [], []
    for _ in range(RUNS):
        run = subprocess.run([program, page], check=True, capture_output=True, text=True, timeout=60)
        offsets = [float(line) for line in run.stdout.split()]
        sigmas.append(detrended_sigma([float(i) for i in range(len(offsets))], [o - offsets[0] for o in offsets]))
        costs.append(float(run.stderr))
    return sigmas, costs


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        path = directory / "page"
        command = [sys.executable, "-m", "refclock", "simulate", str(path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as simulator:
            assert simulator.stdout is not None
            simulator.stdout.readline()
            sigmas, uncertainties = from_the_command(path)
            c_sigmas, c_costs = from_c(path, directory)
            with refclock.Page(str(path)) as page:
                number = 20_000
                costs = [timeit.timeit(lambda: page.sample(8), number=number) / number * 1e9 for _ in range(RUNS)]
            simulator.terminate()
    print(f"sigma of the offset, ns, `sample --count 1000 --interval 0`, {RUNS} runs: {quartiles(sigmas)}")
    print(f"the same in C, best of 8 brackets:                           {quartiles(c_sigmas)}")
    print(f"uncertainty_ns, medians of the runs:                         {quartiles(uncertainties)}")
    print(f"page.sample(8) from Python, ns:                              {quartiles(costs)}")
    print(f"the same in C, ns:                                           {quartiles(c_costs)}")


if __name__ == "__main__":
    main()
