"""The tools that kill, fill disks and change models, at a thousandth of their size: they find what is wrong."""

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "reliability"
PACKAGE = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs os.fork")

# Puts a fault into every command that the tool runs.
FAULTY = """
import sys
sys.argv = {argv!r}
sys.path.insert(0, {tools!r})
import ggjac.runs.journal, ggjac.session, ggjac.gguf
{fault}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(tool: str, *options: object, fault: str = "") -> "subprocess.CompletedProcess[str]":
    argv = [str(TOOLS / tool), *map(str, options)]
    program = FAULTY.format(argv=argv, tools=str(TOOLS), fault=fault)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE)


def test_kills(tmp_path: Path) -> None:
    sound = run("kills.py", "--kills", 1, "--only", "jacobian", "--folder", tmp_path)
    assert sound.returncode == 0, sound.stderr
    assert "| jacobian |" in sound.stdout
    assert list(tmp_path.iterdir()) == []
    # A run that does not remove what it wrote.
    fault = "ggjac.runs.journal.Journal.remove = lambda self: (self.folder / '.x.1.tmp').touch()"
    faulty = run("kills.py", "--kills", 1, "--only", "jacobian", "--folder", tmp_path, fault=fault)
    assert faulty.returncode != 0


def test_full_disks(tmp_path: Path) -> None:
    sound = run("full_disk.py", "--runs", 2, "--only", "jacobian", "--limit", "--folder", tmp_path)
    assert sound.returncode == 0, sound.stderr
    assert "| all | 2 |" in sound.stdout
    fault = "ggjac.session.Session.save = lambda self, output, *a, **k: (output.write_bytes(b'half'), 1 / 0)"
    faulty = run("full_disk.py", "--runs", 2, "--only", "svd", "--limit", "--folder", tmp_path, fault=fault)
    assert faulty.returncode != 0


def test_changed_models(tmp_path: Path) -> None:
    sound = run("changed_model.py", "--runs", 2, "--pairs", 3, "--only", "jacobian", "--folder", tmp_path)
    assert sound.returncode == 0, sound.stderr
    assert "| model overwritten | 1 |" in sound.stdout
    assert "| two on the same --trace, one prompt | 1 |" in sound.stdout
    # Nothing is compared, and the model changes as soon as it is open.
    fault = "ggjac.gguf.GGUFFile.check_unchanged = lambda self: None\nimport random\n"
    fault += "random.Random.uniform = lambda self, a, b: a"
    faulty = run("changed_model.py", "--runs", 5, "--pairs", 0, "--only", "jacobian", "--folder", tmp_path, fault=fault)
    assert faulty.returncode == 1
    assert "differs" in faulty.stderr
