"""The frame of the page: its title, the certificate, and the tokens of the prompt."""

import shlex
from typing import Any

from ggjac import display
from ggjac.checks import brief
from ggjac.report.numbers import percent
from ggjac.report.schema import (
    HERE,
    MAX_WORDS,
    MODEL,
    RECONSTRUCTION,
    Check,
    Wrong,
    each,
    integer,
    number,
    spelled,
    table,
    text,
)
from ggjac.report.sections.common import SHORT, Run, Section, capital, file_name
from ggjac.report.summary import caveat, sentences
from ggjac.units import counted, duration, matrix_ending, power, size

ANSWERED = 1000  # characters of an answer, or of another prompt, in the title
# Parts that have the seed of their random numbers.
SEEDED = ("svd", "compare", "compare_prompts", "steering", "intervention", "reach")
NAMED = 20  # output positions that the certificate names


def position(value: Any, where: str) -> int | str | list[int]:
    """Accept a position, several of them, or the word for all."""
    if isinstance(value, list):
        return each(integer, least=1)(value, where)
    return "all" if value == "all" else integer(value, where)


#: The required parts of a result about one prompt; one about many prompts (`ranks`) has a model only.
PROMPT: dict[str, Check] = {
    "model": MODEL,
    "tokens": each(spelled(HERE | {"id": integer}), least=1),
}
FORM: dict[str, Check] = {
    "created": text,
    "versions": table(text),
    "platform": text,
    "command": each(text),  # its words
    "prompt": text,  # as it was typed
    "warnings": each(text, most=MAX_WORDS),  # about the prompt
    "warning": text,  # the only one, in results of 0.1.0
    "exclude": each(integer),  # input positions that are in the offset
    "position": position,  # the output position; the last token's where it is missing
    "device": text,
    "dtype": text,
    "mlp_path": text,  # the factor of a gated MLP that is not frozen
    "threads": integer,
    "seconds": table(number),  # by stage
    "peak_memory_bytes": integer,
    "reconstruction": RECONSTRUCTION,
}


def check_position(content: dict[str, Any]) -> None:
    """Check that the output position is one of the prompt's.

    Raises:
        Wrong: it is not.
    """
    position, count = content["position"], len(content["tokens"])
    last = max(position) if isinstance(position, list) else position
    if isinstance(last, int) and count and last >= count:
        raise Wrong(f"position: {last} is beyond the {count} tokens")


def _position(content: dict[str, Any]) -> int:
    """Return the output position: the prompt's last one where several were asked for, or none was saved."""
    given = content["position"]
    return given if isinstance(given, int) else max(0, len(content["tokens"]) - 1)


def _outputs(content: dict[str, Any]) -> list[int]:
    """Return the output positions; none where all were asked for."""
    given = content["position"]
    if given == "all":
        return []
    return given if isinstance(given, list) else [_position(content)]


def _pairs(*rows: tuple[str, str | None]) -> list[tuple[str, str]]:
    """Return the rows that have a value."""
    return [(name, value) for name, value in rows if value]


def _caveat(content: dict[str, Any]) -> str | None:
    """Return what the shares of a run do not say; None where there are none."""
    if content["attribution"]:
        return caveat(content, content["attribution"]["by"])
    return caveat(content) if content["answer"] and content["answer"]["tokens"][0]["groups"] else None


def _joined(tokens: list[dict[str, Any]]) -> str:
    """Return the text that tokens make up."""
    return text(display.joined(tokens), "")


