"""A run folder with everything a report can show, of plausible shape, its tokens from many scripts and from enemies."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from ggjac.report import page
from ggjac.report.load import checked
from ggjac.report.sections.common import Run

HOSTILE = [
    "<script>window.hit=1</script>",
    "</script><img src=x onerror=window.hit=1>",
    '"><svg onload=window.hit=1>',
    "' autofocus onfocus=window.hit=1 '",
    "</title></style><b>",
    "{{ 7 * 7 }}{% raw %}",
    "&lt;&amp;",
    "<!--",
    "]]>",
    "$x^2$",
    "\\u003c",
    "__proto__",
]
SCRIPTS = ["桥", "جسر", "גשר", "पुल", "สะพาน", "мост", "다리", "❤", "<0xE2>", "\\n", "␣␣", "naïve", "x" * 60]
WORDS = [
    f"␣{word}"
    for word in ("Golden", "Bridge", "north", "Marin", "bread", "snow", "Oslo", "Lima", "tower", "the", "of", "is")
]
TOKENS = WORDS + SCRIPTS + HOSTILE
VECTORS = ("y", "offset", "linear_output", "ordinary_output")


def token(id: int) -> dict[str, Any]:
    """Return a token as `run.json` has one, by how it is shown."""
    special = {"<0xE2>": {"text": "\ufffd", "bytes": "e2"}, "\\n": {"text": "\n"}}
    shown = TOKENS[id]
    return {"id": id} | special.get(shown, {"text": shown.replace("␣", " ")})


def full(*, blocks: int = 6, rank: int = 5, d: int = 64, prompt: int = 8, seed: int = 0) -> tuple[dict, dict]:
    """Return `run.json` with every part, and the vectors of `tensors.safetensors`."""
    random = np.random.default_rng(seed)
    some = lambda count: [token(int(i)) for i in random.choice(len(TOKENS), count, replace=False)]  # noqa: E731
    own = np.random.default_rng(seed + 2)  # so that what was there before stays as it was
    others = lambda count: [token(int(i)) for i in own.choice(len(TOKENS), count, replace=False)]  # noqa: E731
    ids = [int(i) for i in random.integers(0, len(TOKENS), prompt)]
    prompt_tokens = [{"position": i} | token(id) for i, id in enumerate(ids)]
    sigmas = [float(v) for v in 40 * np.exp(-0.7 * np.arange(rank))]
    shares = [float(v) for v in random.normal(size=prompt)]
    y = random.normal(size=d)
    offset = 0.01 * random.normal(size=d)

    def triplets() -> list[dict[str, Any]]:
        return [
            {"singular_value": s, "residual": 10.0 ** -(3 + j), "left": some(6)} for j, s in enumerate(sigmas)
        ]  # fmt: skip

    content = {
        "schema_version": 2,
        "created": "2026-01-02T03:04:05Z",
        "versions": {"ggjac": "0.1.0", "torch": "2.13.0", "python": "3.11.7"},
        "platform": "Linux-6.1-x86_64",
        "command": ["ggjac", "analyze", "-p", "The bridge's <b>end</b>", "-k", str(rank)],
        "model": {
            "path": "/home/somebody/models/tiny.gguf",
            "name": "Tiny <b>model</b>",
            "architecture": "llama",
            "bytes": 3740224,
            "fingerprint": "sampled-sha256:" + "ab" * 32,
        },
        "prompt": "The bridge's <b>end</b> & the",
        "tokens": prompt_tokens,
        "warnings": ["the model expects <s> first"],
        "position": prompt - 1,
        "device": "cpu",
        "dtype": "float32",
        "mlp_path": "up",
        "threads": 2,
        "seconds": {"trace": 0.074, "svd": 75.2},
        "peak_memory_bytes": 297029632,
        "predictions": [token(i) | {"logit": 12.5 - i, "probability": 0.9 / (i + 1) ** 3} for i in range(5)],
        "parity": {
            "verdict": True,
            "reason": "same top token, logits within 6.2e-03 relative L2",
            "mode": "as is",
            "tokens_equal": True,
            "top1_equal": True,
            "top1": token(0) | {"rank_in_ours": 1, "gap": 0.0},
            "kl": 2e-5,
            "kl_last": 7.8e-6,
            "logits_error": 6.2e-3,
            "first_departure": None,
            "cause": "llama.cpp rounds activations",
            "tolerance": 2e-3,
            "layers": [
                {"name": f"l_out-{i}", "error": 10.0 ** (i - 7), "worst_position": i, "worst_error": 10.0 ** (i - 6)}
                for i in range(blocks)
            ],
        },
        "reconstruction": {
            "error": 3.1e-7,
            "limit": 1e-5,
            "healthy": True,
            "offset_norm": float(np.linalg.norm(offset)),
            "output_norm": float(np.linalg.norm(y)),
        },
        "svd": {
            "rank": rank,
            "seed": 4,
            "tol": 1e-3,
            "sweeps": 9,
            "converged": True,
            "stopped_by": "tolerance",
            "triplets": [
                {
                    "singular_value": s,
                    "residual": 3.6e-6,
                    "left": some(8),
                    "right": [
                        t | {"weight": float(w), "nearest": some(8)}
                        for t, w in zip(prompt_tokens, random.dirichlet(np.ones(prompt) / 3), strict=True)
                    ],
                }
                for s in sigmas
            ],
            "per_token": [
                t
                | {
                    "sweeps": 9,
                    "converged": t["position"] != 2,
                    "stopped_by": "tolerance",
                    "triplets": [
                        {
                            "singular_value": s / (1 + t["position"]),
                            "residual": 1e-4,
                            "left": others(8),
                            "right": others(8),
                        }
                        for s in sigmas
                    ],
                }
                for t in prompt_tokens
            ],
        },
        "stable_rank": {"value": 12.353, "error": 0.25, "frobenius": 153.2},
        "attribution": {
            "target": token(0),
            "logit": sum(shares) + 0.5,
            "softcap": 30.0,
            "shares": [t | {"share": share} for t, share in zip(prompt_tokens, shares, strict=True)],
            "offset": 0.5,
            "unexplained": 0.0,
            "positions": by_token(ids),
        },
        "layers": {
            "taps": [
                {
                    "map": map,
                    "kind": kind,
                    "index": index,
                    "stable_rank": {"value": float(random.uniform(1, 90)), "error": 0.5 * (kind == "mlp")},
                    "triplets": triplets(),
                }
                for map in ("cumulative", "blockwise", "to_end")
                for kind in ("layer", "attn", "mlp")
                for index in range(1, blocks + 1)
            ],
            "readout": [
                {"index": i, "top": [t | {"probability": 0.5 / (j + 1)} for j, t in enumerate(some(5))]}
                for i in range(blocks + 1)
            ],
            "ranks": {
                "tokens": [token(i) for i in range(len(TOKENS))],
                "depths": [
                    {"index": i, "ranks": [int(r) for r in 1 + random.permutation(900)[: len(TOKENS)]]}
                    for i in range(blocks + 1)
                ],
            },
            "path": [{"index": i, "values": [(i / blocks) ** 2, (i / blocks) ** 0.5]} for i in range(1, blocks + 1)],
        },
        "contrast": {
            name: {
                "error": error,
                "std_ratio": error,
                "std_ratio_output": error,
                "max_abs": error,
                "pearson": 1 - error / 4,
                "spearman": 1 - error / 3,
                "top1": error < 1,
                "top": 10,
                "top_agreement": 0.3,
                "kl": error,
            }
            for name, error in (("detached", 3e-7), ("ordinary", 1.3))
        },
    }
    content |= more(blocks=blocks, rank=rank, prompt=prompt, ids=ids)
    rebuilt = y - offset + 1e-7 * random.normal(size=d)
    vectors = dict(zip(VECTORS, (y, offset, rebuilt, 0.4 * y + random.normal(size=d)), strict=True))
    return content, {name: vector.astype(np.float32) for name, vector in vectors.items()}


def more(*, blocks: int, rank: int, prompt: int, ids: list[int], heads: int = 4, seed: int = 1) -> dict[str, Any]:
    """Return the parts that `analyze` does not compute, or not always, as the commands print them."""
    random = np.random.default_rng(seed)
    some = lambda count: [token(int(i)) for i in random.choice(len(TOKENS), count, replace=False)]  # noqa: E731
    normal = lambda: float(random.normal())  # noqa: E731
    at = [{"position": i} | token(id) for i, id in enumerate(ids)]

    def steered(strength: float) -> dict[str, Any]:
        words = some(5)
        return {
            "strength": strength,
            "text": "".join(t["text"] for t in words),
            "tokens": words,
            "kl_first": strength**2,
            "concept_mass_first": strength / 2,
            "concept_hits": round(4 * strength),
            "direction_norm": 10 * strength,
        }

    def measured() -> dict[str, Any]:
        count = int(random.integers(2, 6))
        return {
            "schema_version": 2,
            "prompt": "".join(t["text"] for t in some(count)),
            "joint": {"value": 4.5, "error": 0.25, "frobenius": 9.0},
            "tokens": [
                {"position": i}
                | t
                | {"stable_rank": {"value": 1 + 3 * float(random.random()), "error": 0.0, "frobenius": 5.0}}
                for i, t in enumerate(some(count))
            ],
            "next": some(1)[0] | {"logit": 9.0, "probability": 0.5},
            "reconstruction": {"error": 1e-7, "limit": 1e-5, "healthy": True, "offset_norm": 0.0, "output_norm": 1.0},
            "stopped_by": "tolerance",
        }

    prompts = [measured() for _ in range(7)]
    ranks = [[p["tokens"][i]["stable_rank"]["value"] for p in prompts if i < len(p["tokens"])] for i in range(5)]
    health = {"error": 2e-7, "limit": 1e-5, "healthy": True}
    return {
        "branches": branches(blocks=blocks, heads=heads, seed=seed),
        "norms": {
            "positions": [
                p
                | {
                    side: [{"component": j, "norm": 9.0 / (j + 1), "tokens": some(4)} for j in range(3)]
                    for side in ("columns", "rows")
                }
                for p in at
            ]
        },
        "jacobian": {
            "shape": [64, prompt, 64],
            "frobenius": 77.5,
            "reconstruction": health | {"offset_norm": 0.0, "output_norm": 1.0},
            "positions": [p | {"frobenius": 5 + abs(normal()), "contribution_norm": 1 + abs(normal())} for p in at],
        },
        "ranks": {
            "prompts": prompts,
            "by_position": [
                {
                    "position": i,
                    "prompts": len(values),
                    "mean": float(np.mean(values)),
                    "error": 0.1 if len(values) > 1 else None,
                    "median": float(np.median(values)),
                    "least": min(values),
                    "most": max(values),
                }
                for i, values in enumerate(ranks)
                if values
            ],
        },
        "other_model": {"path": "C:\\models\\tiny-q4_k_m.gguf", "name": None, "architecture": "llama", "bytes": 1200},
        "compare": {
            "rank": rank,
            "tol": 1e-3,
            "seed": 4,
            "singular_values": [{"a": 40.0 / (j + 1), "b": 41.0 / (j + 1), "residual": 1e-4} for j in range(rank)],
            "converged": False,
            "angles": {"left": [9.0 - j / 2 for j in range(rank)], "right": [7.0 - j / 2 for j in range(rank)]},
            "output_distance": 0.0123,
            "target": token(0),
            "logit": {"a": 12.5, "b": 12.25},
            "offset": {"a": 0.5, "b": 0.25},
            "softcap": None,
            "shares": [p | {"a": normal(), "b": normal()} for p in at],
            "positions": [
                p | {"kl": 10.0 ** -(1 + i % 5), "top1": {"a": some(1)[0], "b": some(1)[0]}, "same_top1": i % 3 > 0}
                for i, p in enumerate(at)
            ],
            "kl": 0.0321,
            "mean_kl": 0.0045,
            "top1_agreement": 0.625,
            "reconstruction": {"a": health, "b": health | {"healthy": False, "error": 0.25}},
        },
        "other_prompt": {
            "prompt": "Another <b>prompt</b>",
            "tokens": at[:3],
            "warnings": ["another warning"],
            "position": 2,
        },
        "compare_prompts": {
            "rank": rank,
            "tol": 1e-3,
            "seed": 4,
            "singular_values": [{"a": 30.0 / (j + 1), "b": 31.0 / (j + 1), "residual": 1e-4} for j in range(rank)],
            "converged": True,
            "angles": {"left": [80.0 - j for j in range(rank)], "right": [70.0 - j for j in range(rank)]},
            "weight": {"a": 0.6, "b": 0.5},
            "output_distance": 0.5,
            "target": token(0),
            "versus": token(1),
            "logit": {"a": 2.5, "b": -1.25},
            "offset": {"a": 0.5, "b": 0.25},
            "embedding": {"a": 0.125, "b": 0.125},
            "blocks": [
                {"block": i, "mixer": "mamba", "attn": {"a": 0.5 * i, "b": -0.25 * i}, "mlp": {"a": 0.1, "b": 0.2}}
                for i in range(blocks)
            ],
            "bias": {"a": 0.0, "b": 0.0},
            "shares": [
                {
                    "a": None if i == 1 else p | {"share": 1.5 - i},
                    "b": None if i == 2 else p | {"share": 0.25 * i},
                }
                for i, p in enumerate(at[:4])
            ],
            "positions": [
                {"a": p, "b": p, "kl": 0.5 * i, "top1": {"a": token(2), "b": token(3)}, "same_top1": i == 0}
                for i, p in enumerate(at[:2])
            ],
            "kl": 3.5,
            "next": {side: [token(id) | {"probability": 0.5, "other": 0.001}] for side, id in (("a", 4), ("b", 5))},
            "reconstruction": {"a": health, "b": health},
        },
        "intervention": {
            "method": "remove",
            "direction": "left:1 of <i>file</i>",
            "layer": 3,
            "blocks": blocks,
            "seed": 6,
            "generated": True,
            "positions": [p | {"component": 1.5 + i, "length": 20.0} for i, p in enumerate(at[:3])],
            "target": token(6),
            "baseline": {"logit": 12.0, "probability": 0.5, "text": "a <b>baseline</b>", "top": [], "tokens": []},
            "edited": [
                {
                    "strength": strength,
                    "change": 3 * strength,
                    "kl": 2.5 * strength,
                    "logit": 12 - 4 * strength,
                    "probability": 0.25,
                    "text": f"an <b>edited</b> text {strength}",
                    "top": [token(1) | {"probability": 0.5}],
                    "tokens": [token(1)],
                    "predicted": {"logit": 12 - 3 * strength, "kl": 0.1, "error": 0.75},
                    "random": {"kl": [0.125, 0.5, 4.0], "logit": [11.0, 11.5, 13.0], "at_least": 1},
                }
                for strength in (0.5, 1.0)
            ],
        },
        "steering": {
            "method": "equation16",
            "layer": 4,
            "changed_after_blocks": 4,
            "blocks": blocks,
            "seed": 5,
            "concept": {
                "text": "The <i>bridge</i>",
                "tokens": [token(id) for id in ids[:3]],
                "top": [t | {"probability": 0.5 / (i + 1)} for i, t in enumerate(some(4))],
            },
            "baseline": steered(0.0),
            "steered": [steered(0.25), steered(0.5)],
            "controls": [steered(0.125), steered(0.375)],
        },
    }


def branches(*, blocks: int, heads: int, seed: int = 1, **entry: Any) -> dict[str, Any]:
    """Return the shares of blocks and heads in a logit, as `attribute --by head` (or, of no heads, `layer`) prints."""
    random = np.random.default_rng(seed)
    parts: dict[str, Any] = {"embedding": 0.5, "blocks": [], "bias": 0.25}
    for block in range(blocks):
        shares = [float(share) for share in random.normal(size=heads) ** 3]
        attn = sum(shares) + 0.125 if heads else float(random.normal())
        parts["blocks"].append({"block": block, "attn": attn, "mlp": float(random.normal())})
        if heads:
            parts["blocks"][-1] |= {"heads": shares, "attn_bias": 0.125}
    logit = 0.75 + sum(block["attn"] + block["mlp"] for block in parts["blocks"])
    whose = {"by": "head" if heads else "layer", "position": 7} | token(9) | {"target": token(0), "versus": None}
    return whose | {"logit": logit, "softcap": None} | parts | {"unexplained": 0.0} | entry


def by_token(ids: list[int], seed: int = 2) -> list[dict[str, Any]]:
    """Return the shares in the logits of all positions: what `attribute --position all` prints."""
    random = np.random.default_rng(seed)
    found = []
    for position, id in enumerate(ids):
        shares = [float(share) for share in random.normal(size=position + 1)]
        found.append(
            {"by": "token", "position": position}
            | token(id)
            | {
                "target": token(int(random.integers(len(TOKENS)))),
                "versus": None,
                "logit": sum(shares) + 0.5,
                "softcap": None,
                "shares": [{"position": i} | token(ids[i]) | {"share": share} for i, share in enumerate(shares)],
                "offset": 0.5,
                "unexplained": 0.0,
            }
        )
    return found


def run_json() -> dict[str, Any]:
    """Return `run.json` with every part."""
    return full()[0]


def at(content: dict, path: str, value: Any) -> dict:
    """Return a run with one place changed; `...` removes it."""
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = content
    for key in keys:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return content


def write(folder: Path, content: Any = None, vectors: dict[str, np.ndarray] | None = None) -> Path:
    """Write a run folder: the full one, or with other contents."""
    whole, all_vectors = full()
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(whole if content is None else content), encoding="utf-8")
    save_file(all_vectors if vectors is None else vectors, folder / "tensors.safetensors")
    return folder


# ---- the page of it

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page read back: every element with its attributes and the text in it; tags must match."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[list[str]] = []
        self._open: list[int] = []
        self.feed(source)
        self.close()
        assert not self._open, [self.elements[i] for i in self._open]

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append([])

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open[-1]][0] == tag
        if tag in ("td", "th", "dt", "dd", "div"):  # what a browser sets apart
            self.handle_data(" ")
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.texts[i].append(data)

    def find(self, tag: str, **attributes: str) -> list[str]:
        """Return the text of every such element, whitespace collapsed."""
        return [
            " ".join("".join(texts).split())
            for (name, found), texts in zip(self.elements, self.texts, strict=True)
            if name == tag and all(value in (found.get(key) or "").split() for key, value in attributes.items())
        ]

    def raw(self, tag: str) -> list[str]:
        """Return the text of every such element as it is."""
        return ["".join(t) for (name, _), t in zip(self.elements, self.texts, strict=True) if name == tag]

    @property
    def text(self) -> str:
        """Return what `body` says, without the script and its data."""
        (body,) = self.raw("body")
        for script in self.raw("script"):
            body = body.replace(script, "")
        return " ".join(body.split())


def rendered(content: dict[str, Any] | None = None, vectors: dict[str, np.ndarray] | None = None) -> str:
    """Return the page of a run."""
    whole, all_vectors = full()
    found = all_vectors if vectors is None else vectors
    return page.render(
        Run(checked(whole if content is None else content), {k: v.astype(np.float64) for k, v in found.items()})
    )
