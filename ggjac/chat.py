"""Conversations as the text that a model was trained on, by the template that its file carries.

A chat template is a program in Jinja, written by a stranger. It runs in Jinja's sandbox, in a process of its own with
little time and memory: `python -m ggjac.chat` reads the template and its variables as JSON, and prints the text.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ggjac.tokenizer import Tokenizer

KEY = "tokenizer.chat_template"
SECONDS = 10  # of a template, by the clock and of a processor
MEMORY = 1 << 30  # bytes of address space
LONGEST = 1 << 20  # characters of a text


class ChatError(ValueError):
    """The file has no chat template, or it cannot render the conversation."""


def rendered(metadata: Mapping[str, Any], tokenizer: Tokenizer, question: str, system: str | None = None) -> str:
    """Return the text of a conversation of one question, up to where the model is to answer.

    A BOS that the template writes is left out where the vocabulary adds one, as in llama.cpp.

    Args:
        metadata: of the file.
        tokenizer: of the file.
        question: what the user says.
        system: what the system says before, if anything.

    Raises:
        ChatError: the file has no template, or the template is damaged, refuses the conversation, or takes too much
            time or memory.
    """
    template = metadata.get(KEY)
    if not isinstance(template, str) or not template:
        raise ChatError(f"the file has no chat template ({KEY}); write the whole prompt as the model expects it")
    names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    words = {name: "" if id is None else tokenizer.name(id).decode("utf-8", "replace") for name, id in names.items()}
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": question})
    text = _ask({"template": template, "messages": messages, **words})
    return text.removeprefix(words["bos_token"]) if tokenizer.adds_bos else text


def _ask(request: dict[str, Any]) -> str:
    """Render in a process of its own."""
    path = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
    command = [sys.executable, "-P", "-m", "ggjac.chat"]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request | {"seconds": SECONDS}).encode("ascii"),
            capture_output=True,
            timeout=SECONDS,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        )
        last = done.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2]
        if done.returncode < 0 or last.startswith("MemoryError"):  # ended by one of its limits
            reply = {"error": "it takes too much time or memory"}
        elif done.returncode:
            raise ValueError(last or f"exit code {done.returncode}")
        else:
            reply = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        reply = {"error": f"it takes longer than {SECONDS} seconds"}
    except (OSError, ValueError) as error:
        reason = str(error)[:300]
        raise ChatError(f"the process for the file's chat template failed ({reason}); write the whole prompt") from None
    if "error" in reply:
        raise ChatError(
            f"the file's chat template cannot be used: {reply['error']}; write the whole prompt as the model expects it"
        )
    return reply["text"]


# -- in the process of the template ------------------------------------------------------------------------------------


def main() -> None:
    """Render the request on stdin."""
    request = json.loads(sys.stdin.buffer.read())
    seconds = request.pop("seconds")
    _limit(seconds)
    try:
        reply = {"text": _render(**request)}
    except ImportError:  # of Jinja: no template can import
        raise
    except MemoryError:
        reply = {"error": "it takes too much memory"}
    except Exception as error:  # a template raises whatever it likes
        number = getattr(error, "lineno", None)
        line = f"line {number}: " if number else ""
        reply = {"error": f"{line}{type(error).__name__}: {str(error)[:300]}"}
    sys.stdout.write(json.dumps(reply))


def _limit(seconds: int) -> None:
    """Limit time and memory of this process, and leave no core file; each by itself, as a system may refuse some."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    for name, most in (("CORE", 0), ("CPU", seconds), ("AS", MEMORY)):
        with suppress(ValueError, OSError):  # such as a hard limit that is lower already
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))


def _render(template: str, messages: list[dict[str, str]], **variables: str) -> str:
    """Render as transformers does (`apply_chat_template`), with what its templates may use."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's words for training: its body as it is."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            number = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return nodes.Scope(body, lineno=number)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = time.strftime
    parts, size = [], 0
    given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True, **variables}
    for part in environment.from_string(template).generate(given):
        size += len(part)
        if size > LONGEST:
            raise ValueError(f"its text is longer than {LONGEST} characters")
        parts.append(part)
    return "".join(parts)


if __name__ == "__main__":
    main()
