"""Read damaged GGUF files by the hundred thousand: each must be refused by one line of a known error, or run.

    python tools/reliability/damaged_files.py [--count 200000] [--seed 0] [--workers 2] [--keep FOLDER]
    python tools/reliability/damaged_files.py --seed 0 --only 123456    # one file again, with its traceback
    python tools/reliability/damaged_files.py --guided [--count 200000]  # by coverage; `pip install atheris` before

A file of `tests/tiny.py`, of any architecture, gets one to four changes (`mutations.py`); one in twenty is split in
two. It is opened, its metadata are read, `ggjac info` is made, its configuration is read, the model is opened and its
vocabulary is decoded; of those that open, some are run: a trace of two tokens and a prediction.

What must hold: nothing but an error of a known class, on one line that a terminal can print; at most 10 seconds and
1 GiB for a file; no file written anywhere. Anything else is printed with its seed, and the files are kept. Each worker
is a process that its parent watches and replaces. `--only` makes a file again from its seed and number.
"""

import argparse
import faulthandler
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[2] / "tests"), str(HERE.parent), str(HERE.parents[2])]

import mutations  # noqa: E402

SECONDS, MEMORY = 10, 1 << 30  # that one file may take
RUN_EVERY = 4  # of the models that open, so many are run: the first of each
LONGEST = 1500  # characters of a message


@dataclass(frozen=True)
class Finding:
    """What should not happen: where in the code, what, and how to see it again."""

    place: str
    text: str
    index: int


def known_errors() -> tuple[type[Exception], ...]:
    """Return the classes of errors with which a file may be refused."""
    from ggjac.blocks.frame import NumericsError
    from ggjac.config import ConfigError
    from ggjac.gguf import GGUFError
    from ggjac.model import PromptError
    from ggjac.tokenizer import TokenizerError
    from ggjac.weights import WeightError

    return ConfigError, GGUFError, NumericsError, PromptError, TokenizerError, WeightError


# ---- what is done with a file


def examine(path: Path, *, run: bool) -> str:
    """Read a file as far as it goes, and return how far that was; a refusal is an error of a known class."""
    from ggjac import inventory, runs
    from ggjac.gguf import open_gguf
    from ggjac.model import open_model
    from ggjac.tokenizer import RawVocabulary

    known = known_errors()
    try:
        file = open_gguf(path)
    except known as error:
        return refused("open", error)
    with file:
        for value in file.metadata.values():
            read_value(value)
        runs.json_text(runs.finite(inventory.contents(file, tensors=True)))
    try:
        model = open_model(path, device="cpu", threads=1)
    except known as error:
        return refused("configure", error)
    stated = model.tokenizer
    raw = stated if isinstance(stated, RawVocabulary) else stated._raw  # type: ignore[attr-defined]
    for id in (*range(min(raw.n_vocab, 300)), raw.n_vocab, raw.n_vocab + 5, model.config.vocabulary):
        read_token(raw, id)
    return run_model(model) if run else "opened"


def run_model(model: Any) -> str:
    """Trace two tokens, and predict the next one."""
    import ggjac

    try:
        trace = model.trace([0, min(1, model.config.vocabulary - 1)])
        ggjac.predict(trace, top=3).data()
        model.weights.warning()
    except known_errors() as error:
        return refused("run", error)
    return "ran"


def read_value(value: Any, depth: int = 0) -> None:
    """Read the elements of an array: the first, the last, and some between."""
    from ggjac.gguf import LazyArray, shown

    if isinstance(value, str):
        shown(value)
    if isinstance(value, LazyArray) and depth < 8:
        for i in {*range(min(len(value), 20)), *range(max(0, len(value) - 3), len(value))}:
            read_value(value[i], depth + 1)


def read_token(raw: Any, id: int) -> None:
    """Decode a token in all ways."""
    from ggjac.display import visible

    visible(raw.piece(id))
    if not visible(raw.name(id)) or not raw.kind(id):
        raise AssertionError(f"token {id} has no name, or no kind")


