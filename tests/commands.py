"""Every command that takes a prompt, and what the tests expect of it: a new command is one row of `COMMANDS`.

A row without a plan, a page, or runs on a device turns the tests of these red (`test_commands.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

# The number of sweeps that a plan is made to expect, whatever the spectrum: few, and more down than up.
SWEEPS = ["--tol", "1e-30", "--max-sweeps", 3]
# The same of a rough search and of what follows: two sweeps each.
ROUGH = ["--tol", "1e-30", "--max-sweeps", 4, "--search-dtype", "bfloat16"]
SHORT = ["--top", 2]  # every decoded token costs a row

Options = list[Any]


@dataclass(frozen=True)
class Command:
    """What tests expect of a command.

    Attributes:
        parts: keys that its JSON adds to the envelope.
        words: of its tables, on a file without a tokenizer.
        page: sections of the report of its JSON, and words of each; variants of the command after its options.
        options: with which that JSON is made.
        counted: options of runs that are counted and compared with their own plan, by the name of the variant; in
            place of DIRECTION there is a vector of the model's file.
        device: options of runs on a device that must give the CPU's bits; empty with a reason in `not_on_devices`.
        not_on_devices: why not.
    """

    parts: set[str]
    words: list[str]
    page: dict[str, dict[str, str]]
    counted: dict[str, Options]
    options: list[str] = field(default_factory=list)
    device: list[list[str]] = field(default_factory=lambda: [[]])
    not_on_devices: str = ""


COMMANDS: dict[str, Command] = {
    "analyze": Command(
        {"predictions", "parity", "reconstruction", "svd", "stable_rank", "attribution", "branches"}
        | {"asked", "run_folder"},
        [
            *("Next token", "llama.cpp (as is): agrees", "Reconstruction", "Singular", "Stable rank", "Share of every"),
            "Saved",
        ],
        {
            "": {
                "predict": "[",
                "attribute": "= logit",
                "attribute-branches": "Attention, all blocks",
                "svd": "Stable rank",
                "svd-vectors": "Left vector promotes",
                "svd-per-token": "4 [42]",
                "layers": "Logit lens",
                "layers-stable-rank": "each block alone",
                "contrast": "Ordinary",
            }
        },
        {
            "": ["-k", 2, *SWEEPS, *SHORT, "--no-verify", "-o", "run"],
            "with contrast": ["-k", 2, *SWEEPS, *SHORT, "--no-verify", "-o", "run", "--contrast"],
            "with layers": ["-k", 2, *SWEEPS, *SHORT, "--no-verify", "-o", "run", "--layers", "1,-1"],
        },
        options=["-k", "2", "--per-token", "--contrast", "--layers", "all"],
        device=[["-k", "2", "--no-verify", "-o", "RUN"]],
    ),
    "predict": Command(
        {"predictions"},
        ["Next token", "probability"],
        {"": {"predict": "%"}},
        {"": [], "everywhere": ["--all-positions", "-o", "f"]},
    ),
    "verify": Command(
        {"parity"},
        ["l_out-1", "llama.cpp (as is): agrees"],
        {"": {"verify": "l_out-1", "certificate": "llama.cpp passed agrees"}},
        {"": []},
    ),
    "svd": Command(
        {"reconstruction", "svd"},
        ["converged after", "residual"],
        {
            "--per-token": {"svd": "σ", "svd-vectors": "Left vector promotes", "svd-per-token": "4 [42]"},
            "--position 2": {"svd": "σ", "svd-vectors": "Left vector promotes"},
            "--exclude 0": {"svd": "all positions", "svd-vectors": "Weight at 0"},
        },
        {
            "": ["-k", 2, *SWEEPS, *SHORT],
            "per token": ["-k", 3, *SWEEPS, *SHORT, "--per-token", "--position", 3],
            "per token some": ["-k", 3, *SWEEPS, *SHORT, "--per-token", "--input-position", "0,2,-1"],
            "without some": ["-k", 3, *SWEEPS, *SHORT, "--per-token", "--exclude", "0,2"],
            "per token rough": ["-k", 3, *ROUGH, *SHORT, "--per-token", "--position", 3],
        },
        options=["-k", "2"],
        device=[["-k", "2", "--per-token"]],
    ),
    "jacobian": Command(
        {"jacobian"},
        ["‖J_i‖_F"],
        {"": {"jacobian": "64 × 5 × 64 entries", "certificate": "Reconstruction passed"}},
        {"": [], "mean": ["--mean", "-o", "f"]},
        device=[["-o", "J.safetensors"]],
    ),
    "layers": Command(
        {"reconstruction", "layers"},
        ["From the input to this depth", "Each block alone", "likely tokens"],
        {"": {"layers": "Logit lens", "layers-stable-rank": "each block alone"}},
        {
            "": ["-k", 2, *SWEEPS, *SHORT],
            "some": ["-k", 2, *SWEEPS, *SHORT, "--layers", "0,2", "--kinds", "layer,mlp", "--position", 4],
            "rough": ["-k", 2, *ROUGH, *SHORT, "--layers", "1,-1"],
            "transported": ["-k", 3, *SWEEPS, *SHORT, "--maps", "to_end,cumulative", "--transport"],
            "without one": ["-k", 2, *SWEEPS, *SHORT, "--layers", "1,-1", "--exclude", 0],
            "none": [*SHORT, "--layers", 0, "--maps", "cumulative,blockwise"],
        },
        options=["-k", "2"],
        device=[["-k", "2"]],
    ),
    "ranks": Command(
        {"ranks"},
        ["Stable rank of each prompt", "Stable rank by token index", "all converged"],
        {"": {"ranks": "1 prompt, all converged"}},
        {"": SWEEPS, "rough": ROUGH},
    ),
    "reach": Command(
        {"reconstruction", "reach"},
        ["Error of the predicted output", "no change", "Effect of leaving each token out", "rollout"],
        {"": {"reach": "Passes 10 %"}, "--ablate none": {"reach": "Passes 10 %"}},
        {
            "": ["-k", 1, *SWEEPS],
            "early": ["-k", 2, *SWEEPS, "--position", 2, "--swap", "1=9", "--ablate", "replace"],
            "curves": ["-k", 1, *SWEEPS, "--steps", "0.1,0.5", "--ablate", "none"],
            "along": ["-k", 2, *SWEEPS, "--steps", "0.1", "--ablate", "none", "--direction", "DIRECTION", "--layer", 1],
        },
        options=["-k", "1", "--steps", "0.1,1"],
        device=[],
        not_on_devices="forward-mode differentiation looks past the card's tensors at their storage",
    ),
    "norms": Command(
        {"reconstruction", "norms"},
        ["Longest columns and rows", "‖column‖"],
        {"": {"norms": "Columns"}},
        {"": ["--count", 2], "early": ["--position", 2]},
    ),
    "attribute": Command(
        {"reconstruction", "attribution"},
        ["Share of every input token", "sum"],
        {
            "": {"attribute": "= logit"},
            "--by layer": {"attribute-branches": "MLP, all blocks"},
            "--by head": {"attribute-branches": "L1H0"},
            "--by head --reads L1H0,L0H2": {"attribute-branches": "L1H0", "attribute-reads": "L0H2"},
            "--by head --reads largest": {"attribute-branches": "L1H0", "attribute-reads": "L1H"},
            "--versus 7": {"attribute": "minus that of [7]"},
            "--ablate mean": {"attribute": "Effect"},
            "--exclude 0": {"attribute": "With the excluded tokens"},
            "--exclude 0,2 --mlp-path both": {"attribute": "With the excluded tokens"},
            "--exclude 0 --position all": {"attribute-positions": "Offset"},
            "--position all": {"attribute-positions": "The shares sum to the logit at each position."},
            "--position 1,3": {"attribute-positions": "The shares sum to the logit at each position."},
            "--position all --by layer": {"attribute-positions": "attention"},
            "--by edge": {"attribute-edges": "no sum of others is larger"},
            "--position all --by head": {"attribute-positions": "L1H0"},
            "--direction entropy": {"attribute": "= projection"},
            "--direction entropy --mlp-path both": {"attribute": "mlp-path gate"},
            "--direction fisher:1 --by head": {"attribute-branches": "L1H0"},
            "--max-tokens 3": {"attribute-answer": "The shares sum to the logit of each token."},
            "--max-tokens 2 --exclude 0": {"attribute-answer": "The offset has the excluded position 0."},
            "--max-tokens 3 --by layer": {"attribute-answer": "3 tokens", "attribute-positions": "attention"},
        },
        {
            "": [],
            "early": ["--position", 2],
            "everywhere": ["--position", "all"],
            "some": ["--position", "0,2-3"],
            "some without one": ["--position", "1,2-3", "--exclude", "1"],
            "both rules": ["--mlp-path", "both"],
            "by layer": ["--by", "layer"],
            "ablated": ["--ablate", "mean"],
            "ablated, both rules": ["--ablate", "mean", "--mlp-path", "both"],
            "ablated early": ["--ablate", "replace", "--position", 3],
            "by head": ["--by", "head", "--position", 4],
            "what heads read": ["--by", "head", "--reads", "L1H0,L0H2,L1H3"],
            "by layer everywhere": ["--by", "layer", "--position", "all"],
            "by head everywhere": ["--by", "head", "--position", "all"],
            "by layer some": ["--by", "layer", "--position", "1,-2"],
            "by head some": ["--by", "head", "--position", "1,3"],
            "entropy": ["--direction", "entropy"],
            "entropy by layer": ["--direction", "entropy", "--by", "layer"],
            "by expert": ["--by", "expert", "--position", 4],
            "entropy by expert": ["--direction", "entropy", "--by", "expert"],
            "stream by expert": ["--direction", "DIRECTION", "--layer", 1, "--by", "expert"],
            "by edge": ["--by", "edge", "--position", 4],
            "answer": ["--max-tokens", 4],
            "answer without one": ["--max-tokens", 2, "--exclude", "0"],
            "answer of one": ["--max-tokens", 1, "--versus", 7],
            "answer by head": ["--max-tokens", 3, "--by", "head"],
            "given answer": ["--answer-tokens", ",".join(["7"] * 18)],
        },
        device=[["--by", "head", "--reads", "largest"], ["--position", "all"], ["--max-tokens", "3"]],
    ),
    "attend": Command(
        {"reconstruction", "attend"},
        ["Keys of L", "Pairs in the score", "sum"],
        {"": {"attend": "score"}, "--by token --layer 1 --head 2": {"attend": "4 [42]"}},
        {
            "": ["--layer", 1, "--head", 2],
            "below": ["--layer", 0, "--head", 1, "--query", 3],
            "by token": ["--layer", 1, "--head", 0, "--by", "token", "--key", "all", "--versus", 0],
            "early": ["--layer", 1, "--head", 3, "--query", 2, "--key", 1],
        },
        device=[["--layer", "1", "--head", "2"], ["--layer", "1", "--head", "2", "--by", "token"]],
    ),
    "compare": Command(
        {"compare", "other_model"},
        ["a: ", "Principal angles", "Next token at every position"],
        {
            "": {"compare": "Same top token 100 %", "certificate": "Reconstruction, file b passed"},
            "--with-tokens 5,17,8,42": {
                "compare-prompts": "Next token after a",
                "certificate": "Reconstruction, prompt b passed",
            },
        },
        {
            "": ["-k", 2, *SWEEPS],
            "prompts": ["-k", 2, *SWEEPS, "--with-tokens", "5,17,8,3,7,42,1"],
        },
        options=["-k", "2"],
        device=[["-k", "2"]],
    ),
    "contrast": Command(
        {"reconstruction", "contrast"},
        ["Reconstruction", "detached", "ordinary", "Spearman", "KL divergence"],
        {"": {"contrast": "Ordinary"}},
        {"": [], "early": ["--position", 2]},
        device=[],
        not_on_devices="forward-mode differentiation looks past the card's tensors at their storage",
    ),
    "steer": Command(
        {"steering"},
        ["Next token after the concept", "equation16", "baseline", "control"],
        {
            "": {"steer": "Control 0.5"},
            "--method remove --direction left:1": {"steer-direction": "the frozen map’s prediction"},
        },
        {
            "": ["--concept-tokens", "1,2,3,4", "--max-tokens", 4],
            "additive": ["--concept-tokens", "9,8", "--method", "additive", "--layer", 1, "--max-tokens", 3],
            "much": ["--strength", "0,0.1,0.2", "--no-control", "--max-tokens", 2],
            "once": ["--max-tokens", 1],
            "direction": [*("--method", "add", "--direction", "DIRECTION", "--layer", 1, "--max-tokens", 3), "-q"],
        },
        options=["--strength", "0,0.5", "--max-tokens", "3"],
        device=[["--concept-tokens", "5,6,7"]],
    ),
}


# Every command with its variants, by `attribute --by head`: its further options, and what is on the page of its JSON.
PAGES: dict[str, tuple[list[str], dict[str, str]]] = {
    f"{name} {variant}".strip(): (command.options, page)
    for name, command in COMMANDS.items()
    for variant, page in command.page.items()
}


def of_page(name: str, model: object) -> list[Any]:
    """Return the command line that prints the JSON of one of `PAGES`, on a model without a tokenizer."""
    command, *options = name.split()
    options += with_file(command, model, options)
    return [command, "-m", model, "--tokens", "5,17,3,99,42", "-t", "1", "-q", *options, *PAGES[name][0]]


def with_file(command: str, model: object, options: Sequence[Any] = ()) -> list[Any]:
    """Return the further file that a command must have, unless its options name another prompt."""
    return ["--with", model] if command == "compare" and "--with-tokens" not in options else []
