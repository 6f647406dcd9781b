"""The dense Jacobian, position by position: `y = Σ_i J_i x_i + offset` (Golden, arXiv 2505.24293, eq. 15)."""

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ggjac import runs
from ggjac.jacobian import DetachedJacobian, Progress
from ggjac.jacobian.reconstruction import Reconstruction, reconstruction
from ggjac.results import NO_WORDS, Bars, Plotted, Table, Words
from ggjac.session import Session, numpy


@dataclass(frozen=True)
class Contributions(Plotted):
    """The contribution of each input position to the output, from the dense matrix.

    Attributes:
        terms: `[n, d]`, float64: `J_i x_i`.
        frobenius: `[n]`, float64: `‖J_i‖_F`.
        reconstruction: `‖Σ_i J_i x_i + offset - y‖ / ‖y‖`. The rows of J come from downward sweeps, the output from the
            forward pass, so that this carries the rounding of both.
    """

    terms: Float[Tensor, "n d"]
    frobenius: Float[Tensor, " n"]
    reconstruction: Reconstruction

    def data(self, words: Words = NO_WORDS) -> dict[str, Any]:
        """Return for each position the Frobenius norm of its part, and the length of its contribution."""
        n, d = self.terms.shape
        return {
            "shape": [d, n, d],
            "reconstruction": self.reconstruction.data(),
            "frobenius": float(self.frobenius.norm()),
            "positions": [
                words.here(i)
                | {"frobenius": float(self.frobenius[i]), "contribution_norm": float(self.terms[i].norm())}
                for i in range(n)
            ],
        }

    def _table(self, words: Words) -> Table:
        lengths = {"length": self.terms.norm(dim=1).tolist(), "frobenius": self.frobenius.tolist()}
        return Table(
            "What each position contributes to the output",
            words.at(range(len(self.terms))) | lengths,
            ("length: ‖J_i x_i‖; frobenius: ‖J_i‖_F", f"reconstruction error {self.reconstruction.error:.1e}"),
        )

    def _plot(self, words: Words) -> Bars:
        return Bars(
            "What each position contributes to the output",
            "length ‖J_i x_i‖",
            words.labels(range(len(self.terms))),
            self.terms.norm(dim=1).tolist(),
        )


def dense(
    jacobian: DetachedJacobian,
    sink: Callable[[int, Tensor], None] | None = None,
    *,
    progress: Progress | None = None,
) -> Contributions:
    """Compute the dense Jacobian chunk by chunk; `sink(start, rows [k, n, d])` gets each row once, in order.

    The matrix itself takes `n d²` elements; only a chunk of it exists at a time (`jacobian.chunk_bytes`). `progress` is
    called after each block, with the rows that are done.
    """

    written = 0

    def report(what: str, done: int, total: int, rounds: int = 0) -> None:
        if progress:
            progress(f"rows done {written}/{d}, {what}", done, total)

    n, d = jacobian.in_shape
    terms = torch.zeros(n, d, dtype=torch.float64)
    squared = torch.zeros(n, dtype=torch.float64)
    x = jacobian.x.cpu().double()
    with jacobian.reporting(report):
        for start, part in jacobian.slices():
            wide = part.cpu().double()
            terms[:, start : start + len(part)] = torch.einsum("knd,nd->nk", wide, x)
            squared += wide.square().sum((0, 2))
            if sink:
                sink(start, part)
            written = start + len(part)
            del part, wide  # the rows are freed before the next ones are made
        y = jacobian.output.cpu().double()
        rebuilt = terms.sum(0) + jacobian.offset.cpu().double()
        error = float((rebuilt - y).norm() / y.norm())
        return Contributions(terms, squared.sqrt(), reconstruction(jacobian, error=error))


@contextlib.contextmanager
def saved(session: Session, output: Path) -> Iterator[Callable[[int, Tensor], None]]:
    """Yield a sink for `dense` that streams the matrix to a safetensors file; the file is complete after the block.

    It holds `jacobian` `[d, n, d]`, `x` `[n, d]`, `y` and `offset` `[d]`, and `ids` `[n]`, in float32 or float64.

    Raises:
        RunError: it cannot be written, found out before the work.
    """
    n, d = len(session.ids), session.model.config.d
    kind = "F64" if session.model.dtype == torch.float64 else "F32"
    entries = {
        "jacobian": runs.Entry(kind, (d, n, d)),
        "x": runs.Entry(kind, (n, d)),
        "y": runs.Entry(kind, (d,)),
        "offset": runs.Entry(kind, (d,)),
        "ids": runs.Entry("I64", (n,)),
    }
    runs.check_writable(output, sum(entry.nbytes for entry in entries.values()))
    J = session.jacobian
    with runs.writing_tensors(output, entries, {"ggjac": json.dumps(session.envelope())}) as writer:
        yield lambda start, rows: writer.write("jacobian", numpy(rows), start)
        for name, values in (("x", J.x), ("y", J.output), ("offset", J.offset), ("ids", torch.tensor(J.ids))):
            writer.write(name, numpy(values))
