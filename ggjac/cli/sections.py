"""The parts that results are made of: each computes one, as plain data for JSON, and shows it as a table."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from ggjac import parity, runs
from ggjac.analysis.attribute import Attribution, attribute
from ggjac.analysis.contrast import Agreement, Contrast, contrast, ordinary_jacobian
from ggjac.analysis.jacobian import contributions
from ggjac.analysis.norms import Norms, norms
from ggjac.analysis.svd import Spectrum, spectrum, stable_rank
from ggjac.cli.render import bar, emit_json, line, numbers, table
from ggjac.cli.session import Session, numpy
from ggjac.planner import work


def predictions(session: Session, top: int) -> list[dict[str, Any]]:
    """Return the most likely next tokens at the session's position."""
    logits = session.logits.cpu().double()
    best = logits.topk(min(top, len(logits)))
    chances = logits.softmax(0)[best.indices]
    return [
        {"id": int(i), "token": session.token(int(i)), "logit": float(z), "probability": float(p)}
        for i, z, p in zip(best.indices, best.values, chances, strict=True)
    ]


def show_predictions(rows: list[dict[str, Any]]) -> None:
    """Print the next-token table."""
    cells = [(r["token"], r["id"], f"{r['logit']:.3f}", f"{r['probability']:.4f}") for r in rows]
    table("Next token", ["token", "#id", "#logit", "#probability"], cells)


def run_parity(session: Session, *, strict: bool, layers: bool) -> parity.Parity:
    """Run llama.cpp on the same tokens; with `layers`, compare every layer in a trace of its own."""
    with session.report.stage("verify") as update:
        steps = iter(range(1, 10))
        return parity.verify(
            session.model,
            session.ids,
            strict=strict,
            prompt=session.text,
            # A trace chooses LongRoPE's factors by its prompt, llama.cpp by its context: then `verify` makes its own.
            trace=None if layers or "rope_factors_long.weight" in session.model.weights else session.trace,
            threads=session.what.threads,
            progress=lambda step: update(step, next(steps), 3),
        )


def parity_data(session: Session, result: parity.Parity) -> dict[str, Any]:
    """Return a parity verdict as plain data."""
    return {
        "verdict": result.verdict,
        "reason": result.reason,
        "mode": result.mode,
        "tolerance": result.tolerance,
        "tokens_equal": result.tokens_equal,
        "top1_equal": result.top1_equal,
        "top1": {
            "id": result.top1,
            "token": session.token(result.top1),
            "rank_in_ours": result.rank,
            "gap": result.gap,
        },
        "kl": result.kl,
        "kl_last": result.kl_last,
        "logits_error": result.logits_error,
        "first_departure": result.first_departure,
        "cause": result.cause,
        "layers": [
            {"name": e.name, "error": e.error, "worst_position": e.position, "worst_error": e.position_error}
            for e in result.layers
        ],
    }


def parity_or_reason(session: Session) -> dict[str, Any]:
    """Compare with llama.cpp as it runs the file; where it cannot run, say why, for that is no verdict on us."""

    def compared() -> dict[str, Any]:
        try:
            return parity_data(session, run_parity(session, strict=False, layers=False))
        except parity.ParityError as error:
            return {"verdict": None, "reason": str(error)}

    return session.remember("parity", compared)


def show_parity(data: dict[str, Any]) -> None:
    """Print the verdict, and the per-layer table where there is one."""
    if data["verdict"] is None:
        line(f"llama.cpp: not compared: {data['reason']}")
        return
    if data["layers"]:
        rows = [
            (e["name"], f"{e['error']:.1e}", e["worst_position"], f"{e['worst_error']:.1e}") for e in data["layers"]
        ]
        columns = ["tensor", "#relative L2", "#worst position", "#error there"]
        limit = float("inf") if data["tolerance"] is None else data["tolerance"]
        departed = {i for i, e in enumerate(data["layers"]) if not e["error"] <= limit}
        table("Every layer against llama.cpp", columns, rows, departed)
    line(f"llama.cpp ({data['mode']}): {'agrees' if data['verdict'] else 'DISAGREES'}: {data['reason']}")
    line(
        f"  top token {data['top1']['token']} ({'the same' if data['top1_equal'] else 'not ours'}), "
        f"KL divergence {data['kl_last']:.2e} nats (mean over positions {data['kl']:.2e}), "
        f"logits relative L2 {data['logits_error']:.2e}"
    )
    if data["cause"]:
        line(f"  expected: {data['cause']}")