def refused(stage: str, error: Exception) -> str:
    """Return the stage and the class of a refusal, after a look at its message."""
    message = str(error)
    if "\n" in message or not message.isprintable() or not 10 < len(message) < LONGEST:
        raise AssertionError(f"a message that is not one short printable line: {message[:2000]!r}") from error
    return f"{stage}: {type(error).__name__}"


# ---- the files


@cache
def bases() -> list[Path]:
    """Return the whole files: every row of `tiny.CASES`, written once."""
    folder = Path(os.environ["GGJAC_BASES"])
    return sorted(folder.glob("*.gguf"))


def write_bases(folder: Path) -> None:
    """Write the files that are going to be damaged."""
    import tiny

    for case, row in tiny.CASES.items():
        if tiny.options(case).layers <= 20:  # larger ones cost time and are not different
            tiny.write(folder / f"{case}.gguf", **row)


@cache
def content(path: Path) -> bytes:
    """Return a whole file."""
    return path.read_bytes()


def damage(seed: int, index: int) -> tuple[dict[str, bytes], Counter[str]]:
    """Return damaged file number `index`, under the names of its shards, and the changes made."""
    random = Random(f"{seed}/{index}")
    raw, made = content(random.choice(bases())), Counter[str]()
    if random.random() < 0.05:
        shards = [bytes(shard) for shard in mutations.split(mutations.parse(raw), 2)]
        made["split"] += 1
    else:
        shards = [raw]
    for _ in range(random.choices((0, 1, 2, 3, 4), (1, 40, 25, 20, 14))[0]):
        at = random.randrange(len(shards))
        shards[at], name = mutations.mutated(shards[at], random)
        made[name] += 1
    if len(shards) == 1:
        return {"m.gguf": shards[0]}, made
    return {f"m-{i:05}-of-00002.gguf": shard for i, shard in enumerate(shards, 1)}, made


# ---- the workers


def work(number: int, first: int, options: argparse.Namespace, beat: Any, results: Any) -> None:
    """Examine files `first`, `first + workers`, ...; tell the parent which one is at work, and what came of it."""
    import torch

    torch.set_num_threads(1)
    import ggjac
    from ggjac.model import open_model

    ggjac.predict(open_model(bases()[0]).trace([0, 1]), top=1)  # what is loaded and allocated once, before the limit
    own = Path(tempfile.mkdtemp(prefix=f"worker-{number}-", dir=options.work))
    home, inside = own / "home", own / "in"
    home.mkdir()
    inside.mkdir()
    os.chdir(home)
    os.environ["HOME"] = os.environ["TMPDIR"] = str(home)
    tempfile.tempdir = str(home)
    sys.stdout = sys.stderr = open(own / "output", "w")  # noqa: SIM115
    faulthandler.enable(sys.stderr)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    seen: Counter[str] = Counter()
    for index in range(first, options.count, options.workers):
        beat[number] = index
        beat[options.workers + number] += 1  # a count that the parent sees grow
        files, made = damage(options.seed, index)
        faulthandler.dump_traceback_later(SECONDS - 1, file=sys.stderr)
        try:
            outcome = examine_files(files, inside, home, run=index % RUN_EVERY == 0)
        except Exception as error:
            outcome = "FOUND"
            results.put((number, Finding(place(error), "".join(traceback.format_exception(error))[-6000:], index)))
        faulthandler.cancel_dump_traceback_later()
        seen[outcome] += 1
        seen.update({f"change {name}": n for name, n in made.items()})
        if index // options.workers % 200 == 0:
            results.put((number, seen))
            seen = Counter()
    results.put((number, seen))
    results.put((number, None))
    results.close()
    results.join_thread()
    os._exit(0)