def header(run: Run) -> dict[str, Any]:
    """Prepare the title: the prompt and the token predicted after it, or the number of prompts."""
    c = run.content
    model, tokens, position = c["model"], c["tokens"], _position(c)
    # The prompt as it was typed, if the map reads all of it; else the tokens up to the output position.
    start = c["answer"]["start"] if c["answer"] else position + 1
    whole = (position == len(tokens) - 1 or c["answer"]) and c["prompt"] is not None
    prompt = c["prompt"] if whole else _joined(tokens[:start])
    if not tokens:
        prompt = f"{len(c['ranks']['prompts'])} prompts"
    following = tokens[start:] if c["answer"] else (c["predictions"] or [])[:1]
    other, second = c["other_model"], c["other_prompt"]
    doubts = [*(c["warnings"] or [c["warning"]]), model["warning"], other and other["warning"]]
    doubts += (second and second["warnings"]) or []
    return {
        "prompt": prompt if len(prompt) <= 420 else f"… {prompt[-400:]}",
        "long": len(prompt) > 120,
        "rest": "" if whole or c["answer"] else _joined(tokens[start:])[:200],
        "next": _joined(following)[:ANSWERED],
        "sentences": sentences(c),
        "caveat": _caveat(c),
        "warnings": list(filter(None, doubts)),
        "name": model["name"] or file_name(model),
        "facts": _pairs(
            ("File", file_name(model)),
            ("Compared with", other and file_name(other)),
            ("Compared with", second and (second["prompt"] or _joined(second["tokens"]))[:ANSWERED]),
            ("Architecture", model["architecture"]),
            ("Size", model["bytes"] and size(model["bytes"])),
            ("Tokens", str(len(tokens)) if tokens else None),
            ("Precision", " on ".join(filter(None, (c["dtype"], c["device"])))),
            ("Created", (c["created"] or "").partition("T")[0]),
        ),
        "checks": _checks(c),
        "source": run.source,
    }


# -- certificate -------------------------------------------------------------------------------------------------------


def certificate(run: Run) -> dict[str, Any]:
    """Prepare the checks, and everything needed to repeat the run."""
    c = run.content
    outputs = [str(i) for i in _outputs(c)]
    listed = ", ".join([*outputs[:NAMED], *(["…"] if len(outputs) > NAMED else [])]) or "all"
    seed = next((c[key]["seed"] for key in SEEDED if c[key]), None)
    facts = _pairs(
        ("Precision", c["dtype"]),
        ("Live factor of gated MLPs", c["mlp_path"]),
        ("Output position", listed if c["tokens"] else None),
        ("Excluded inputs", c["exclude"] and brief(c["exclude"])),
        ("Seed", None if seed is None else str(seed)),
        ("Device", c["device"]),
        ("Threads", c["threads"] and str(c["threads"])),
        ("Peak memory, with the cached pages of the file", c["peak_memory_bytes"] and size(c["peak_memory_bytes"])),
        ("Created", (c["created"] or "").replace("T", " ").replace("Z", " UTC")),
        ("Platform", c["platform"]),
        ("Model fingerprint", c["model"]["fingerprint"]),
    )
    seconds = c["seconds"] or {}
    return {
        "checks": _checks(c),
        "facts": facts,
        "versions": sorted((c["versions"] or {}).items()),
        "seconds": [(name, duration(value)) for name, value in seconds.items()],
        "total": duration(sum(seconds.values())) if seconds else None,
        "command": [shlex.quote(word) for word in c["command"] or []],
    }


def _checks(c: dict[str, Any]) -> list[dict[str, Any]]:
    return [*_reconstructions(c), *filter(None, (_parity(c), _convergence(c)))]


