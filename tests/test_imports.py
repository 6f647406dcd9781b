"""Who may import whom: the house stays a house, and `import ggjac` stays cheap."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ggjac

PACKAGE = Path(ggjac.__file__).parent
TESTS = Path(__file__).parent

# Module (or folder) -> the siblings it may import. Folders are units: what is inside may import its own.
MAY_IMPORT: dict[str, set[str]] = {
    # ground: no sibling
    "sizes": set(),
    "checks": set(),
    "neutral": set(),
    "correlation": set(),
    "display": set(),
    "units": set(),
    "drawing": {"units"},
    "linop": {"sizes"},
    "guard": set(),
    "gguf": {"guard", "sizes"},
    "results": {"drawing"},
    "effects": {"correlation", "results", "shares", "units"},
    # algebra: operators, no transformer
    "svd": {"checks", "linop", "results", "sizes", "units"},
    "frobenius": {"checks", "linop", "results", "sizes", "svd"},
    # files
    "architectures": set(),
    "config": {"architectures", "checks", "sizes"},
    "inventory": {"config", "gguf"},
    "kernels": set(),
    "quants": {"gguf", "kernels"},
    "ways": {"config", "sizes"},
    "division": {"config", "gguf"},
    "weights": {"gguf", "quants", "sizes"},
    "runs": {"gguf", "sizes", "units"},
    "llamacpp": {"runs"},
    "directions": {"checks", "gguf", "quants", "runs"},
    "shares": {"checks", "directions", "display", "results"},
    "exports": {"architectures", "gguf"},
    "tokenizer": {"display", "gguf", "llamacpp"},
    "chat": {"tokenizer"},
    "report": {"checks", "display", "drawing", "runs", "units"},
    # planning: sizes and rates
    "planner": {"checks", "config", "division", "gguf", "linop", "results", "sizes", "units", "ways", "weights"},
    # network: the block algebra, no file layout
    "rope": {"config", "linop"},
    "decode": {"linop", "weights"},
    "blocks": {"config", "linop", "rope", "sizes"},
    "jacobian": {
        *("blocks", "checks", "config", "decode", "directions", "gguf", "linop", "results", "runs", "shares", "sizes"),
        *("svd", "ways", "weights"),
    },
    "calibration": {"checks", "decode", "jacobian", "results", "sizes", "weights"},
    "parallel": {"config", "division", "gguf", "linop", "runs", "weights"},
    "model": {
        *(
            "blocks",
            "chat",
            "checks",
            "config",
            "decode",
            "display",
            "division",
            "gguf",
            "jacobian",
            "parallel",
            "planner",
        ),
        *("results", "rope", "runs", "sizes", "tokenizer", "weights"),
    },
    "prompts": {"model", "tokenizer"},
    "generation": {"blocks", "checks", "model", "sizes"},
    "edits": {"model", "planner", "sizes"},
    "parity": {
        *("architectures", "blocks", "display", "exports", "gguf", "llamacpp", "model", "planner", "results", "runs"),
        "tokenizer",
    },
    "session": {
        *(
            "blocks",
            "calibration",
            "checks",
            "display",
            "generation",
            "gguf",
            "jacobian",
            "model",
            "parity",
            "planner",
            "prompts",
        ),
        *("results", "runs", "sizes", "tokenizer"),
    },
    "analysis": {
        *(
            "blocks",
            "calibration",
            "checks",
            "config",
            "correlation",
            "decode",
            "directions",
            "display",
            "edits",
            "effects",
            "frobenius",
        ),
        *("generation", "gguf", "jacobian", "linop", "model", "parity", "planner", "report"),
        *("results", "runs", "session", "shares", "sizes", "svd", "units", "ways", "weights"),
    },
    "studies": {
        *(
            "analysis",
            "blocks",
            "checks",
            "directions",
            "gguf",
            "guard",
            "jacobian",
            "model",
            "planner",
            "prompts",
            "results",
            "runs",
        ),
        *("session", "sizes"),
    },
}
# The one that may import anything, and that nothing may import.
TOP = "cli"
# Analyses of whole prompts and files, which ask others; all others stand alone.
CONDUCTORS = {"analyze.py", "answer.py", "compare.py", "compare_prompts.py"}


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
        found = [module for module in modules if module.startswith("ggjac.analysis")]
        assert bool(found) == (path.name in CONDUCTORS), path.name


def modules() -> dict[str, Path]:
    """Return every module of the package by its dotted name, but for what only gathers names (`__init__`)."""
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def test_no_circle_of_modules_anywhere() -> None:
    """Inside the folders too, lazy imports included; a folder's name stands for the modules that it exports from."""
    files = modules()
    needs: dict[str, set[str]] = {}
    for name, path in files.items():
        needs[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    needs[name] |= homes(node.module, alias.name, files) - {name}
    done: set[str] = set()
    while len(done) < len(needs):
        ready = {name for name, own in needs.items() if own <= done} - done
        assert ready, f"a circle among {sorted(needs.keys() - done)}"
        done |= ready


def homes(module: str, name: str, files: dict[str, Path]) -> set[str]:
    """Return where a name that is imported from a module, or from a folder, is defined."""
    if f"{module}.{name}" in files:
        return {f"{module}.{name}"}
    if module in files:
        return {module}
    facade = PACKAGE.parent.joinpath(*module.split("."), "__init__.py")
    if not module.startswith("ggjac") or not facade.exists():
        return set()
    for node in ast.walk(ast.parse(facade.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and any(alias.name == name for alias in node.names):
            return homes(node.module, name, files)
    return set()


def test_only_the_command_line_knows_click() -> None:
    for name, path in modules().items():
        if not name.startswith("ggjac.cli"):
            assert "click" not in imports_of(path), name


@pytest.mark.parametrize("folder", ["report", "gguf"])
def test_what_needs_no_torch_imports_none(folder: str) -> None:
    for path in units()[folder]:
        assert not {"torch", "jaxtyping"} & imports_of(path), path


def imports_of(path: Path) -> set[str]:
    """Return the packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


# Commands without a question about a prompt, or whose question has its file elsewhere: see the value.
ELSEWHERE = {
    "models": "inventory",
    "info": "inventory",
    "plan": "planner",
    "bench": "planner",
    "report": "report",
    "verify": "parity",
    "merge": "studies",
}


def test_a_question_has_one_name() -> None:
    """From the command to its analysis and the tests of it; the section and the template are for other tests."""
    from ggjac.cli import COMMANDS

    for name in COMMANDS:
        paths = [PACKAGE / "cli" / f"{name}.py"]
        if name not in ELSEWHERE:
            paths += [PACKAGE / "analysis" / f"{name}.py", TESTS / f"test_{name}.py"]
        missing = [str(path.relative_to(PACKAGE.parent)) for path in paths if not path.exists()]
        assert not missing, f"`ggjac {name}` lacks {', '.join(missing)}"
        assert (PACKAGE / "analysis" / f"{name}.py").exists() == (name not in ELSEWHERE), name


def test_every_question_can_be_asked_in_the_library() -> None:
    for name in (path.stem for path in units()["analysis"] if path.stem != "__init__"):
        assert f"ggjac.analysis.{name}" in ggjac._HOME.values(), f"ggjac/__init__.pyi exports nothing of {name}"


def test_no_test_file_imports_another() -> None:
    """What two of them need is in a file of its own, such as helpers.py."""
    for path in TESTS.glob("*.py"):
        assert not [name for name in imports_of(path) if name.startswith("test_")], path.name


def test_no_function_is_longer_than_80_lines() -> None:
    """Lines of code: without the docstring, comments and blank lines."""
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                start = node.body[1].lineno if ast.get_docstring(node) and len(node.body) > 1 else node.body[0].lineno
                code = [line for line in lines[start - 1 : node.end_lineno] if line.strip() and line.strip()[0] != "#"]
                assert len(code) <= 80, f"{path.relative_to(PACKAGE)}: {node.name} has {len(code)}"


# Files of the planner: each may import those before it.
PLANNER = ("machine", "network", "forward", "work", "passes", "memory", "plan", "times")


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
