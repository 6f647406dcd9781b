"""Chat templates: rendered as by llama-cpp-python's formatter, and bounded where they are hostile."""

import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import invoke_json, reworded

from ggjac import chat
from ggjac.chat import ChatError, rendered
from ggjac.model import open_model
from ggjac.tokenizer import RawVocabulary

TEMPLATES = {
    "chatml": """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system
Be brief<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first = messages[0]['content'] + '\n\n' -%}
    {%- set rest = messages[1:] -%}
{%- else -%}
    {%- set first = '' -%}
    {%- set rest = messages -%}
{%- endif -%}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {{ '<start_of_turn>' + message['role'] + '\n' + (first if loop.first else '') }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
""",
    "date and tools": """{%- if strftime_now is defined %}{%- set d = strftime_now('%Y') %}{%- else %}
{%- set d = 'x' %}{%- endif %}{{ d }} {% if tools is not none and tools %}tools{% endif %}{{ messages | tojson }}""",
    "blocks on lines": """{% for m in messages %}
    {% if m.role == 'user' %}
  {{ m.content }}
    {% endif %}
{% endfor %}
A:""",
    "loop controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{{ m.content }}{% endfor %}""",
    "namespace": """{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}
{{ n.x }}{{ eos_token }}""",
}


class Vocabulary(RawVocabulary):
    """Three strings, of which one begins and one ends a text."""

    bos_id, eos_id, adds_bos = 0, 1, False

    def __init__(self) -> None:
        super().__init__(["<s>", "</s>", "a"], "llama", reason="there is none")


def render(template: Any, question: str = "Why?", system: str | None = None) -> str:
    return rendered({chat.KEY: template}, Vocabulary(), question, system)


@pytest.mark.parametrize("system", [None, "Rhyme. </s>"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_conversation_is_as_by_llama_cpp_python(name: str, system: str | None) -> None:
    formats = pytest.importorskip("llama_cpp.llama_chat_format", reason="llama-cpp-python is not installed")
    formatter = formats.Jinja2ChatFormatter(template=TEMPLATES[name], eos_token="</s>", bos_token="<s>")
    messages = [{"role": "user", "content": "Why <b>é</b>?"}]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    if name == "loop controls":  # an extension that it leaves out, and transformers has
        assert render(TEMPLATES[name], "Why?", system) == "Why?"
        return
    assert render(TEMPLATES[name], "Why <b>é</b>?", system) == formatter(messages=messages).prompt


def test_the_generation_mark_of_training_is_nothing() -> None:
    assert render("a{% generation %}{{ messages[0].content }}{% endgeneration %}b") == "aWhy?b"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.now().year)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("", "no chat template"),
        (7, "no chat template"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for %}", "line 1: TemplateSyntaxError"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "too much time|longer than"),
        ("{{ 'x' * 10**10 }}", "too much memory"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "longer than"),
        ("{% include '/etc/passwd' %}", "TypeError"),
    ],
)
def test_what_cannot_be_rendered_is_refused(template: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "SECONDS", 2)
    with pytest.raises(ChatError, match=words):
        render(template)


def test_a_command_asks_by_the_template_and_begins_once(tmp_path: Path) -> None:
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|end_of_text|>{% endfor %}answer:"
    file = reworded(tmp_path / "chat.gguf", {chat.KEY: template})
    model = open_model(file)
    text = model.chat("The opposite of hot?", system="Be brief")
    assert text == "system: Be brief<|end_of_text|>user: The opposite of hot?<|end_of_text|>answer:"
    found = invoke_json("predict", "-q", "-m", file, "--chat", "The opposite of hot?", "--system", "Be brief")
    ids = [token["id"] for token in found["tokens"]]
    assert (found["prompt"], ids) == (text, model.tokenize(text))
    assert (ids[0], ids.count(0), ids.count(1)) == (0, 1, 2)
    assert found["warnings"] == []


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (
            "import sys; sys.exit('ModuleNotFoundError: no jinja2')",
            "the process .* failed \\(ModuleNotFoundError: no jinja2",
        ),
        ("print('{')", "the process .* failed"),
        ("raise MemoryError", "template cannot be used: it takes too much time or memory"),
        ("import os; os.abort()", "template cannot be used: it takes too much time or memory"),
    ],
)
def test_a_failure_of_the_process_is_not_the_templates(
    program: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text(f"#!{sys.executable}\n{program}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ChatError, match=words):
        render("x")


def test_each_limit_is_set_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource", reason="there are no such limits on Windows")
    found = {}

    def set_or_refuse(kind: int, limits: tuple[int, int]) -> None:
        if kind == resource.RLIMIT_CORE:
            raise ValueError("not allowed")
        found[kind] = limits

    monkeypatch.setattr(resource, "setrlimit", set_or_refuse)
    chat._limit(3)
    assert found == {resource.RLIMIT_CPU: (3, 3), resource.RLIMIT_AS: (chat.MEMORY, chat.MEMORY)}
