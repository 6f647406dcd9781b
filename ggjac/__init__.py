"""ggjac: the exact linear map that a GGUF language model applies to one prompt.

    import ggjac

    model = ggjac.open_model("model.gguf")
    folder = ggjac.analyze(model, "The capital of France is")   # a run folder, with a report

    trace = model.trace("The capital of France is")
    J = trace.jacobian()      # a LinearOperator, [n, d] -> [d]
    ggjac.spectrum(J, rank=8).table(trace)
    ggjac.attribute(J).shares

A question about one prompt takes its Jacobian; `predict`, which needs none, takes the trace, and `analyze`, `ranks`,
`steer` and `verify`, which run texts themselves, the model. Every result has `data()`, which is the JSON of the command
of the same question, and `table()`.

The public names are the lines of `__init__.pyi`. They are imported when first used, so that `import ggjac` and the
commands that need no arithmetic answer at once.
"""

import re
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

_STUB = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
_HOME = {name: home for home, name in re.findall(r"^from (\S+) import (\w+) as \w+$", _STUB, re.MULTILINE)}

__all__ = ["__version__", *_HOME]
__version__ = version("ggjac")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ggjac' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
