"""ggjac: the exact linear map that a GGUF language model applies to one prompt.

    import ggjac

    model = ggjac.open_model("model.gguf")
    trace = model.trace("The capital of France is")
    J = trace.jacobian()      # a LinearOperator, [n, d] -> [d]
    J.svd(rank=8).S

Names are imported when first used, so that `import ggjac` and the commands that need no arithmetic answer at once.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggjac.analysis.attribute import attribute as attribute
    from ggjac.analysis.attribute import attribute_branches as attribute_branches
    from ggjac.analysis.attribute import attribute_positions as attribute_positions
    from ggjac.analysis.compare import compare as compare
    from ggjac.analysis.compare import portray as portray
    from ggjac.analysis.layers import layers as layers
    from ggjac.analysis.per_token import per_token as per_token
    from ggjac.analysis.ranks import token_ranks as token_ranks
    from ggjac.analysis.readability import readability as readability
    from ggjac.analysis.steer import steer as steer
    from ggjac.analysis.svd import spectrum as spectrum
    from ggjac.analysis.svd import stable_rank as stable_rank
    from ggjac.gguf import open_gguf as open_gguf
    from ggjac.jacobian import DetachedJacobian as DetachedJacobian
    from ggjac.linop import LinearOperator as LinearOperator
    from ggjac.model import open_model as open_model
    from ggjac.parity import verify as verify

_HOME = {
    "DetachedJacobian": "ggjac.jacobian",
    "LinearOperator": "ggjac.linop",
    "attribute": "ggjac.analysis.attribute",
    "attribute_branches": "ggjac.analysis.attribute",
    "attribute_positions": "ggjac.analysis.attribute",
    "compare": "ggjac.analysis.compare",
    "layers": "ggjac.analysis.layers",
    "open_gguf": "ggjac.gguf",
    "open_model": "ggjac.model",
    "per_token": "ggjac.analysis.per_token",
    "portray": "ggjac.analysis.compare",
    "readability": "ggjac.analysis.readability",
    "spectrum": "ggjac.analysis.svd",
    "stable_rank": "ggjac.analysis.svd",
    "steer": "ggjac.analysis.steer",
    "token_ranks": "ggjac.analysis.ranks",
    "verify": "ggjac.parity",
}

__all__ = ["__version__", *_HOME]
__version__ = version("ggjac")


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ggjac' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
