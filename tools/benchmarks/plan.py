"""Print what `ggjac plan` predicts beside what then happens: peak memory and time, for each model and prompt.

    python tools/benchmarks/plan.py model.gguf [more.gguf] [--tokens 8,64] [--rank 8] [--dtype float32] [--for svd]

Other options, such as --ram-budget 2GiB, go to both commands. Both run in processes of their own. Memory is the
anonymous memory of the process, sampled from outside. The prediction of time is for the sweeps it expects; `each`
compares one sweep with one sweep. Ratios are predicted / measured: to be within 0.8 to 1.25 for memory, and 0.65 to
1.5 for time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from ggjac.planner.work import JOBS


def anonymous(pid: int) -> int:
    """Return the bytes of anonymous memory of a process; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii") as status:
            return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon:")), 0)
    except (OSError, ValueError):
        return 0


def run(*args: str) -> tuple[dict[str, Any], int, float]:
    """Run a command of ggjac; return its JSON, its peak of anonymous memory and its seconds."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen([sys.executable, "-m", "ggjac", *args, "--format", "json"], stdout=out)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.005)
        if process.returncode not in (0, 3):
            raise SystemExit(f"ggjac {' '.join(args)} ended with code {process.returncode}")
        out.seek(0)
        return json.load(out), peak, time.perf_counter() - start


def compare(path: str, n: int, options: argparse.Namespace, rest: list[str]) -> str:
    """Return one line of the table."""
    ids = ",".join(str(i % 200 + 3) for i in range(n))
    common = ["-m", path, "--tokens", ids, "--dtype", options.dtype, "-q", *rest]
    rank = ["-k", str(options.rank)] if options.command in ("svd", "analyze", "layers") else []
    planned, _, _ = run("plan", *common, "--for", options.command, "-k", str(options.rank))
    with tempfile.TemporaryDirectory() as folder:
        more = ["--no-verify", "-o", f"{folder}/run"] if options.command == "analyze" else []
        done, peak, _ = run(options.command, *common, *rank, *more)
    times = {part["what"]: part for part in planned["times"]["parts"]}
    took = done["seconds"]
    cells = [f"{planned['ram_peak'] / 2**20:7.0f} / {peak / 2**20:<7.0f} {planned['ram_peak'] / peak:5.2f}"]

    def cell(predicted: float, measured: float) -> None:
        cells.append(f"{predicted:8.2f} / {measured:<8.2f} {predicted / max(measured, 1e-9):5.2f}")

    if "trace" in took:
        cell(times["trace"]["total"], took["trace"])
    if "svd" in took:
        # The stage begins with weights that are to be kept ready, and ends with decoding both sides.
        others = sum(times[what]["total"] for what in ("making layers ready", "decoding") if what in times)
        cell(times["svd"]["each"], (took["svd"] - others) / done["svd"]["sweeps"])
    cell(planned["times"]["total"], sum(took.values()))
    sweeps = f"{done['svd']['sweeps']} sweeps ({times['svd']['count']} expected)" if "svd" in took else ""
    return f"{os.path.basename(path):24} {n:5}  " + "   ".join(cells) + f"   {sweeps}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("--tokens", default="8", help="lengths of prompts, comma-separated")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--for", dest="command", default="svd", choices=[name for name in JOBS if name != "compare"])
    options, rest = parser.parse_known_args()
    print(f"predicted / measured, ratio; {options.command}, {options.dtype}, load {os.getloadavg()[0]:.1f}")
    print(f"{'model':24} {'n':>5}  {'peak MiB':23}   {'trace s':25}   {'one sweep s':25}   all s")
    for path in options.models:
        for n in options.tokens.split(","):
            print(compare(path, int(n), options, rest), flush=True)


if __name__ == "__main__":
    main()
