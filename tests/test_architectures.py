"""Every architecture of llama.cpp is supported, or refused by its name with the reason."""

from importlib.metadata import version
from pathlib import Path

import llama_cpp
import pytest

from ggjac.architectures import ARCHITECTURES
from ggjac.config import others

# llama.cpp offers no list of its names; this one was copied from its sources.
SOURCE, *NAMES = (Path(__file__).parent / "data" / "llamacpp_architectures.txt").read_text("utf-8").splitlines()


def test_the_list_of_names_is_that_of_the_installed_llama_cpp() -> None:
    installed = version("llama-cpp-python")
    assert f"llama-cpp-python {installed}:" in SOURCE, f"copy LLM_ARCH_NAMES of llama-cpp-python {installed} anew"
    library = next((Path(llama_cpp.__file__).parent / "lib").glob("libllama.*")).read_bytes()
    assert not [name for name in NAMES if name.encode() + b"\0" not in library]


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_of_llama_cpp_is_supported_or_refused_with_a_reason(name: str) -> None:
    tables = [table for table in (ARCHITECTURES, others.ARCHITECTURES, others.LEFT_OUT) if name in table]
    assert len(tables) == 1, f"{name} is in {len(tables)} tables, not one"


def test_no_row_is_of_an_unknown_name() -> None:
    assert not {*ARCHITECTURES, *others.LEFT_OUT} - set(NAMES)
