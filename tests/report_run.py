"""A run folder with everything a report can show, of plausible shape, its tokens from many scripts and from enemies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

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
    """Return a token as `run.json` names one."""
    return {"id": id, "token": TOKENS[id]}


def full(*, blocks: int = 6, rank: int = 5, d: int = 64, prompt: int = 8, seed: int = 0) -> tuple[dict, dict]:
    """Return `run.json` with every part, and the vectors of `tensors.safetensors`."""
    random = np.random.default_rng(seed)
    some = lambda count: [token(int(i)) for i in random.choice(len(TOKENS), count, replace=False)]  # noqa: E731
    texts = lambda count: [t["token"] for t in some(count)]  # noqa: E731
    ids = [int(i) for i in random.integers(0, len(TOKENS), prompt)]
    prompt_tokens = [{"position": i, "id": id, "text": TOKENS[id]} for i, id in enumerate(ids)]
    sigmas = [float(v) for v in 40 * np.exp(-0.7 * np.arange(rank))]
    shares = [float(v) for v in random.normal(size=prompt)]
    y = random.normal(size=d)
    offset = 0.01 * random.normal(size=d)

    def triplets() -> list[dict[str, Any]]:
        return [
            {"singular_value": s, "residual": 10.0 ** -(3 + j), "left": some(6)} for j, s in enumerate(sigmas)
        ]  # fmt: skip

    content = {
        "schema_version": 1,
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
        "warning": "the model expects <s> first",
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
            "layers": [],
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
                    "left": texts(8),
                    "right": [
                        {"position": i, "token": t["text"], "weight": float(w), "nearest": texts(8)}
                        for i, (t, w) in enumerate(
                            zip(prompt_tokens, random.dirichlet(np.ones(prompt) / 3), strict=True)
                        )
                    ],
                }
                for s in sigmas
            ],
        },
        "stable_rank": {"value": 12.353, "error": 0.25, "frobenius": 153.2},
        "attribution": {
            "target": token(0),
            "logit": sum(shares) + 0.5,
            "softcap": 30.0,
            "shares": [{"position": i, "token": TOKENS[id], "share": shares[i]} for i, id in enumerate(ids)],
            "offset": 0.5,
            "unexplained": 0.0,
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
    rebuilt = y - offset + 1e-7 * random.normal(size=d)
    vectors = dict(zip(VECTORS, (y, offset, rebuilt, 0.4 * y + random.normal(size=d)), strict=True))
    return content, {name: vector.astype(np.float32) for name, vector in vectors.items()}


def write(folder: Path, content: Any = None, vectors: dict[str, np.ndarray] | None = None) -> Path:
    """Write a run folder: the full one, or with other contents."""
    whole, all_vectors = full()
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_text(json.dumps(whole if content is None else content), encoding="utf-8")
    save_file(all_vectors if vectors is None else vectors, folder / "tensors.safetensors")
    return folder
