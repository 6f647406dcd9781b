"""Every question about one prompt: planned memory, the peak that was measured, and CPU seconds, a row each.

    python tools/make_synthetic_gguf.py --preset llama-3.3-70b --tokenizer SmolLM2.gguf -o 70b.gguf    # 41.6 GB
    python tools/benchmarks/questions.py 70b.gguf --ram-budget 2GiB
    python tools/benchmarks/questions.py 70b.gguf --ram-budget 2GiB --only reach --only steer

The peak is of anonymous memory (resident, less what is shared with files: pages of the model that the kernel keeps are
nobody's need), read ten times a second: of the command, which a plan is about, and of llama.cpp's process, which has
the vocabulary and is the same for any command. Prompts are of two words, and sweeps are cut short, since one on a large
file takes minutes: such a command ends with exit code 3, and needs the same memory as one that converges.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import psutil

from ggjac.gguf import open_gguf

PROMPT, OTHER = "The bridge", "The road"
UNRELATED = "Once upon\nTwo and\n"
QUESTIONS = (
    "attribute --by head --reads largest",
    "attribute --mlp-path both",
    "attribute --ablate mean",
    "attribute --by edge",
    "attribute --direction {direction} --layer {middle} --at layer --exclude 0",
    "attribute --max-tokens 2",
    "attend --layer {middle} --head 0",
    "svd -k 1 --max-sweeps 2 --exclude 0",
    "svd -k 2 --max-sweeps 2 --calibrate {unrelated}",
    "compare --with-prompt {other} -k 1 --max-sweeps 2",
    "steer --method remove --direction {direction} --layer {middle} --max-tokens 1 --random 2",
    "reach -k 1 --steps 1 --max-sweeps 3",
)
MIXTURE = ("attribute --by expert",)
OUT_OF_SWEEPS = 3  # an exit code


def anonymous(*processes: psutil.Process) -> int:
    """Return the bytes of processes that belong to no file."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total


def measured(command: list[str]) -> tuple[int, int, float, float]:
    """Run a command, and return the peaks of its memory and its children's, CPU seconds, and seconds by the clock."""
    began, used = time.perf_counter(), os.times()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        root, peak, beside = psutil.Process(process.pid), 0, 0
        while process.poll() is None:
            peak = max(peak, anonymous(root))
            with suppress(psutil.NoSuchProcess):
                beside = max(beside, anonymous(*root.children(recursive=True)))
            time.sleep(0.1)
        said = process.stderr.read() if process.stderr else ""
    if process.returncode not in (0, OUT_OF_SWEEPS):
        sys.exit(f"{shlex.join(command)} ended with exit code {process.returncode}: {said.strip()}")
    now = os.times()
    cpu = now.children_user + now.children_system - used.children_user - used.children_system
    return peak, beside, cpu, time.perf_counter() - began


def planned(command: list[str]) -> int:
    """Return the peak of a command's plan, in bytes."""
    done = subprocess.run([*command, "--dry-run", "--no-bench", "--format", "json"], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the plan of {shlex.join(command)} ended with exit code {done.returncode}: {done.stderr.strip()}")
    return json.loads(done.stdout)["ram_peak"]


def questions(model: Path, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each question as it is shown, and its arguments, whose files are written to a folder."""
    with open_gguf(model) as file:
        family = file.metadata["general.architecture"]
        layers, d = (int(file.metadata[f"{family}.{key}"]) for key in ("block_count", "embedding_length"))
        mixture = f"{family}.expert_count" in file.metadata
    (folder / "unrelated.txt").write_text(UNRELATED)
    np.save(folder / "direction.npy", np.random.default_rng(0).standard_normal(d).astype(np.float32))
    shown = {"middle": layers // 2, "other": shlex.quote(OTHER), "unrelated": "FILE", "direction": "FILE"}
    given = shown | {"unrelated": folder / "unrelated.txt", "direction": folder / "direction.npy"}
    for question in QUESTIONS + MIXTURE * mixture:
        yield question.format(**shown), shlex.split(question.format(**given))


def main() -> None:
    """Ask one question after the other, and print a row as each is answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--ram-budget", default="2GiB")
    parser.add_argument("--only", action="append", default=[], help="questions that contain this text")
    options = parser.parse_args()
    print("| command | plan, GiB | measured, GiB | llama.cpp, GiB | CPU s | s |\n|---|---|---|---|---|---|", flush=True)
    with TemporaryDirectory() as place:
        for shown, asked in questions(options.model, Path(place)):
            if options.only and not any(text in shown for text in options.only):
                continue
            common = ["-q", "-m", str(options.model), "-p", PROMPT, "--ram-budget", options.ram_budget]
            command = [sys.executable, "-m", "ggjac", *asked, *common]
            need = planned(command)
            *memory, cpu, wall = measured(command)
            sizes = " | ".join(f"{nbytes / 2**30:.2f}" for nbytes in (need, *memory))
            print(f"| `{shown}` | {sizes} | {cpu:.0f} | {wall:.0f} |", flush=True)


if __name__ == "__main__":
    main()
