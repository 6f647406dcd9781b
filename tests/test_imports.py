"""Who may import whom: the house stays a house, and `import ggjac` stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ggjac

PACKAGE = Path(ggjac.__file__).parent

# Module (or folder) -> the siblings it may import. Folders are units: what is inside may import its own.
MAY_IMPORT: dict[str, set[str]] = {
    "sizes": set(),
    "results": {"report", "tokenizer"},
    "linop": set(),
    "svd": {"linop", "results", "sizes"},
    "frobenius": {"linop", "results", "sizes", "svd"},
    "config": set(),
    "rope": {"config"},
    "gguf": set(),
    "quants": {"gguf"},
    "weights": {"gguf", "quants", "sizes"},
    "llamacpp": {"runs"},
    "tokenizer": {"llamacpp"},
    "runs": {"sizes"},
    "report": {"runs"},
    "planner": {"config", "gguf", "linop", "sizes", "weights"},
    "decode": {"linop", "weights"},
    "blocks": {"config", "linop", "rope", "sizes"},
    "jacobian": {"blocks", "linop", "runs", "sizes", "svd"},
    "model": {
        *("blocks", "config", "decode", "gguf", "jacobian", "planner", "rope", "sizes", "tokenizer", "weights"),
    },
    "generation": {"blocks", "model", "sizes"},
    "parity": {"gguf", "llamacpp", "model", "results", "tokenizer"},
    "analysis": {
        *("blocks", "decode", "frobenius", "generation", "jacobian", "linop", "model", "results", "runs", "sizes"),
        *("svd", "weights"),
    },
}
# The one that may import anything, and that nothing may import.
TOP = "cli"


def units() -> dict[str, list[Path]]:
    """Return the files of each unit: a module, or a folder of modules."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        unit = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(unit, []).append(path)
    return found


def imported(path: Path, *, unit: str) -> Iterator[str]:
    """Yield the units of this package that a file imports, anywhere in it; lazily or for type checking counts too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # `from . import x` in ggjac/analysis/file.py is ggjac.analysis.x; the file's own name does not count.
            package = path.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            start = ".".join((*package, *filter(None, [node.module])))
            names = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ggjac" and rest.split(".")[0] not in (unit, "__version__", ""):
                yield rest.split(".")[0]


@pytest.mark.parametrize("unit", [unit for unit in units() if unit not in ("__init__", "__main__", TOP)])
def test_imports_go_one_way(unit: str) -> None:
    assert unit in MAY_IMPORT, f"ggjac/{unit} is new: say in MAY_IMPORT what it may import"
    for path in units()[unit]:
        extra = set(imported(path, unit=unit)) - MAY_IMPORT[unit]
        assert not extra, f"{path.relative_to(PACKAGE)} imports {extra}"


def test_the_table_itself_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(MAY_IMPORT):
        ready = {unit for unit, needs in MAY_IMPORT.items() if needs <= done} - done
        assert ready, f"a cycle among {MAY_IMPORT.keys() - done}"
        done |= ready


def test_every_row_is_about_a_module() -> None:
    assert MAY_IMPORT.keys() <= units().keys()


def test_the_walk_sees_every_kind_of_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "ggjac")
    path = tmp_path / "ggjac" / "own" / "module.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import ggjac.a\nfrom ggjac import b, __version__\nfrom ggjac.c.d import e\nimport ggjac, torch\n"
        "def late():\n    from ggjac.f import g\nfrom ggjac.own import x\n"
        "from . import y\nfrom .z import z\nfrom ..h import i\nfrom .. import j\n"
    )
    assert set(imported(path, unit="own")) == {"a", "b", "c", "f", "h", "j"}


def test_analyses_do_not_import_each_other() -> None:
    for path in units()["analysis"]:
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        modules = [node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module]
        assert not [module for module in modules if module.startswith("ggjac.analysis")], path.name


# Files of the planner: each may import those before it.
PLANNER = ("machine", "work", "passes", "memory", "plan", "times")


@pytest.mark.parametrize("name", PLANNER)
def test_the_planner_goes_one_way_too(name: str) -> None:
    tree = ast.parse((PACKAGE / "planner" / f"{name}.py").read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ggjac.planner":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ggjac.planner."):
            found.add(str(node.module).split(".")[2])
    assert found <= set(PLANNER[: PLANNER.index(name)])


HEAVY = ("torch", "numpy", "gguf", "llama_cpp", "scipy", "jaxtyping", "rich", "safetensors")


def loaded(code: str) -> set[str]:
    """Return which of `HEAVY` a fresh interpreter has loaded after running some code."""
    code += f"\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_loads_nothing() -> None:
    assert loaded("import ggjac; dir(ggjac); ggjac.__version__") == set()


def test_reading_a_file_loads_neither_torch_nor_the_gguf_package() -> None:
    assert loaded("import ggjac.gguf, ggjac.gguf.types; ggjac.open_gguf") <= {"numpy"}


def test_tokenizing_loads_no_torch() -> None:
    assert not loaded("import ggjac.tokenizer, ggjac.config") & {"torch", "gguf", "llama_cpp"}


def test_planning_loads_no_torch() -> None:
    assert loaded("import ggjac.planner") == set()  # `ggjac plan --help` answers at once
    assert loaded("import ggjac.planner.bench") <= {"numpy"}


def test_public_names_are_there() -> None:
    for name in ggjac.__all__:
        assert getattr(ggjac, name) is not None
    assert set(dir(ggjac)) == set(ggjac.__all__)
    with pytest.raises(AttributeError, match="module 'ggjac' has no attribute 'nonsense'"):
        _ = ggjac.nonsense
