"""Break llama.cpp in its own process in every way: each command must say so on one line, and keep its own work.

    python tools/reliability/llamacpp_faults.py [--count 1] [--seed 0] [--show]

A fake `llama_cpp` package, found before the real one, does one of `FAULTS` while it is loaded or at its first or second
call. Under it run the commands of `COMMANDS`, each in a process of its own: with token ids, a text that needs
llama.cpp, the comparison alone, and a whole analysis. Ten seconds without work count as a hang here, not two minutes.

What must hold: exit code and the one line of `EXPECTED`; no traceback, nothing called a bug; no process of llama.cpp
and no temporary folder left; and `analyze` ends with its run folder, in which there is no comparison. `--count` repeats
everything, `--seed` shuffles the order.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
IDS = "0,465,637,719,462,1884,458,460"

# What the fake package does before it hands on the real one's interface.
LOADING = {
    "cannot be loaded": "raise OSError('libllama.so: wrong ELF class')",
    "aborts while loading": "os.abort()",
    "illegal instruction": "os.kill(os.getpid(), signal.SIGILL)",
    "reads invalid memory": "os.kill(os.getpid(), signal.SIGSEGV)",
    "is killed for memory": "os.kill(os.getpid(), signal.SIGKILL)",
    "exits": "os._exit(7)",
    "hangs while loading": "time.sleep(10_000)",
    "writes garbage": "[os.write(fd, b'\\x00\\xff{garbage\\n') for fd in range(1, 8) if is_pipe(fd)]",
    "writes no end of line": "[os.write(fd, b'x' * 100) for fd in range(1, 8) if is_pipe(fd)]; os._exit(0)",
    "closes its pipe": "[os.close(fd) for fd in range(3, 8) if is_pipe(fd)]; time.sleep(10_000)",
}
# What a function of the interface does instead.
CALLING = {
    "aborts in an evaluation": ("llama_decode", "os.abort()"),
    "hangs in an evaluation": ("llama_decode", "time.sleep(10_000)"),
    "reads invalid memory in an evaluation": ("llama_decode", "os.kill(os.getpid(), signal.SIGSEGV)"),
    "is killed in an evaluation": ("llama_decode", "os.kill(os.getpid(), signal.SIGKILL)"),
    "refuses a model": ("llama_model_load_from_file", "return None"),
    "fails to evaluate": ("llama_decode", "return -3"),
    "raises in an evaluation": ("llama_decode", "raise RuntimeError('odd')"),
    "aborts when it tokenizes": ("llama_tokenize", "os.abort()"),
}
NO_FOLDER = "has no temporary folder"
FAULTS = (*LOADING, *CALLING, NO_FOLDER)

COMMANDS = {
    "predict --tokens": ["predict", "--tokens", IDS],
    "predict -p": ["predict", "-p", "The bridge"],
    "verify": ["verify", "--tokens", IDS],
    "verify -p": ["verify", "-p", "The bridge"],
    "analyze": ["analyze", "-k", "1", "--max-sweeps", "3", "--tol", "0.9", "-o", "run"],
}

# Faults in an evaluation do not concern tokenizing, and the other way about.
TEXT_ALONE = {"aborts when it tokenizes"}
EVALUATION_ALONE = {name for name, (function, _) in CALLING.items() if function == "llama_decode"} | {NO_FOLDER}
# Too little memory has an exit code of its own.
WILL_NOT_FIT = {"is killed for memory", "is killed in an evaluation"}

PACKAGE = """\
import os, signal, stat, time
def is_pipe(fd):
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False
"""
# The command line, with less patience, and without a temporary folder where that is the fault.
PROGRAM = """\
import sys, tempfile
import ggjac.llamacpp.child as child
child.PATIENCE = 10
if sys.argv.pop(1) == "no":
    tempfile.tempdir = "/nonexistent/folder"