def _reconstructions(c: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the health of each computation: two, where two files or two prompts were compared."""
    given = {"Reconstruction": c["reconstruction"] or (c["jacobian"] or {}).get("reconstruction")}
    for part, what in (("compare", "file"), ("compare_prompts", "prompt")):
        both = (c[part] or {}).get("reconstruction") or {}
        given |= {f"Reconstruction, {what} {side}": health for side, health in both.items()}
    return [_reconstruction(name, found, bool(c["exclude"])) for name, found in given.items() if found]


def _reconstruction(name: str, found: dict[str, Any], exclude: bool) -> dict[str, Any]:
    share = (found["offset_norm"] or 0.0) / (found["output_norm"] or 1.0)
    what = "The excluded inputs and any biases" if exclude else "The biases"
    offset = f" {what} contribute an offset of {percent(share)} of ‖y‖." if share else " No biases: the offset is 0."
    if found["healthy"] and found["cancellation"]:
        offset += (
            f" Digits cancel: the residual stream was {found['cancellation']:.0f} times as long before, and rounding "
            "is relative to that."
        )
    return {
        "name": name,
        "state": "pass" if found["healthy"] else "fail",
        "value": power(found["error"]),
        "limit": f"{'at most' if found['healthy'] else 'not at most'} {power(found['limit'])}",
        "says": "‖J x + offset − y‖ ⁄ ‖y‖, a health check of the computation."
        f"{'' if found['offset_norm'] is None else offset}",
    }


def _parity(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["parity"]
    if not found:
        return None
    if found["verdict"] is None:
        return {
            "name": "llama.cpp",
            "state": "none",
            "value": "not compared",
            "limit": "",
            "says": found["reason"] or "",
        }
    kl = found["kl_last"] if found["kl_last"] is not None else found["kl"]
    says = [
        f"{capital(found['reason'])}." if found["reason"] else "",
        "" if kl is None else f"KL divergence {power(kl)} nats.",
        f"Expected: {found['cause']}." if found["cause"] else "",
    ]
    return {
        "name": "llama.cpp",
        "state": "pass" if found["verdict"] else "fail",
        "value": "agrees" if found["verdict"] else "disagrees",
        "limit": "on the file as it is" if found["mode"] == "as is" else found["mode"] or "",
        "says": " ".join(filter(None, says)),
    }


def _convergence(c: dict[str, Any]) -> dict[str, Any] | None:
    found = c["svd"]
    if not found or not found["triplets"]:
        return None
    maps = [found, *([found["whole"]] if found["whole"] else [])]
    triplets = [t for each in maps for t in each["triplets"]]
    residuals = [t["residual"] for t in triplets if t["residual"] is not None]
    converged = all(each["converged"] for each in maps)
    unfinished = any(each["stopped_by"] == "sweeps" for each in maps)
    rough = f" ({found['rough_sweeps']} of them rough)" if found["rough_sweeps"] else ""
    way = "" if found["sweeps"] is None else f" after {counted(found['sweeps'], 'sweep')}{rough}"
    stopped = found["stopped_by"] and f" Stopped by: {found['stopped_by']}."
    if found["method"] == "matrix":
        exact = matrix_ending(found["stopped_by"])
        way, stopped = f": from the whole matrix ({counted(found['sweeps'] or 0, 'sweep')}), {exact}", None
    return {
        "name": "Singular vectors",
        # One that stopped at the precision of its dtype is as good as that allows, not a failure.
        "state": "fail" if unfinished else "pass" if converged else "none",
        "value": power(max(residuals)) if residuals else "–",
        "limit": "" if found["tol"] is None else f"tolerance {power(found['tol'])}",
        "says": f"Largest residual of {len(triplets)} triplets, relative to σ; "
        f"{'converged' if converged else 'not converged'}{way}.{stopped or ''}",
    }


# -- tokens ------------------------------------------------------------------------------------------------------------


def tokens(run: Run) -> dict[str, Any] | None:
    """Prepare the token table."""
    c = run.content
    if not c["tokens"]:
        return None
    read = set(_outputs(c))
    return {
        "rows": [t | {"read": i in read} for i, t in enumerate(c["tokens"])],
        "short": len(c["tokens"]) <= SHORT,
    }


CERTIFICATE = Section(
    "certificate", "Certificate", certificate, "The checks of this run, and everything that is needed to repeat it."
)
TOKENS = Section(
    "tokens", "Tokens", tokens, "The prompt as the model reads it, with spaces and invisible bytes made visible."
)
