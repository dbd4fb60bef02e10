"""Chat templates come from strangers: whatever their code does, it ends soon, with a text or an error."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import UserDict, UserList
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import write_checkpoint

import dgemma
from dgemma.chat.template import Renderer, render
from dgemma.convert import convert
from dgemma.convert.chat_template import TRIALS, try_out

MESSAGES = [{"role": "user", "content": "x"}]


@pytest.fixture(scope="module")
def renderer() -> Iterator[Renderer]:
    """As the one in use, with less of everything."""
    made = Renderer(seconds=0.2, memory=1 << 28, most=1 << 20)
    yield made
    made.close()


HOSTILE = {
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "calls itself": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "a power": "{{ 10 ** (10 ** 10) }}",
    "a power of what is given": "{{ (messages | length + 9) ** ((messages | length + 9) ** 10) }}",
    "a string times": "{{ 'a' * 10 ** 12 }}",
    "a long constant": "{{ 'a' * 10 ** 8 }}",
    "a list times": "{{ ([0] * 10 ** 11) | length }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a width": "{{ '%999999999999d' % 1 }}",
    "padding": "{{ 'a' | center(10 ** 11) }}",
    "replacing": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "text without end": "{% for i in range(99999) %}{{ 'a' * 99999 }}{% endfor %}",
    "a long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "words": "{{ lipsum(n=10 ** 9) }}",
    "depth": "{{ " + "(" * 20000 + ")" * 20000 + " }}",
    "nesting": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "attributes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changing": "{{ messages.append(1) }}",
    "not finished": "{% if %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused(renderer: Renderer, name: str) -> None:
    with pytest.raises((dgemma.UsageError, dgemma.FormatError), match=r"^the (file's )?chat template ") as raised:
        renderer.render(HOSTILE[name], {"messages": MESSAGES})
    assert len(str(raised.value)) < 500
    assert renderer.render("{{ messages[0].content }}", {"messages": MESSAGES}) == "x"  # and the next one is served


def test_what_was_too_much_is_named(renderer: Renderer) -> None:
    for name, why in (
        ("loops", "more than 0.2 seconds"),
        ("text without end", "more than 1048576 characters"),
        ("a string times", "more than 256 MiB"),
    ):
        with pytest.raises(dgemma.UsageError, match=why):
            renderer.render(HOSTILE[name], {"messages": MESSAGES})


def test_a_constant_that_is_too_much_is_no_error_of_syntax() -> None:
    """Jinja works it out when it compiles."""
    with closing(Renderer(seconds=60, memory=1 << 28)) as patient:
        with pytest.raises(dgemma.UsageError, match="refuses these messages: it takes more than 256 MiB of memory"):
            patient.render("{{ 'a' * 150000000 }}", {"messages": MESSAGES})
        assert patient.render("{{ messages[0].content }}", {"messages": MESSAGES}) == "x"


@pytest.mark.parametrize("first", [0, 1, 3])
def test_trials_of_a_template_end_at_the_first_that_takes_too_long(first: int, renderer: Renderer) -> None:
    asked = []

    class Trial(dgemma.Tokenizer):
        def __init__(self) -> None:
            pass

        def render(self, messages: Any, tools: Any = None, thinking: bool = False) -> str:
            asked.append(messages)
            template = "{{ messages | map(attribute='content') | list }}" if len(asked) <= first else HOSTILE["loops"]
            return renderer.render(template, {"messages": messages, "tools": tools})

    if first == 0:
        with pytest.raises(
            dgemma.FormatError, match=r"a\.gguf: not even a first message can be written: .* 0\.2 seconds"
        ):
            try_out(Path("a.gguf"), Trial())
    else:
        (note,) = try_out(Path("a.gguf"), Trial())
        assert note.startswith(f"with {list(TRIALS)[first]}: ") and "it takes more than 0.2 seconds" in note
    assert len(asked) == first + 1


def test_names_reach_the_template_as_they_are() -> None:
    names = {"text": 'é\udc80"\n\0😀', "number": 1.5, "none": None, "yes": True, "list": [1, {"a": [2]}]}
    assert render("{{ text }}|{{ number }}|{{ none }}|{{ yes }}|{{ list }}", names) == (
        f"{names['text']}|1.5|None|True|[1, {{'a': [2]}}]"
    )
    assert render("{{ m[0].a }}{{ m | tojson }}", {"m": UserList([UserDict(a="é<")])}) == 'é<[{"a": "é<"}]'
    with pytest.raises(dgemma.UsageError, match="text, numbers, lists and dicts: not object"):
        render("", {"it": object()})


def test_a_message_of_megabytes() -> None:
    text = "word 😀 " * 500_000
    assert render("<{{ text | trim }}>", {"text": text}) == f"<{text.strip()}>"


def test_threads_take_turns(renderer: Renderer) -> None:
    found: dict[int, str] = {}

    def work(n: int) -> None:
        found[n] = "".join(renderer.render("{{ n }},", {"n": n + i}) for i in range(20))

    threads = [threading.Thread(target=work, args=(n * 100,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n * 100: "".join(f"{n * 100 + i}," for i in range(20)) for n in range(4)}


def test_a_process_that_ended_is_started_again(renderer: Renderer) -> None:
    assert renderer.render("1", {}) == "1"
    process = renderer._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(dgemma.UsageError, match=r"ended the process that renders it \(status -9\)"):
        renderer.render("2", {})
    assert renderer.render("3", {}) == "3"
    renderer.close()
    assert renderer.render("4", {}) == "4"


def test_a_forked_process_has_its_own() -> None:
    assert render("1", {}) == "1"
    pid = os.fork()
    if pid == 0:
        os._exit(0 if render("2", {}) == "2" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert render("3", {}) == "3"


def test_a_renderer_ends_while_a_forked_process_lives() -> None:
    """Which holds a copy of its pipes, so that closing them is no end to it."""
    made = Renderer()
    assert made.render("1", {}) == "1"
    ends = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ends[1])
        os.read(ends[0], 1)
        os._exit(0)
    process = made._process
    made.close()
    assert process is not None and process.returncode is not None
    os.close(ends[1])
    assert os.waitpid(pid, 0)[1] == 0


# ---- as transformers ----

TEMPLATES = {
    "generation": "{{ bos_token }}{% for m in messages %}<|turn>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}<turn|>\n{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}",
    "generation with dashes": "{% set x = 'a' %}\n  {%- generation -%}  {% set x = 'b' %}{{ x }}  {%- endgeneration -%}"
    " |{{ x }}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}{{ mask_token }}|{{ cls_token }}|"
    "{{ sep_token is defined }}{{ mask_token is defined }}",
    "more tokens": "{{ image_token }}{{ sot_token }}{{ sep_token }}\n|{{ eot_token }}|{{ no_token }}",
    "tokens in macros": "{% macro m(n) %}{{ sot_token * n }}{% endmacro %}{{ m(2) }}{% for i in [1] %}{{ eot_token }}"
    "{% if i %}{% set sot_token = 'x' %}{% endif %}{% endfor %}{{ sot_token }}{% block b %}"
    "{{ image_token }}{% endblock %}",
    "a newline first": "\n  {{ sot_token }}\n",
    "loop controls": "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% if i > 3 %}{% break %}"
    "{% endif %}{% endfor %}",
    "blocks": "  {% if true %}\n    a\n  {% endif %}\n\tb {# c #}\n\n",
    "tojson": "{{ {'é<': [1, none, true], 'b': 'x'} | tojson }}{{ 'é' | tojson(ensure_ascii=true) }}"
    "{{ [1, {'b': 2, 'a': 3}] | tojson(indent=2, sort_keys=true) }}{{ [1, 2] | tojson(separators=(',', ':')) }}",
    "names that are not given": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ nothing }}"
    "{{ continue_final_message is defined }}{% for d in documents or [] %}x{% endfor %}",
    "namespaces and dicts": "{% set n = namespace(a=1, self=2) %}{% set n.a = n.a + 1 %}{{ n.a }}{{ dict(a=1) }}"
    "{{ dict.fromkeys(['k'], 2) }}",
    "a date": "{{ strftime_now('%Y') }}{{ strftime_now(format='%m') }}",
    "parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{{ p.text | trim }}{% endfor %}{% endif %};{% endfor %}",
    "reasoning": "{% for m in messages %}[{{ m.thinking }}|{{ m.reasoning_content }}]{% endfor %}",
    "a refusal": "{% if messages[1:] %}{{ raise_exception('no ' ~ messages[0].role ~ ' here') }}{% endif %}",
    "a name with an underscore": "{% if messages[1:] %}{% set n = namespace() %}{% set n._a = 1 %}{% endif %}",
    "undefined added": "{% if messages[1:] %}{{ nothing + 'x' }}{% endif %}",
}
ASKED = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "a  b"},
    {"role": "assistant", "content": "c", "reasoning": "r"},
    {"role": "user", "content": "d", "name": None},
]
PARTS = [*ASKED, {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": " b"}]}]
TOKENS = {
    "sot_token": "<|turn>",
    "eot_token": {"__type": "AddedToken", "content": "<turn|>", "special": True},
    "extra_special_tokens": {"image_token": "<|\"im'\\\n\u00e9\U0001f600|>"},
    "mask_token": "<mask>",
}
WRITTEN = {
    "generation with dashes": "b|a",
    "special tokens": "<bos><eos><unk><pad><mask>||FalseTrue",
    "more tokens": "<|\"im'\\\n\u00e9\U0001f600|><|turn>\n|<turn|>|",
    "tokens in macros": "<|turn><|turn><turn|><|turn><|\"im'\\\n\u00e9\U0001f600|>",
    "a newline first": "\n  <|turn>",
    "blocks": "    a\n\tb ",
    "namespaces and dicts": "2{'a': 1}{'k': 2}",
    "names that are not given": "TrueTrueTrueFalse",
    "parts": "Be brief.;a  b;c;d;ab;",
    "reasoning": "[|][|][r|r][|]",
}


def checkpoint(folder: Path, template: str) -> Path:
    """A folder with the template, and special tokens that GGUF files have no keys for."""
    write_checkpoint(folder, layers=1, dtype="f32", chat_template=template)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | TOKENS))
    return folder


def rendered(folder: Path, messages: Any = ASKED) -> str:
    convert(folder, folder / "it.gguf", type="f32")
    return dgemma.Tokenizer.from_gguf(folder / "it.gguf").render(messages)


def asked(name: str) -> list[dict[str, Any]]:
    return PARTS if name == "parts" else ASKED


@pytest.mark.parametrize("name", WRITTEN)
def test_templates_write_what_they_write_in_transformers(name: str, tmp_path: Path) -> None:
    assert rendered(checkpoint(tmp_path, TEMPLATES[name]), asked(name)) == WRITTEN[name]


@pytest.mark.oracle
@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_write_what_transformers_writes_now(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint(tmp_path, TEMPLATES[name]))
    try:
        text = theirs.apply_chat_template(asked(name), tokenize=False, add_generation_prompt=True)
    except Exception:
        with pytest.raises(dgemma.UsageError, match="the chat template refuses these messages"):
            rendered(tmp_path)
    else:
        assert rendered(tmp_path, asked(name)) == text
        assert name not in WRITTEN or text == WRITTEN[name]


def test_what_a_template_says_of_messages_is_told(tmp_path: Path) -> None:
    with pytest.raises(dgemma.UsageError, match="refuses these messages: no system here"):
        rendered(checkpoint(tmp_path, TEMPLATES["a refusal"]))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{% for m in messages %}{{ m.content }}", "no Jinja template: Unexpected end of template"),
        ("{{ messages | first_of_all }}", "no Jinja template: No filter named 'first_of_all'"),
    ],
)
def test_a_template_that_is_none_is_found_when_it_is_converted(template: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(dgemma.FormatError, match=f"{tmp_path}: .*{why}"):
        rendered(checkpoint(tmp_path, template))
    assert not (tmp_path / "it.gguf").exists()
