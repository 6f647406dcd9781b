"""Break llama.cpp in its own process in every way: each command must say so on one line, and keep its own work.

    python tools/reliability/llamacpp_faults.py [--count 1] [--seed 0] [--only WORDS] [--show]

A fake `llama_cpp` package, found before the real one, does one of `FAULTS` while it is loaded or in one function of its
interface. Under it run the commands of `COMMANDS`, each in a process of its own: with token ids, a text that needs
llama.cpp, the comparison alone, and a whole analysis. Ten seconds without work count as a hang here, not two minutes.

What must hold: where a command asks llama.cpp for what a fault breaks, one line with the words of `FAULTS`, and
exit code 1, or 4 for lack of memory; elsewhere nothing on stderr, exit code 0, and the same output as without a fault.
No traceback, nothing called a bug, no process of llama.cpp and no temporary folder left. `analyze` ends with its whole
run folder and the same numbers, and says why there is no comparison. `--count` repeats everything, `--seed` shuffles
the order.
"""

import argparse
import html
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

from attempts import APART, show

ROOT = Path(__file__).resolve().parents[2]
IDS = "0,465,637,719,462,1884,458,460"
LONGEST = 300  # seconds that a command may take


class Fault(NamedTuple):
    """What goes wrong.

    Attributes:
        place: `loading`, or the function of the interface that is replaced; None for what is no fault of llama.cpp.
        code: what happens there, in Python.
        says: pattern of the words in which a command must report it.
        exit_code: of a command that needs what is broken.
    """

    place: str | None
    code: str
    says: str
    exit_code: int = 1


ABORT, SEGV, KILL = "os.abort()", "os.kill(os.getpid(), signal.SIGSEGV)", "os.kill(os.getpid(), signal.SIGKILL)"
SLEEP, DEATH = "time.sleep(10_000)", r"llama\.cpp itself ended .*"
HANGS, MEMORY, NO_REPLY = "hangs: its process did nothing for 10 s", "too little memory", "is not a reply: reinstall"

SOUND = "works"
FAULTS = {
    SOUND: Fault(None, "", ""),
    "cannot be loaded": Fault(
        "loading", "raise OSError('wrong ELF class')", r"be loaded \(wrong ELF class\): reinstall"
    ),
    "aborts while loading": Fault("loading", ABORT, DEATH + r"SIGABRT.* library cannot be loaded: reinstall"),
    "illegal instruction": Fault(
        "loading",
        "os.kill(os.getpid(), signal.SIGILL)",
        DEATH + "SIGILL.* for another processor: reinstall it from source",
    ),
    "reads invalid memory": Fault("loading", SEGV, DEATH + r"SIGSEGV.* library cannot be loaded: reinstall"),
    "is killed for memory": Fault("loading", KILL, DEATH + "SIGKILL.* " + MEMORY, 4),
    "exits": Fault("loading", "os._exit(7)", DEATH + "exit code 7.* library cannot be loaded: reinstall"),
    "hangs while loading": Fault("loading", SLEEP, HANGS),
    "writes garbage": Fault("loading", "os.write(reply_pipe(), b'\\x00\\xff{garbage\\n')", NO_REPLY),
    "writes no end of line": Fault("loading", "os.write(reply_pipe(), b'x' * 100); os._exit(0)", DEATH + "exit code 0"),
    "closes its pipe": Fault("loading", f"os.close(reply_pipe()); {SLEEP}", DEATH + "its process no longer answers"),
    "aborts in an evaluation": Fault("llama_decode", ABORT, DEATH + "SIGABRT"),
    "hangs in an evaluation": Fault("llama_decode", SLEEP, HANGS),
    "reads invalid memory in an evaluation": Fault("llama_decode", SEGV, DEATH + "SIGSEGV"),
    "is killed in an evaluation": Fault("llama_decode", KILL, DEATH + "SIGKILL.* " + MEMORY, 4),
    "refuses a model": Fault("llama_model_load_from_file", "return None", r"llama\.cpp cannot (load|read)"),
    "fails to evaluate": Fault(
        "llama_decode", "return -3", r"cannot evaluate 8 tokens of .*\(-3\)|evaluate \d .*\(-3\)"
    ),
    "raises in an evaluation": Fault("llama_decode", "raise RuntimeError('odd')", "RuntimeError: odd"),
    "aborts when it tokenizes": Fault("llama_tokenize", ABORT, DEATH + "SIGABRT"),
    "is killed when it tokenizes": Fault("llama_tokenize", KILL, DEATH + "SIGKILL.* " + MEMORY, 4),
    "has no temporary folder": Fault("temporary folder", "", "set TMPDIR to one that can be written"),
}

