"""What a reader of results should know of a prompt: where its tokens may not be what was meant."""

from collections.abc import Mapping, Sequence
from itertools import accumulate

from ggjac.model import Model
from ggjac.tokenizer import bos_warning


def remarks(model: Model, ids: Sequence[int], text: str | None) -> list[str]:
    """Return remarks of one line each on a prompt: its ids, and its text if it was given as one."""
    found = [bos_warning(model.tokenizer, ids), _context(model, len(ids))]
    if text is not None:
        found += [_pre_tokenizer(model), _end(model, ids, text)]
    return [remark for remark in found if remark]


def position_remark(model: Model, ids: Sequence[int], position: int) -> str | None:
    """Return a remark where the output position, from 0, is that of EOS; else None."""
    eos = model.tokenizer.eos_id
    if not position or ids[position] != eos:  # some vocabularies begin a prompt with it
        return None
    return (
        f"position {position} is EOS ({model.word(ids[position])}): the model predicts there how another text begins; "
        f"position {position - len(ids) - 1} is the token before it"
    )


def boundary_remark(model: Model, ids: Sequence[int], text: str, answer: Sequence[int], **how: bool) -> str | None:
    """Return a remark where prompt and answer, each tokenized by itself, are not the tokens of both as one text.

    `how` is as `Model.tokenize` takes it.
    """
    try:
        together = model.tokenize(text + model.tokenizer.spell(answer).decode(), **how)
    except UnicodeDecodeError:  # of an answer in token ids: part of a character
        return None
    if together == [*ids, *answer]:
        return None
    both = zip(together, [*ids, *answer], strict=False)
    differs = next((i for i, (a, b) in enumerate(both) if a != b), len(together))
    return (
        "prompt and answer are tokenized each by itself; as one text, as the model knows it, they would be other "
        f"tokens from position {differs} on: where words begin with their spaces, so does an answer"
    )


def token_groups(model: Model, ids: Sequence[int], start: int, said: Mapping[str, str] | None = None) -> list[str]:
    """Return for each token of a prompt and its answer what it belongs to.

    It is `first`, the first position, whatever its token; `special`, tokens of the prompt that are not text; `answer`;
    and all others are the `prompt`. Of a conversation that a chat template rendered they are the role whose words they
    are, or else the `template`. Words are found in the text of the tokens; those that stand there never or several
    times are not told apart from the template.

    Args:
        model: whose vocabulary has the ids.
        ids: of the prompt, and after it of the answer.
        start: the number of tokens of the prompt.
        said: what each role says, by its name.
    """
    tokenizer, kinds = model.tokenizer, ("control", "unused", "unknown")
    pieces = [tokenizer.piece(id) for id in ids[:start]]
    text, ends = b"".join(pieces), [*accumulate(map(len, pieces))]
    found = ["template" if said else "prompt"] * start
    for role, words in (said or {}).items():
        spoken = words.strip().encode()
        if not spoken or text.count(spoken) != 1:
            continue
        begin = text.index(spoken)
        for i, (end, piece) in enumerate(zip(ends, pieces, strict=True)):
            inside = min(end, begin + len(spoken)) - max(end - len(piece), begin)
            if 2 * inside >= len(piece) > 0:  # at least half of its bytes
                found[i] = role
    found = ["special" if tokenizer.kind(id) in kinds else group for id, group in zip(ids, found, strict=False)]
    return ["first", *found[1:], *["answer"] * (len(ids) - start)]


def _context(model: Model, n: int) -> str | None:
    if n <= model.trained_context:
        return None
    return f"the prompt has {n} tokens; the model was trained on {model.trained_context} at most"


def _pre_tokenizer(model: Model) -> str | None:
    """Repeat llama.cpp's warning on files that do not say how text is split before it is tokenized."""
    metadata = model.gguf.metadata
    pre = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or pre not in (None, "", "default"):
        return None
    found = (
        "has no tokenizer.ggml.pre" if not pre else "names no pre-tokenizer of its own (tokenizer.ggml.pre: default)"
    )
    return (
        f"the file {found}: llama.cpp splits text by its default rules, and the tokens may not be those that the model "
        "was trained with; take a newer conversion of the model"
    )


def _end(model: Model, ids: Sequence[int], text: str) -> str | None:
    """Notice an EOS that was left off, unless one was written, and a lone space."""
    tokenizer = model.tokenizer
    if tokenizer.adds_eos and tokenizer.eos_id is not None and ids[-1] != tokenizer.eos_id:
        eos = model.word(tokenizer.eos_id)
        return (
            f"this vocabulary ends every text with EOS ({eos}, id {tokenizer.eos_id}), which was left off, since a "
            f"prompt is to be continued; write {eos} at its end to analyse it there"
        )
    if text.endswith(" ") and text.strip() and not tokenizer.name(ids[-1]).strip(b" "):
        return "the prompt ends with a space, which is a token of its own: most words begin with theirs; leave it out"
    return None