from ggjac.cli import main
main(prog_name="ggjac")
"""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str
    run: dict | None  # the run folder's run.json, if there is one


def fake(fault: str, folder: Path) -> Path:
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
    body = PACKAGE + (f"{LOADING[fault]}\n" if fault in LOADING else "")
    body += "import llama_cpp._real as _real\n"
    body += "globals().update({name: value for name, value in vars(_real).items() if not name.startswith('__')})\n"
    if fault in CALLING:
        function, what = CALLING[fault]
        body += f"def {function}(*given):\n    {what}\n"
    (package / "llama_cpp.py").write_text(body)
    return package.parent


def run(command: str, fault: str, folder: Path) -> Outcome:
    """Run a command with a fault in an empty folder."""
    temporary = folder / "temporary"
    temporary.mkdir()
    path = os.pathsep.join((str(fake(fault, folder)), str(ROOT)))
    env = os.environ | {"PYTHONPATH": path, "TMPDIR": str(temporary), "PYTHONIOENCODING": "utf-8"}
    words = [sys.executable, "-P", "-c", PROGRAM, "no" if fault == NO_FOLDER else "yes", *COMMANDS[command]]
    done = subprocess.run([*words, "-q", "-t", "1"], capture_output=True, text=True, cwd=folder, env=env, timeout=300)
    written = folder / "run" / "run.json"
    content = json.loads(written.read_text(encoding="utf-8")) if written.exists() else None
    return Outcome(done.returncode, done.stdout, done.stderr, content)


def concerns(command: str, fault: str) -> bool:
    """Return whether a command asks llama.cpp for what the fault breaks."""
    if fault in EVALUATION_ALONE:
        return command.startswith(("verify", "analyze"))
    if fault in TEXT_ALONE:
        return command.endswith("-p") or command == "analyze"
    return command != "predict --tokens"


def complaints(command: str, fault: str, end: Outcome, folder: Path) -> list[str]:
    """Return what should not have happened."""
    found = []
    lines = [line for line in end.err.splitlines() if not line.startswith("Warning: ")]
    expected = 0
    if concerns(command, fault) and command != "analyze":
        expected = 4 if fault in WILL_NOT_FIT and command == "verify" else 1
        if fault in WILL_NOT_FIT and command == "verify -p" and fault in EVALUATION_ALONE:
            expected = 4
    if end.code != expected:
        found.append(f"exit code {end.code}, not {expected}: {end.err[-200:]!r}")
    if expected and not (len(lines) == 1 and lines[0].startswith("Error: ") and lines[0].isprintable()):
        found.append(f"not one line: {end.err[-400:]!r}")
    if not expected and lines:
        found.append(f"said {end.err[-300:]!r}")
    if "Traceback" in end.out + end.err or "this is a bug" in end.err:
        found.append("a traceback, or called a bug")
    if command == "analyze":
        parity = (end.run or {}).get("parity", {})
        if end.run is None or not (folder / "run" / "report.html").exists():
            found.append("the run folder is lost")
        elif concerns(command, fault) and not (parity["verdict"] is None and parity["reason"].isprintable()):
            found.append(f"the comparison says {parity}")
    if left := list((folder / "temporary").iterdir()):
        found.append(f"left {[path.name for path in left]}")
    if orphans(folder):
        found.append("a process of llama.cpp is left")
    return found


def orphans(folder: Path) -> list[int]:
    """Return processes of llama.cpp that were started with this folder's fake package."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline"]):
        if "ggjac.llamacpp.server" in (process.info["cmdline"] or []):
            try:
                if str(folder) in process.environ().get("PYTHONPATH", ""):
                    found.append(process.pid)
            except psutil.Error:
                continue
    return found


def main() -> None:
    """Run every command under every fault, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1, help="how often each pair is run")
    parser.add_argument("--seed", type=int, default=0, help="of the order")
    parser.add_argument("--show", action="store_true", help="print what each command says")
    options = parser.parse_args()

    pairs = [(fault, command) for fault in FAULTS for command in COMMANDS] * options.count
    Random(options.seed).shuffle(pairs)
    good: Counter[tuple[str, str]] = Counter()
    bad: list[str] = []
    for fault, command in pairs:
        with tempfile.TemporaryDirectory(prefix="ggjac-faults-") as name:
            folder = Path(name)
            end = run(command, fault, folder)
            wrong = complaints(command, fault, end, folder)
        good[fault, command] += not wrong
        bad += [f"llama.cpp {fault}, {command}: {text}" for text in wrong]
        if options.show:
            reason = ((end.run or {}).get("parity") or {}).get("reason", "")
            print(f"llama.cpp {fault}, {command}: {end.code} {end.err.strip() or reason}", flush=True)
    width = max(map(len, FAULTS)) + 10
    print("llama.cpp".ljust(width), *(name.rjust(17) for name in COMMANDS))
    for fault in FAULTS:
        print(fault.ljust(width), *(f"{good[fault, name]}/{options.count}".rjust(17) for name in COMMANDS))
    print(f"{sum(good.values())} of {len(pairs)} ended as they should")
    print(*bad, sep="\n")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
