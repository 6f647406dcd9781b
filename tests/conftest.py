"""Fixtures, and run-time checks of every shape annotation in the package.

The hook must be in place before anything imports the package, hence at the import of this file: from here on each
function of `ggjac` is checked by beartype against its annotations, shapes included, also in modules imported later
(typechecking.py says how, and what is left out).
Users pay nothing: the package itself never installs the hook.
"""

import jaxtyping
import typechecking

jaxtyping.jaxtyped = typechecking.jaxtyped  # what the hook puts on every function
jaxtyping.install_import_hook("ggjac", "typechecking.check")

import gc  # noqa: E402
import os  # noqa: E402
import signal  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import tiny  # noqa: E402
import torch  # noqa: E402

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The matrices here are tiny: more threads only wait for one another, and dearly so on a busy machine. In the processes
# that tests start, too.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell's background job ignores Ctrl-C, and so would the processes that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Leave the tests themselves out of every later search for cycles, which took a second over so many objects."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def streamed() -> None:
    """Keep no weights ready between sweeps unless a test asks: tests count what is read."""
    from ggjac.model import Model

    Model.keeps_ready = False


@pytest.fixture(autouse=True)
def checked_from_the_first_call() -> None:
    """Check the types of every function anew: those of its first calls in this test."""
    typechecking.start_test()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Return the folder of shared models and reference results, or skip."""
    if not SHARED.is_dir():
        pytest.skip("../shared (real models and the paper's own results) is absent")
    return SHARED


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives the path of a row of `tiny.CASES`, with changes; each is written once.

    `tiny_file("gqa")`, `tiny_file("gqa", tied=True)`, `tiny_file("q8_0", ftype="F32")` (llama.cpp's exact F32 copy).
    """
    folder = tmp_path_factory.mktemp("tiny")
    written: dict[str, Path] = {}

    def get(case: str, *, ftype: str | None = None, **changes: Any) -> Path:
        key = repr((case, ftype, sorted(changes.items())))
        if key not in written:
            source = None if ftype is None else get(case, **changes)
            path = folder / f"{case}-{len(written)}.gguf"
            if source is None:
                written[key] = tiny.write(path, **tiny.resized(case, **changes))
            else:
                written[key] = tiny.quantize(source, path, ftype)
        return written[key]

    return get


@pytest.fixture(scope="session")
def tiny_files(tiny_file: Callable[..., Path]) -> dict[str, Path]:
    """Return the path of every row of `tiny.CASES` (about half a second for all)."""
    return {case: tiny_file(case) for case in tiny.CASES}


@pytest.fixture(scope="module")
def one_llama_cpp() -> Iterator[None]:
    """Let one process of llama.cpp serve every comparison of a module, where to start one each is not the point.

    (That they are independent, and what becomes of one that dies, is for test_llamacpp.py and test_parity.py.)
    """
    from ggjac import parity
    from ggjac.llamacpp import child as llamacpp

    class Kept(llamacpp.Child):
        def __exit__(self, *_: object) -> None:
            """Stay for the next one."""

    running: list[Kept] = []

    def kept() -> Kept:
        if not running or running[-1].closed:  # as after an error
            running.append(Kept())
        return running[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parity, "llamacpp", SimpleNamespace(**vars(llamacpp) | {"Child": kept}))
        yield
    for one in running:
        one.close()