def examine_files(files: dict[str, bytes], inside: Path, home: Path, *, run: bool) -> str:
    """Write damaged files, examine the first, and compare what is there afterwards with what was written."""
    for name, raw in files.items():
        (inside / name).write_bytes(raw)
    try:
        outcome = examine(inside / next(iter(files)), run=run)
        if sorted(os.listdir(inside)) != sorted(files) or os.listdir(home):
            raise AssertionError(f"files were written: {os.listdir(inside)} {os.listdir(home)}")
        if any(len(raw) != (inside / name).stat().st_size for name, raw in files.items()):
            raise AssertionError("the file itself was written")
        return outcome
    finally:
        for name in os.listdir(inside):
            (inside / name).unlink()


def place(error: BaseException) -> str:
    """Return the class of an error and the innermost line of ggjac, so that the same mistake is told once."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/ggjac/" in frame.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else "nowhere"
    return f"{type(error).__name__} at {where}"


def campaign(options: argparse.Namespace) -> int:
    """Run the workers, watch them, and report."""
    context = multiprocessing.get_context("spawn")
    beat, results = context.Array("q", 2 * options.workers), context.Queue()
    found: dict[str, list[Finding]] = {}
    seen: Counter[str] = Counter()
    start = time.monotonic()

    def started(number: int, first: int) -> Any:
        process = context.Process(target=work, args=(number, first, options, beat, results), daemon=True)
        process.start()
        return process

    running = {number: started(number, number) for number in range(options.workers)}
    last = {number: (-1, time.monotonic() + 50) for number in running}  # loading torch takes a while
    told = start
    while running:
        try:
            number, item = results.get(timeout=0.5)
            if isinstance(item, Counter):
                seen += item
            elif item is None:
                running.pop(number).join()
            else:
                note(item, found, options)
        except Exception as error:  # queue.Empty, or a message cut by a killed worker
            if type(error).__name__ not in ("Empty", "UnpicklingError", "EOFError"):
                raise
        now = time.monotonic()
        for number, process in list(running.items()):
            count = beat[options.workers + number]
            if count != last[number][0]:
                last[number] = (count, now)
            dead, hung = not process.is_alive(), now - last[number][1] > SECONDS
            if dead or hung:
                process.kill()
                process.join()
                index = beat[number]
                what = f"a hang of {SECONDS} seconds" if hung else f"the process ended with {process.exitcode}"
                note(Finding(f"{what}, file {index}", output(options, number), index), found, options)
                running[number] = started(number, index + options.workers)
                last[number] = (count, now + 50)
        if now - told > 30:
            told = now
            done = sum(n for name, n in seen.items() if not name.startswith("change "))
            print(f"{done} files, {done / (now - start):.0f} a second, {len(found)} kinds of finding", flush=True)
    return report(seen, found, sum(beat[options.workers :]), time.monotonic() - start)


def output(options: argparse.Namespace, number: int) -> str:
    """Return what a worker wrote last: of a hang, the lines of code at which it was."""
    texts = sorted(Path(options.work).glob(f"worker-{number}-*/output"), key=lambda path: path.stat().st_mtime)
    return texts[-1].read_text(errors="replace")[-4000:] if texts else ""


def note(finding: Finding, found: dict[str, list[Finding]], options: argparse.Namespace) -> None:
    """Print a finding of a new kind, and keep its files."""
    found.setdefault(finding.place, []).append(finding)
    if len(found[finding.place]) > 1:
        return
    folder = Path(options.keep) / f"{options.seed}-{finding.index}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in damage(options.seed, finding.index)[0].items():
        (folder / name).write_bytes(raw)
    (folder / "traceback.txt").write_text(finding.text)
    print(f"FOUND {finding.place}; --seed {options.seed} --only {finding.index}; kept in {folder}", flush=True)


def report(seen: Counter[str], found: dict[str, list[Finding]], files: int, seconds: float) -> int:
    """Print the figures; return the exit code. What a worker had counted when it was killed is not among them."""
    outcomes = {name: n for name, n in seen.items() if not name.startswith("change ")}
    print(f"\n{files} files in {seconds:.0f} s, {files / seconds:.0f} a second")
    for name, n in sorted(outcomes.items(), key=lambda item: -item[1]):
        print(f"  {n:8}  {name}")
    changes = ", ".join(f"{name[7:]} {n}" for name, n in sorted(seen.items()) if name.startswith("change "))
    print(f"changes: {changes}")
    for name, all_of_it in found.items():
        print(f"FOUND {len(all_of_it)} times: {name}; --only {all_of_it[0].index}")
    print("nothing found" if not found else f"{len(found)} kinds of finding")
    return 1 if found else 0


def once(options: argparse.Namespace) -> int:
    """Examine one file again, with its traceback."""
    files, made = damage(options.seed, options.only)
    print(f"changes: {dict(made)}; files: { {name: len(raw) for name, raw in files.items()} }")
    inside, home = Path(options.work, "in"), Path(options.work, "home")
    inside.mkdir()
    home.mkdir()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    print(examine_files(files, inside, home, run=True))
    return 0


# ---- by coverage


def guided(options: argparse.Namespace) -> int:
    """Let libFuzzer, through atheris, keep the changes that reach new code, in a process that it ends itself."""
    Path(options.keep).mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(options,))
    process.start()
    process.join()
    return int(process.exitcode != 0 or any(Path(options.keep).iterdir()))


def fuzz(options: argparse.Namespace) -> None:
    """Change files and examine them until the count is reached; each kind of finding is kept once."""
    import atheris

    with atheris.instrument_imports(include=["ggjac.gguf", "ggjac.config", "ggjac.inventory", "ggjac.tokenizer"]):
        import ggjac.inventory
        import ggjac.tokenizer  # noqa: F401
    path, found = Path(options.work, "m.gguf"), set[str]()

    def one_input(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            examine(path, run=False)
        except Exception as error:
            if (where := place(error)) in found:
                return
            found.add(where)
            folder = Path(options.keep, f"guided-{options.seed}-{len(found)}")
            folder.mkdir()
            (folder / "m.gguf").write_bytes(raw)
            (folder / "traceback.txt").write_text("".join(traceback.format_exception(error)))
            print(f"FOUND {where}; kept in {folder}", flush=True)

    def change(raw: bytes, most: int, seed: int) -> bytes:
        return mutations.mutated(raw, Random(seed))[0][:most]

    limits = [f"-runs={options.count}", f"-seed={options.seed or 1}", f"-timeout={SECONDS}", "-rss_limit_mb=4096"]
    places = [f"-artifact_prefix={options.keep}/", "-max_len=2000000", "-print_final_stats=1", "-verbosity=0"]
    corpus = Path(options.work, "corpus")
    corpus.mkdir()
    atheris.Setup([sys.argv[0], *limits, *places, str(corpus), str(options.bases)], one_input, custom_mutator=change)
    atheris.Fuzz()


def main() -> int:
    """Parse the options and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help="damaged files [default: 200000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", type=int, help="examine this file alone")
    parser.add_argument("--keep", default="damaged-files", help="folder for what is found [default: damaged-files]")
    parser.add_argument("--guided", action="store_true", help="choose changes by coverage; needs atheris")
    options = parser.parse_args()
    options.keep = str(Path(options.keep).resolve())
    options.work = tempfile.mkdtemp(prefix="ggjac-damaged-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
    options.bases = os.environ["GGJAC_BASES"] = str(Path(options.work, "bases"))
    os.environ["OMP_NUM_THREADS"] = "1"
    modes: dict[bool, Callable[[argparse.Namespace], int]] = {True: guided, False: campaign}
    try:
        Path(options.bases).mkdir()
        write_bases(Path(options.bases))
        return once(options) if options.only is not None else modes[options.guided](options)
    finally:
        shutil.rmtree(options.work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