def reconstruction(session: Session) -> dict[str, Any]:
    """Push the prompt's own embeddings through the frozen map and compare with the forward pass."""
    with session.report.stage("reconstruction") as update:
        session.jacobian.progress = lambda done, total: update("block", done, total)
        error = session.jacobian.reconstruction_error
    return _reconstruction(session, error)


def _reconstruction(session: Session, error: float) -> dict[str, Any]:
    limit = session.jacobian.reconstruction_limit
    return {
        "error": error,
        "limit": limit,
        "healthy": error <= limit,
        "offset_norm": float(session.jacobian.offset.cpu().double().norm()),
        "output_norm": float(session.jacobian.output.cpu().double().norm()),
    }


def show_reconstruction(data: dict[str, Any]) -> None:
    """Print the reconstruction error."""
    share = data["offset_norm"] / data["output_norm"]
    offset = f"offset {share:.1%} of ‖y‖" if share else "offset 0: no biases on the live path"
    sign, remark = ("<=", "") if data["healthy"] else (">", ": NOT healthy")
    line(f"Reconstruction ‖J x + offset - y‖/‖y‖ = {data['error']:.1e} ({sign} {data['limit']:.0e}{remark}); {offset}")
    line("")


def run_spectrum(session: Session, *, rank: int, top: int, tol: float, seed: int, max_sweeps: int) -> Spectrum:
    """Decompose the Jacobian and decode both ends."""
    J, model = session.jacobian, session.model
    with session.report.stage("svd") as update:
        sweep = 1
        history: list[float] = []

        def advanced(done: int, total: int) -> None:
            nonlocal sweep
            residual = f", worst residual {history[-1]:.1e}" if history else ""
            update(f"sweep {sweep}{residual}, block", done, total, sweeps_left(history, sweep, tol))
            sweep += done == total

        def swept(sweeps: int, worst: float) -> None:
            history.append(worst)

        J.progress = advanced
        return spectrum(
            J, model.head, model.embedding, rank, top=top, tol=tol, seed=seed, max_sweeps=max_sweeps, progress=swept
        )


def sweeps_left(history: list[float], sweep: int, tol: float) -> int:
    """Return how many sweeps are to come after this one: the residual goes on falling as it did, in the mean.

    Before that is known, as many as spectra of models usually take.
    """
    if len(history) < 2 or not 0 < history[-1] < history[0]:
        return max(0, work.EXPECTED_SWEEPS - sweep)
    per_sweep = math.log(history[0] / history[-1]) / (len(history) - 1)
    return max(0, math.ceil(math.log(history[-1] / tol) / per_sweep) - 1)


def spectrum_data(session: Session, result: Spectrum, seed: int, tol: float) -> dict[str, Any]:
    """Return singular values and decoded vectors as plain data."""
    svd, n = result.svd, len(session.ids)
    right = result.right.ids.unflatten(0, (-1, n))
    return {
        "rank": len(svd.S),
        "seed": seed,
        "tol": tol,
        "sweeps": svd.sweeps,
        "converged": svd.converged,
        "stopped_by": svd.reason,
        "triplets": [
            {
                "singular_value": float(svd.S[j]),
                "residual": float(svd.residual[j]),
                "left": [session.token(int(i)) for i in result.left.ids[j]],
                "right": [
                    {
                        "position": i,
                        "token": session.token(session.ids[i]),
                        "weight": float(result.weight[j, i]),
                        "nearest": [session.token(int(t)) for t in right[j, i]],
                    }
                    for i in range(session.position + 1)
                ],
            }
            for j in range(len(svd.S))
        ],
    }


