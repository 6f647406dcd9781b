"""CPU and wall seconds of `ranks` over some prompts, with one worker process and with several; and their ratios.

    python tools/benchmarks/workers.py MODEL [--prompts 12] [--workers 2]

One thread each, so that both compute the same bits, which is checked. The wall clock counts on a quiet machine only.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

SUBJECTS = ("The capital of France", "The color of snow", "The opposite of hot", "The bridge out of Marin")


def measured(model: str, workers: int, folder: Path) -> tuple[float, float, bytes]:
    """Return the CPU seconds of all processes, the wall seconds, and the file."""
    out = folder / f"{workers}.jsonl"
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    study = ["ranks", "-q", "-t", "1", "-m", model, "-f", str(folder / "prompts.txt"), "-o", str(out)]
    subprocess.run(
        [sys.executable, "-m", "ggjac", *study, "--workers", str(workers)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        check=True,
    )
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall, out.read_bytes()


def main() -> None:
    """Measure both, and print them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with TemporaryDirectory() as place:
        folder = Path(place)
        prompts = [f"{SUBJECTS[i % len(SUBJECTS)]}, number {i}, is" for i in range(options.prompts)]
        (folder / "prompts.txt").write_text("\n".join(prompts))
        (cpu, wall, file), (cpus, walls, files) = (
            measured(options.model, workers, folder) for workers in (1, options.workers)
        )
    if file != files:
        sys.exit("the files differ")
    for workers, used, took in ((1, cpu, wall), (options.workers, cpus, walls)):
        print(f"{options.prompts} prompts, workers: {workers}: {used:.1f} s CPU, {took:.1f} s")
    print(f"CPU {cpus / cpu:.2f} times as much, wall {wall / walls:.2f} times as fast; the same bytes")


if __name__ == "__main__":
    main()