COMMANDS = {
    "predict --tokens": ["predict", "--tokens", IDS],
    "predict -p": ["predict", "-p", "The bridge"],
    "verify": ["verify", "--tokens", IDS],
    "verify -p": ["verify", "-p", "The bridge"],
    "analyze": ["analyze", "-k", "1", "--max-sweeps", "3", "--tol", "0.9", "-o", "run"],
}
# Where each command asks llama.cpp for something.
TEXT, EVALUATION = {"llama_tokenize"}, {"llama_decode", "temporary folder"}
BOTH = {"loading", "llama_model_load_from_file"}
ASKS: dict[str, set[str]] = {
    "predict --tokens": set(),
    "predict -p": BOTH | TEXT,
    "verify": BOTH | EVALUATION,
    "verify -p": BOTH | TEXT | EVALUATION,
    "analyze": BOTH | TEXT | EVALUATION,  # the comparison tokenizes the prompt too
}
# The pipe to ggjac is the one that the process can write to, whatever its number; its log is a file.
PACKAGE = """\
import fcntl, os, signal, stat, time
def reply_pipe():
    found = []
    for fd in map(int, os.listdir("/dev/fd")):
        try:
            if stat.S_ISFIFO(os.fstat(fd).st_mode) and fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_WRONLY:
                found.append(fd)
        except OSError:
            continue
    pipe, = found
    return pipe
"""
# The command line, with less patience, and without a temporary folder where that is the fault.
PROGRAM = """\
import sys, tempfile
import ggjac.llamacpp.child as child
child.PATIENCE = 10
if sys.argv.pop(1) == "temporary folder":
    tempfile.tempdir = "/nonexistent/folder"
from ggjac.cli import main
main(prog_name="ggjac")
"""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int | None  # None: it had to be killed
    out: str
    err: str
    run: dict | None  # the run folder's run.json, if there is one