def show_spectrum(data: dict[str, Any], shown_right: int = 3, words: int = 8) -> None:
    """Print singular values with both decodings; of right vectors the positions that weigh most."""
    rows = []
    sigmas = numbers([t["singular_value"] for t in data["triplets"]])
    for j, t in enumerate(data["triplets"]):
        heaviest = sorted(t["right"], key=lambda r: -r["weight"])[:shown_right]
        places = max(len(str(r["position"])) for r in t["right"])
        right = "\n".join(
            f"{r['weight']:>4.0%}  {r['position']:>{places}} {r['token']}: {' '.join(r['nearest'][:3])}"
            for r in heaviest
        )
        rows.append((j, sigmas[j], f"{t['residual']:.0e}", " ".join(t["left"][:words]), right))
    columns = [
        "##",
        "#σ",
        "#residual",
        "left vector: tokens it promotes",
        "right vector: share, position, nearest tokens",
    ]
    table("Singular vectors of the detached Jacobian", columns, rows)
    state = "converged" if data["converged"] else f"NOT converged to {data['tol']:.0e}"
    line(f"{state} after {data['sweeps']} sweeps (stopped by: {data['stopped_by']})")


def stable_rank_data(session: Session, result: Spectrum, seed: int) -> dict[str, Any]:
    """Compute the stable rank beside a spectrum."""
    with session.report.stage("stable rank") as update:
        session.jacobian.progress = lambda done, total: update("block", done, total)
        return asdict(stable_rank(session.jacobian, result.svd, seed=seed))


def show_stable_rank(data: dict[str, Any]) -> None:
    """Print the stable rank with its error bar."""
    bar = f" ± {data['error']:.1g}" if data["error"] else " (exact)"
    line(f"Stable rank ‖J‖²_F/σ₁² = {data['value']:.3f}{bar}; ‖J‖_F = {data['frobenius']:.4g}")
    line("")


def run_attribution(session: Session, target: int | None, versus: int | None = None) -> Attribution:
    """Split a logit over the input positions."""
    with session.report.stage("attribution") as update:
        return attribute(session.jacobian, target, versus, progress=update)


def attribution_data(session: Session, result: Attribution) -> dict[str, Any]:
    """Return the shares of a logit as plain data."""
    return {
        "target": {"id": result.target, "token": session.token(result.target)},
        "versus": None if result.versus is None else {"id": result.versus, "token": session.token(result.versus)},
        "logit": result.logit,
        "softcap": session.model.head.softcap or None,
        "shares": [
            {"position": i, "token": session.token(session.ids[i]), "share": float(share)}
            for i, share in enumerate(result.shares)
        ],
        "offset": result.offset,
        "unexplained": result.unexplained,
    }


def show_attribution(data: dict[str, Any]) -> None:
    """Print the shares with bars, and their sum."""
    largest = max(abs(s["share"]) for s in data["shares"]) or 1.0
    rows: list[tuple] = [
        (
            s["position"],
            s["token"],
            f"{s['share']:+.4f}",
            bar(s["share"], largest),
        )
        for s in data["shares"]
    ]
    rows.append(("", "offset (biases)", f"{data['offset']:+.4f}", ""))
    rows.append(("", "sum", f"{data['logit'] - data['unexplained']:+.4f}", f"logit {data['logit']:.4f}"))
    columns = ["#position", "token", "#share", ""]
    table(f"Exact share of every input token in {asked_logit(data)}", columns, rows)


def asked_logit(data: dict[str, Any]) -> str:
    """Name what was split: a logit, or the difference of two."""
    name = f"the logit of {data['target']['token']}"
    if data["versus"]:
        name += f" less that of {data['versus']['token']}"
    return name + (" before the soft cap" if data["softcap"] else "")


def run_contrast(session: Session, top: int) -> Contrast:
    """Rebuild the output by both Jacobians."""
    with session.report.stage("contrast") as update:
        ordinary = ordinary_jacobian(session.jacobian)
        session.jacobian.progress = ordinary.progress = lambda done, total: update("block", done, total)
        return contrast(session.jacobian, session.model.head, top=top, ordinary=ordinary)


def contrast_data(result: Contrast) -> dict[str, Any]:
    """Return both agreements as plain data."""
    return {"detached": _agreement(result.detached_agreement), "ordinary": _agreement(result.ordinary_agreement)}


