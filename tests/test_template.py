"""Chat templates come from strangers: whatever their code does, it ends soon, with a text or an error."""

from __future__ import annotations

import os
import signal
import threading
from collections import UserDict, UserList
from collections.abc import Iterator

import pytest

import dgemma
from dgemma.template import Renderer, render

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
