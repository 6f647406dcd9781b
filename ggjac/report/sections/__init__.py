"""The sections of the page, in their order. Each says what it needs of a run and prepares it for its template.

A section is a function of the run that returns what its template `templates/KEY.html` draws, or None where the run
lacks the data: then the page does without it. Its docstring states the form of the data (`schema` checks it). A new
analysis is a new function in the room of its theme, a row of `SECTIONS` and a template.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ggjac.report.load import Run
from ggjac.report.sections.checks import certificate, parity, scatter
from ggjac.report.sections.depth import grid, stable_rank
from ggjac.report.sections.frame import header, prediction, tokens
from ggjac.report.sections.pushed import steering
from ggjac.report.sections.several import compare, ranks
from ggjac.report.sections.shares import attribution, branches, positions
from ggjac.report.sections.spectra import dense, norms, per_token, spectrum, vectors

__all__ = ["SECTIONS", "Section", "header"]


@dataclass(frozen=True)
class Section:
    """A part of the page: its anchor, its heading, how to read it, and what prepares its data."""

    key: str
    title: str
    build: Callable[[Run], dict[str, Any] | None]
    note: str = ""


SECTIONS = (
    Section("prediction", "Prediction", prediction, "The most likely next tokens, from the model's own forward pass."),
    Section(
        "steering",
        "Steering",
        steering,
        "The prompt continued while another prompt’s linear map, the concept, pushes the stream; beside it what the "
        "model writes unpushed, and pushed at random. Greedy text turns on small differences: mind the numbers, too.",
    ),
    Section(
        "compare",
        "Two files",
        compare,
        "One prompt on two files of one model: how far quantization moves the map, the shares and the predictions.",
    ),
    Section(
        "ranks",
        "Stable rank over prompts",
        ranks,
        "How many directions of its embedding the network uses of each token, by the token's position.",
    ),
    Section(
        "attribution",
        "Attribution",
        attribution,
        "At this prompt the network is exactly a linear map of its input embeddings, so a logit splits into one share "
        "for each input token, without remainder. A share says what a token contributes along the live path; it does "
        "not say what would happen if the token were changed.",
    ),
    Section(
        "branches",
        "Blocks and heads",
        branches,
        "The same logit by where it was written: what the final norm, frozen, and the LM head read from what each "
        "attention head and MLP added to the stream. Point at a cell, or move with the arrow keys, to read it.",
    ),
    Section(
        "positions",
        "Every position",
        positions,
        "Each row splits the logit of one position's own prediction. Point at a cell, or move with the arrow keys, to "
        "read it.",
    ),
    Section(
        "certificate",
        "Certificate",
        certificate,
        "What was checked, and all it takes to make this run again.",
    ),
    Section(
        "spectrum",
        "Singular values",
        spectrum,
        "How strongly the map acts along its leading directions. The stable rank, Σσ² ⁄ σ₀², counts how many "
        "directions it really uses.",
    ),
    Section(
        "vectors",
        "Singular vectors",
        vectors,
        "Each pair reads one direction of the input and writes one direction of the output. A left vector is decoded "
        "to the tokens it promotes; a right vector to the positions that carry it and the embeddings nearest to it "
        "there.",
    ),
    Section(
        "per-token",
        "Position by position",
        per_token,
        "The singular vectors of each position’s own map, which takes the embedding there to the output. The joint "
        "map’s vectors mix positions; these do not.",
    ),
    Section(
        "norms",
        "Long columns and rows",
        norms,
        "A column of the dense map is what one component of an embedding does to the output, a row what one component "
        "of the output reads: the longest of each position, in tokens.",
    ),
    Section(
        "dense",
        "The dense map",
        dense,
        "The parts of the map, one for each position, by their size and by the length of what they add to the output.",
    ),
    Section(
        "layers",
        "Layer by layer",
        grid,
        "Depth runs downwards. Choose a token to pin it and follow its rank through the depths: the place it takes "
        "when the residual stream is read through the final norm and the LM head.",
    ),
    Section(
        "stable-rank",
        "Stable rank by depth",
        stable_rank,
        "How many directions the map uses at each depth: few where the network has made up its mind. Bars are one "
        "standard error, where the value was estimated.",
    ),
    Section(
        "scatter",
        "Reconstruction",
        scatter,
        "Every component of the output against the same component rebuilt by the linear map. The detached Jacobian "
        "reproduces it by construction, up to rounding; the ordinary Jacobian need not.",
    ),
    Section(
        "parity",
        "Against llama.cpp",
        parity,
        "Every tensor of the forward pass against the same tensor of llama.cpp, in the order of computation.",
    ),
    Section("tokens", "Tokens", tokens, "The prompt as the model sees it. Spaces and invisible bytes are shown."),
)