def fake(fault: Fault, folder: Path) -> Path:
    """Write a `llama_cpp` package with a fault, and return the folder in which it is found."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    package, real = folder / "path" / "llama_cpp", Path(spec.submodule_search_locations[0])
    package.mkdir(parents=True)
    for path in real.iterdir():
        if path.name not in ("__init__.py", "__pycache__"):
            (package / ("_real.py" if path.name == "llama_cpp.py" else path.name)).symlink_to(path)
    (package / "__init__.py").write_text("")
    body = PACKAGE + (f"{fault.code}\n" if fault.place == "loading" else "")
    body += "import llama_cpp._real as _real\n"
    body += "globals().update({name: value for name, value in vars(_real).items() if not name.startswith('__')})\n"
    if fault.place is not None and fault.place.startswith("llama_"):
        body += f"assert {fault.place}\ndef {fault.place}(*given):\n    {fault.code}\n"
    (package / "llama_cpp.py").write_text(body)
    return package.parent


def run(command: str, fault: Fault, folder: Path) -> Outcome:
    """Run a command with a fault in an empty folder."""
    temporary, written = folder / "temporary", folder / "run" / "run.json"
    temporary.mkdir()
    path = os.pathsep.join((str(fake(fault, folder)), str(ROOT)))
    env = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    words = [sys.executable, "-P", "-c", PROGRAM, str(fault.place), *COMMANDS[command], "-q", "-t", "1"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", cwd=folder, env=env
    ) as process:
        try:
            out, err = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            return Outcome(None, out, err, None)
    content = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
    return Outcome(process.returncode, out, err, content)


def numbers(content: dict | None) -> dict:
    """Return what a run.json holds apart from the comparison, and from what no two runs share."""
    return {name: value for name, value in (content or {}).items() if name not in (*APART, "parity")}


def complaints(command: str, fault: Fault, end: Outcome, sound: Outcome, folder: Path) -> list[str]:
    """Return what should not have happened; `sound` is how the command ends without a fault."""
    found = []
    concerned = fault.place in ASKS[command]
    expected = fault.exit_code if concerned and command != "analyze" else 0
    if end.code != expected:
        found.append(f"exit code {end.code}, not {expected}: {end.err[-200:]!r}")
    # One line on stderr where it fails, and none where it does not.
    lines = end.err.splitlines()
    if len(lines) != bool(expected) or not all(line.startswith("Error: ") and line.isprintable() for line in lines):
        found.append(f"not {'one line' if expected else 'silent'}: {end.err[-400:]!r}")
    if expected and not re.search(fault.says, end.err):
        found.append(f"does not say {fault.says!r}: {end.err[-400:]!r}")
    if "Traceback" in end.out + end.err or "this is a bug" in end.out + end.err:
        found.append("a traceback, or called a bug")
    if not expected and not concerned and end.out != sound.out:
        found.append("printed something else than without a fault")
    if command == "analyze":
        found += lost(fault, concerned, end, sound, folder)
    if left := sorted(path.name for path in (folder / "temporary").iterdir()):
        found.append(f"left {left}")
    if orphans(folder):
        found.append("a process of llama.cpp is left")
    return found


def lost(fault: Fault, concerned: bool, end: Outcome, sound: Outcome, folder: Path) -> list[str]:
    """Return what is wrong with the run folder of `analyze`."""
    names = {path.name for path in (folder / "run").glob("*")}
    if names != {"report.html", "run.json", "tensors.safetensors"}:
        return [f"the run folder holds {sorted(names)}"]
    found = []
    if numbers(end.run) != numbers(sound.run):
        found.append("the numbers are not those of a run without a fault")
    parity = (end.run or {}).get("parity") or {}
    if not concerned:
        return found + ([] if parity.get("verdict") is True else [f"the comparison says {parity}"])
    reason = str(parity.get("reason"))
    if parity.get("verdict", "absent") is not None or not reason.isprintable() or not re.search(fault.says, reason):
        found.append(f"the comparison says {parity}, not {fault.says!r}")
    page = html.unescape((folder / "run" / "report.html").read_text(encoding="utf-8"))
    if f"not compared: {reason}" not in end.out or reason not in page:
        found.append("the output or the report leaves the reason out")
    return found


def orphans(folder: Path) -> list[int]:
    """Return processes of llama.cpp that were started with this folder's fake package, and outlive it by a second."""
    import psutil

    deadline = time.monotonic() + 1
    while True:
        found = []
        for process in psutil.process_iter(["cmdline"]):
            if "ggjac.llamacpp.server" in (process.info["cmdline"] or []):
                with suppress(psutil.Error):
                    if str(folder) in process.environ().get("PYTHONPATH", ""):
                        found.append(process.pid)
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def main() -> None:
    """Run every command under every fault, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1, help="how often each pair is run")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--only", help="the faults whose names contain this")
    parser.add_argument("--show", action="store_true", help="print what each command says")
    options = parser.parse_args()

    faults = [name for name in FAULTS if name == SOUND or (options.only or "") in name]
    pairs = [(fault, command) for fault in faults for command in COMMANDS] * options.count
    Random(options.seed).shuffle(pairs)
    pairs.sort(key=lambda pair: pair[0] != SOUND)  # first, for what others are compared with
    good: Counter[tuple[str, str]] = Counter()
    bad: list[str] = []
    sound: dict[str, Outcome] = {}
    for fault, command in pairs:
        with tempfile.TemporaryDirectory(prefix="ggjac-faults-") as name:
            folder = Path(name)
            end = run(command, FAULTS[fault], folder)
            wrong = complaints(command, FAULTS[fault], end, sound.setdefault(command, end), folder)
        good[fault, command] += not wrong
        bad += [f"llama.cpp {fault}, {command}: {text}" for text in wrong]
        if options.show:
            reason = ((end.run or {}).get("parity") or {}).get("reason", "")
            print(f"llama.cpp {fault}, {command}: {end.code} {end.err.strip() or reason}", flush=True)
    rows = [(fault, *(f"{good[fault, name]} of {options.count}" for name in COMMANDS)) for fault in faults]
    show("Commands that ended as they should", ("llama.cpp", *COMMANDS), rows)
    print(f"{sum(good.values())} of {len(pairs)} ended as they should")
    print(*bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