def _agreement(found: Agreement) -> dict[str, Any]:
    return {
        "error": found.relative_l2,
        "std_ratio": found.std_ratio,
        "std_ratio_output": found.std_ratio_output,
        "max_abs": found.max_abs,
        "pearson": found.pearson,
        "spearman": found.spearman,
        "top1": found.top1,
        "top": found.k,
        "top_agreement": found.top_k,
        "kl": found.kl,
    }


def contrast_tensors(session: Session, result: Contrast) -> dict[str, torch.Tensor]:
    """Return the saved tensors of a contrast: what either linear map makes of the input, `[d]` each."""
    J = session.jacobian
    return {"linear_output": J.linear_output, "ordinary_output": result.ordinary.to(J.linear_output.dtype)}


def show_contrast(data: dict[str, Any]) -> None:
    """Print every measure for both reconstructions."""
    measures: dict[str, Callable[[dict[str, Any]], str]] = {
        "‖r - y‖/‖y‖": lambda a: f"{a['error']:.2e}",
        "std(r - y)/std(r)": lambda a: f"{a['std_ratio']:.2e}",
        "std(r - y)/std(y)": lambda a: f"{a['std_ratio_output']:.2e}",
        "max |r - y|": lambda a: f"{a['max_abs']:.2e}",
        "Pearson correlation": lambda a: f"{a['pearson']:.6f}",
        "Spearman correlation": lambda a: f"{a['spearman']:.6f}",
        "after the head: same top token": lambda a: "yes" if a["top1"] else "no",
        f"after the head: shared among the top {data['detached']['top']}": lambda a: f"{a['top_agreement']:.0%}",
        "after the head: KL divergence, nats": lambda a: f"{a['kl']:.2e}",
    }
    rows = [(name, shown(data["detached"]), shown(data["ordinary"])) for name, shown in measures.items()]
    table("Output y rebuilt: detached r = J x + offset, ordinary r = (∂y/∂x) x", ["", "#detached", "#ordinary"], rows)
    line("")


def run_norms(session: Session, count: int, top: int) -> Norms:
    """Measure and decode columns and rows."""
    J, model = session.jacobian, session.model
    with session.report.stage("norms") as update:
        J.progress = lambda done, total: update("block", done, total)
        return norms(J, model.head, model.embedding, count, column_words=top, row_words=max(1, top // 2))


def norms_data(session: Session, result: Norms) -> dict[str, Any]:
    """Return the longest columns and rows of every position that has influence, as plain data."""

    def longest(i: int, lengths: torch.Tensor, components: torch.Tensor, words: torch.Tensor) -> list[dict[str, Any]]:
        return [
            {"component": int(c), "norm": float(lengths[i, c]), "tokens": [session.token(int(w)) for w in decoded]}
            for c, decoded in zip(components[i], words.unflatten(0, components.shape)[i], strict=True)
        ]

    return {
        "positions": [
            {
                "position": i,
                "token": session.token(session.ids[i]),
                "columns": longest(i, result.columns, result.longest_columns, result.column_tokens.ids),
                "rows": longest(i, result.rows, result.longest_rows, result.row_tokens.ids),
            }
            for i in range(session.position + 1)
        ]
    }


def show_norms(data: dict[str, Any]) -> None:
    """Print the longest columns and rows of every position."""
    entries = [(p, column, row) for p in data["positions"] for column, row in zip(p["columns"], p["rows"], strict=True)]
    columns, rows = (numbers([entry[side]["norm"] for entry in entries]) for side in (1, 2))
    cells = [
        (p["position"], p["token"], c, " ".join(column["tokens"]), r, " ".join(row["tokens"]))
        for (p, column, row), c, r in zip(entries, columns, rows, strict=True)
    ]
    headings = ["#position", "token", "#‖column‖", "tokens it promotes", "#‖row‖", "nearest tokens"]
    table("Longest columns and rows of the dense detached Jacobian", headings, cells)


def tensors(result: Spectrum) -> dict[str, torch.Tensor]:
    """Return the saved tensors of an SVD: U [k, d], S [k], Vh [k, n, d], residual [k]."""
    return {"U": result.svd.U, "S": result.svd.S, "Vh": result.svd.Vh, "residual": result.svd.residual}


def dense(session: Session, output: Path | None) -> dict[str, Any]:
    """Compute the dense Jacobian, streaming it to `output` where one is given."""
    n, d = len(session.ids), session.model.config.d
    kind = "F64" if session.model.dtype == torch.float64 else "F32"
    entries = {
        "jacobian": runs.Entry(kind, (d, n, d)),
        "x": runs.Entry(kind, (n, d)),
        "y": runs.Entry(kind, (d,)),
        "offset": runs.Entry(kind, (d,)),
        "ids": runs.Entry("I64", (n,)),
    }
    if output:  # before the work, not after it
        runs.check_writable(output, sum(entry.nbytes for entry in entries.values()))
    J = session.jacobian
    written = 0
    with contextlib.ExitStack() as stack:
        update = stack.enter_context(session.report.stage("jacobian"))
        provenance = {"ggjac": json.dumps(session.envelope())}
        writer = stack.enter_context(runs.writing_tensors(output, entries, provenance)) if output else None

        def sink(start: int, rows: torch.Tensor) -> None:
            nonlocal written
            if writer:
                writer.write("jacobian", numpy(rows), start)
            written = start + len(rows)

        J.progress = lambda block, blocks: update(f"rows done {written}/{d}, block", block, blocks)
        result = contributions(J, sink)
        if writer:
            for name, values in (("x", J.x), ("y", J.output), ("offset", J.offset), ("ids", torch.tensor(J.ids))):
                writer.write(name, numpy(values))
    return {
        "shape": [d, n, d],
        "reconstruction": _reconstruction(session, result.reconstruction_error),
        "frobenius": float(result.frobenius.norm()),
        "positions": [
            {
                "position": i,
                "token": session.token(session.ids[i]),
                "frobenius": float(result.frobenius[i]),
                "contribution_norm": float(result.terms[i].norm()),
            }
            for i in range(n)
        ],
    }


def show_dense(data: dict[str, Any]) -> None:
    """Print what each position contributes, and the reconstruction error of the dense matrix."""
    columns = ["#position", "token", "#‖J_i‖_F", "#‖J_i x_i‖"]
    positions = data["positions"]
    norms = (numbers([p[key] for p in positions]) for key in ("frobenius", "contribution_norm"))
    rows = zip((p["position"] for p in positions), (p["token"] for p in positions), *norms, strict=True)
    table(f"Dense detached Jacobian {' x '.join(map(str, data['shape']))}", columns, rows)
    line(f"‖J‖_F = {data['frobenius']:.4g}")
    show_reconstruction(data["reconstruction"])


def finish(
    session: Session,
    content: dict[str, Any],
    output_format: str,
    output: Path | None = None,
    **show: Callable[[Any], None],
) -> None:
    """Print a command's result, as JSON with its provenance or as tables, and exit with code 3 if a check failed.

    Args:
        session: whose result it is.
        content: the result's parts by name.
        output_format: `json` or `table`.
        output: where tensors were saved, if anywhere.
        show: what prints the part of that name, in this order; a reconstruction comes first.
    """
    if output_format == "json":
        emit_json(session.envelope() | content)
    else:
        session.show_tokens()
        if "reconstruction" in content:
            show_reconstruction(content["reconstruction"])
        for name, show_part in show.items():
            show_part(content[name])
        session.show_saved(output)
    if failed(content):
        click.get_current_context().exit(3)


def failed(content: dict[str, Any]) -> bool:
    """Tell whether a check of a result fell outside its tolerance.

    An SVD that stopped at its dtype's own precision is no failure: it is as good as the dtype allows, and says so.
    """
    svd = content.get("svd", {})
    rebuilt = (content, content.get("jacobian", {}))
    swept = (svd, *svd.get("per_token", ()), content.get("layers", {}))
    return (
        content.get("parity", {}).get("verdict") is False
        or not all(part.get("reconstruction", {}).get("healthy", True) for part in rebuilt)
        or any(part.get("stopped_by") == "sweeps" for part in swept)
    )
