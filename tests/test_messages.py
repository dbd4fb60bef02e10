"""Messages of any origin: what is said in them reaches the prompt, whoever asks; what cannot is refused by name."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from support.checkpoints import write_checkpoint

import dgemma
from dgemma.batch import Batch
from dgemma.chat.conversation import Conversation
from dgemma.chat.messages import read, read_tools
from dgemma.chat.template import reads
from dgemma.convert import convert
from dgemma.convert.calibrate import read_prompts
from dgemma.eval import tasks
from dgemma.serve.errors import Refusal
from dgemma.serve.requests import read_request

Messages = list[dict[str, Any]]

ARGUMENTS = {"city": "Paris", "days": [1, 2.5], "deep": {"a": True, "b": None}}
CALL = {"type": "function", "function": {"name": "get_fig", "arguments": ARGUMENTS}}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
FUNCTION = {"name": "get_fig", "description": "Figs.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": FUNCTION}]

# A history as OpenAI's clients keep it, and the same in the form of the templates.
OPENAI: Messages = [
    {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": "Figs?", "name": None},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "index": 0,
                "function": {"name": "get_fig", "arguments": json.dumps(ARGUMENTS)},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "18"}]},
    {"role": "assistant", "content": None, "refusal": "I cannot."},
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
]
PLAIN: Messages = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Figs?"},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "call_1", **CALL}]},
    {"role": "tool", "tool_call_id": "call_1", "name": "get_fig", "content": "18"},
    {"role": "assistant", "content": "I cannot."},
    {"role": "user", "content": "Why?"},
]


@dataclass
class Record:
    role: str
    content: Any


class Said(BaseModel):
    """As the objects of OpenAI's client."""

    role: str
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


# ---- every door ----


def by_tokenizer(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    return model.tokenizer.chat(messages)


def by_prompt(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    return model.prompt_ids(messages)


def by_conversation(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    with Conversation(model, messages) as chat:
        return chat.prompt()


def by_batch(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    with Batch(model, max_tokens=1) as batch:
        answer = batch.answer(json.dumps({"messages": messages}))
        if "error" in answer:
            raise dgemma.UsageError(answer["error"]["message"])
        assert batch._session is not None
        return batch._session.ids[: answer["prompt_tokens"]]


def by_server(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    try:
        return read_request("chat", {"model": "m", "messages": messages}, model, "m", 2048).prompts[0]  # type: ignore[union-attr]
    except Refusal as refusal:
        assert refusal.status == 400 and (refusal.param or "").startswith("messages.")
        raise dgemma.UsageError(refusal.message) from None


def by_task(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    line = {"id": 1, "messages": messages, "check": {"kind": "json"}}
    (folder / "t.jsonl").write_text(json.dumps(line))
    return tasks.load(folder / "t.jsonl")[0].ids(model)


def by_calibration(model: dgemma.Model, messages: Any, folder: Path) -> list[int]:
    (folder / "c.jsonl").write_text(json.dumps({"messages": messages}))
    return model.prompt_ids(read_prompts(folder / "c.jsonl")[0])


DOORS = [by_tokenizer, by_prompt, by_conversation, by_batch, by_server, by_task, by_calibration]
Door = Callable[[dgemma.Model, Any, Path], list[int]]
doors = pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)


@doors
def test_a_history_of_openais_is_the_same_prompt_everywhere(door: Door, tidy: dgemma.Model, tmp_path: Path) -> None:
    wanted = tidy.tokenizer.render(PLAIN)
    assert 'call:get_fig{city:<|"|>Paris<|"|>,days:[1,2.5],deep:{a:true,b:null}}<tool_call|>' in wanted
    assert "I cannot." in wanted and 'response:get_fig{value:<|"|>18<|"|>}' in wanted
    assert door(tidy, OPENAI, tmp_path) == tidy.tokenizer.encode(wanted)


def user(**message: Any) -> Messages:
    return [{"role": "user", "content": "Hi"}, {"role": "user", **message}]


def part(**part: Any) -> Messages:
    return user(content=[{"type": "text", "text": "What is this?"}, part])


def call(**call: Any) -> Messages:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]


def arguments(value: Any) -> Messages:
    return call(type="function", function={"name": "f", "arguments": value})


def answer(**message: Any) -> Messages:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", **message}]


def response(**message: Any) -> Messages:
    called = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}]
    return [*called, {"role": "tool", "content": "18", **message}]


RESPONSES = [{"name": "get_fig", "response": "18"}]
REFUSED: dict[str, tuple[Messages, str]] = {
    "image_url": (
        part(type="image_url", image_url={"url": "data:"}),
        "part 1 of the user message is of type image_url;",
    ),
    "image": (part(type="image"), "type image"),
    "input_audio": (part(type="input_audio", input_audio={}), "type input_audio"),
    "file": (part(type="file", file={}), "type file"),
    "video": (part(type="video"), "type video"),
    "a part without text": (part(type="text"), "part 1 of the user message has no text"),
    "a part with more": (part(type="text", text="x", image="y"), "unknown field 'image'"),
    "a part that is text": (user(content=["x"]), "must be {type, text}, not str"),
    "a part that is null": (user(content=[None]), "must be {type, text}, not nothing"),
    "no content": (user(), "the user message has no content"),
    "a user that thinks": (user(thinking="x"), "thinking is of assistant or model, not of the role user"),
    "a user that thinks beside": (user(content="x", reasoning="x"), "reasoning is of assistant or model"),
    "a user that refuses": (user(content="x", refusal="y"), "refusal is of assistant or model, not of the role user"),
    "a user that responds": (user(tool_responses=RESPONSES), "tool_responses is of assistant or model or tool"),
    "a user that responds beside": (user(content="x", tool_responses=RESPONSES), "tool_responses is of assistant or"),
    "a user with a call's id": (user(content="x", tool_call_id="1"), "tool_call_id is of tool, not of the role user"),
    "responses that are not read": (answer(content=None, tool_responses=RESPONSES), "reads no tool_responses"),
    "responses beside": (answer(content="x", tool_responses=RESPONSES), "reads no tool_responses of a message"),
    "a thought that is not read": (answer(content=None, reasoning="x"), "the assistant message has no content"),
    "a name that is not written": (user(content="x", name="Bob"), "leaves out the name of a user message"),
    "null content": (user(content=None), "the user message has no content"),
    "no parts": (user(content=[]), "the user message has no content"),
    "content that is a number": (user(content=3), "must be text or a list of parts, not int"),
    "content that is an object": (user(content={"text": "x"}), "must be text or a list of parts, not dict"),
    "an assistant that says nothing": ([{"role": "assistant"}], "the assistant message has no content"),
    "a tool that says nothing": ([{"role": "tool", "tool_call_id": "1"}], "the tool message has no content"),
    "no role": ([{"content": "x"}], "it has no role"),
    "a role that is none": ([{"role": "usr", "content": "x"}], "unknown role usr"),
    "a role that is a list": ([{"role": ["user"], "content": "x"}], "unknown role"),
    "the role function": ([{"role": "function", "name": "f", "content": "x"}], "unknown role function"),
    "an unknown field": (user(content="x", images=["a"]), "unknown field 'images'"),
    "audio": (user(content="x", audio={"id": "1"}), "unknown field 'audio'"),
    "function_call": (user(content="x", function_call={"name": "f"}), "unknown field 'function_call'"),
    "a name that is a number": (user(content="x", name=3), "name must be text, not int"),
    "arguments that are no JSON": (arguments("{city"), "the arguments of call 0 are no JSON object"),
    "arguments that are a list": (arguments("[1]"), "the arguments of call 0 are no JSON object"),
    "arguments that are NaN": (arguments('{"a": NaN}'), "it has NaN"),
    "arguments twice": (arguments('{"a": 1, "a": 2}'), "the key 'a' twice"),
    "a call of no function": (call(type="function", function={}), "call 0 names no function"),
    "a custom tool": (call(type="custom", custom={"name": "f", "input": ""}), "call 0 is of type custom"),
    "calls that are no list": ([{"role": "assistant", "tool_calls": {"a": 1}}], "must be a list, not dict"),
    "a user that calls": (user(content="x", tool_calls=[CALL]), "only an assistant calls tools"),
    "text": (user(content="x", text="y"), "unknown field 'text'"),
    "function": (user(content="x", function="y"), "unknown field 'function'"),
    "arguments": (user(content="x", arguments="y"), "unknown field 'arguments'"),
    "parameters": (user(content="x", parameters="y"), "unknown field 'parameters'"),
    "type": (user(content="x", type="image"), "unknown field 'type'"),
    "a response without an id": (response(), "needs the tool_call_id of a call before, or a tool's name"),
    "a response of another tool": (response(name="get_fog"), "no call before is of this tool, 'get_fog'"),
    "a response that says two things": (response(name="get_fog", tool_call_id="1"), "no call before is of this tool"),
    "a response alone": ([{"role": "tool", "name": "f", "content": "y"}], "no call before is of this tool, 'f'"),
    "a response to no call": (
        [{"role": "user", "content": "x"}, {"role": "tool", "tool_call_id": "7", "content": "y"}],
        "no call before has this tool_call_id",
    ),
}  # fmt: skip


@doors
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_left_out_is_refused_by_message_and_name(
    name: str, door: Door, tidy: dgemma.Model, tmp_path: Path
) -> None:
    messages, problem = REFUSED[name]
    last = len(messages) - 1
    with pytest.raises(dgemma.Error, match=rf"messages\[{last}\]: .*{re.escape(problem)}") as caught:
        door(tidy, copy.deepcopy(messages), tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_refused_in_words(tidy: dgemma.Model) -> None:
    for content in (b"Hi", bytearray(b"Hi"), object(), {"a"}):
        with pytest.raises(dgemma.UsageError, match=rf"messages\[0\].*not {type(content).__name__}"):
            tidy.generate([{"role": "user", "content": content}])
    for arguments in ({"a": b"x"}, {"a": object()}):
        messages = [
            *user(content="x"),
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        ]
        with pytest.raises(dgemma.UsageError, match="text, numbers, lists and dicts"):
            tidy.generate(messages)  # type: ignore[arg-type]
    for messages in ("Hi", {"role": "user", "content": "Hi"}, 3, None, b"Hi"):  # type: ignore[assignment]
        with pytest.raises(dgemma.UsageError, match="messages must be a list"):
            tidy.tokenizer.chat(messages)  # type: ignore[arg-type]
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(dgemma.UsageError, match=r"messages\[0\]: nested too deeply"):
        tidy.tokenizer.chat([{"role": "user", "content": deep}])
    with pytest.raises(dgemma.UsageError, match="nested too deeply"):
        tidy.tokenizer.chat([{"role": "user", "content": "x"}], [{"name": "f", "parameters": {"x": deep}}])
    with pytest.raises(dgemma.UsageError, match="nested too deeply"):
        Conversation(tidy, [{"role": "user", "content": deep}])


def test_objects_of_clients_are_messages(tidy: dgemma.Model) -> None:
    given = [Record("user", "Figs?"), Said(role="assistant", tool_calls=[{"id": "1", **CALL}])]
    plain = [{"role": "user", "content": "Figs?"}, {"role": "assistant", "tool_calls": [CALL]}]
    response: dict[str, Any] = {"role": "tool", "content": "18"}
    wanted = tidy.tokenizer.chat([*plain, {**response, "name": "get_fig"}])
    assert tidy.prompt_ids([*given, {**response, "tool_call_id": "1"}]) == wanted  # type: ignore[list-item]
    with Conversation(tidy, [*given, {**response, "tool_call_id": "1"}]) as chat:  # type: ignore[list-item]
        assert chat.prompt() == wanted


def test_what_clients_add_and_leave_empty_is_no_matter(tidy: dgemma.Model) -> None:
    empty = {"audio": None, "annotations": [], "function_call": None, "refusal": None, "anything": {}, "tool_calls": []}
    given = [{"role": "user", "content": "Hi", **empty}]
    assert tidy.tokenizer.chat(given) == tidy.tokenizer.chat([{"role": "user", "content": "Hi"}])


# Ways in which templates read the field `mood` of a message; and in which they read another thing of that name.
MOODS = [
    "{{ messages[0].mood }}",
    "{% for m in messages[1:] %}{{ m['mood'] }}{% endfor %}",
    "{% for m in messages | reverse if m.get('mood') %}{% endfor %}",
    "{% set ns = namespace(all=messages) %}{% for m in ns.all %}{{ m.mood }}{% endfor %}",
    "{% set ns.last = messages[-1] %}{{ ns.last.mood }}",
    "{% macro turn(m) %}{{ m.mood }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}",
    "{% macro turn(m) %}{{ m.mood }}{% endmacro %}{{ turn(m=messages | last) }}",
    "{{ messages | map(attribute='mood') | join }}",
    "{{ messages | selectattr('mood') | list | length }}",
    "{% for m in messages %}{{ loop.previtem.mood }}{% endfor %}",
    "{% set first, rest = messages[0], messages[1:] %}{{ first.mood }}",
    "{% with m = messages[0] %}{{ m.mood }}{% endwith %}",
    "{{ messages | tojson }}",
    "{% for m in messages %}{% for key, value in m.items() %}{{ key }}{{ value }}{% endfor %}{% endfor %}",
]
NO_MOODS = [
    "{{ messages[0].moods }}",
    "mood {# messages[0].mood #} {{ 'mood' }}",
    "{% for tool in tools %}{{ tool.mood }}{% endfor %}",
    "{% for m in messages %}{% for part in m.content %}{{ part.mood }}{% endfor %}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'mood' %}{{ mood }}{% endif %}{% endfor %}",
    "{{ messages[0].tool_calls[0].function['mood'] }}",
]


@pytest.mark.parametrize("template", MOODS)
def test_a_field_of_messages_that_the_template_reads_is_given_to_it(template: str) -> None:
    given = [{"role": "user", "content": "x", "mood": "good"}]
    assert read(given, reads(template).fields) == given


@pytest.mark.parametrize("template", NO_MOODS)
def test_a_field_that_the_template_reads_of_other_things_is_refused(template: str) -> None:
    with pytest.raises(dgemma.UsageError, match="unknown field 'mood'"):
        read([{"role": "user", "content": "x", "mood": "good"}], reads(template).fields)


# As some of Gemma's: it writes marks for images, and no images.
SEEING = """{{ bos_token }}{% for tool in tools or [] %}{{ tool['function']['description'] }}{% endfor -%}
{% for message in messages %}<|turn>{{ message['role'] }}
{% for call in message['tool_calls'] or [] %}call:{{ call['function']['name'] }}{% endfor -%}
{% for item in message['tool_responses'] or [] %}response:{{ item['name'] }}{{ item['response'] }}{% endfor -%}
{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}{% for item in message['content'] -%}
{% if item['type'] == 'image' or message['image'] %}<|image|>{% elif item['type'] == 'text' %}{{ item['text'] -}}
{% endif %}{% endfor %}{% endif %}<turn|>
{% endfor %}<|turn>model
"""


def tokenizer_with(template: str, folder: Path) -> dgemma.Tokenizer:
    write_checkpoint(folder, layers=1, dtype="f32", chat_template=template)
    convert(folder, folder / "x.gguf", type="f32")
    return dgemma.Tokenizer.from_gguf(folder / "x.gguf")


def test_no_word_of_a_template_is_a_field_that_vanishes(tidy: dgemma.Model, tmp_path: Path) -> None:
    """Whatever is said in a field of such a name reaches the prompt, or is refused."""
    for tokenizer in (tidy.tokenizer, tokenizer_with(SEEING, tmp_path)):
        words = {*re.findall(r"\w+", str(tokenizer.chat_template)), *FIELDS, "images", "audio", "video", "image_url"}
        for word in sorted(words - {"role", "content"}):
            for said in ("dropped", ["dropped"], {"dropped": "dropped"}):
                for role in ("user", "assistant", "system", "tool"):
                    asked = [{"role": role, "content": "Hi", word: said}, {"role": "user", "content": "x"}]
                    try:
                        text = tokenizer.render(asked)
                    except dgemma.UsageError as problem:
                        assert "messages[0]" in str(problem), problem
                        continue
                    silent = role == "assistant" and word in ("thinking", "reasoning", "reasoning_content")
                    assert "dropped" in text or silent, (role, word, said)


PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{{ m.role }}\n{{ m.content | upper }}\n{% endfor %}"
)


def test_what_a_template_never_reads_is_refused_by_name(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(PLAIN_TEMPLATE, tmp_path)
    asked: Messages = [{"role": "user", "content": " Hi "}]
    assert tokenizer.render(asked) == "<bos>user\n HI \n"
    with pytest.raises(dgemma.UsageError, match="knows no tools"):
        tokenizer.render(asked, TOOLS)
    assert tokenizer.render(asked, []) == tokenizer.render(asked)
    for more, problem in (
        ([{"role": "assistant", "content": "x", "tool_calls": [CALL]}], "reads no tool_calls of a message"),
        ([{"role": "assistant", "tool_calls": [{"id": "1", **CALL}]}], "reads no tool_calls of a message"),
        ([{"role": "assistant", "content": None, "tool_responses": RESPONSES}], "reads no tool_responses"),
        ([{"role": "assistant", "reasoning_content": "x"}], "the assistant message has no content"),
        ([{"role": "user", "content": "x", "name": "Bob"}], "reads no name of a message"),
        ([{"role": "system", "content": "Be brief."}], "leaves out the content of a system message here"),
    ):
        with pytest.raises(dgemma.UsageError, match=rf"messages\[1\]: .*{problem}"):
            tokenizer.render([*asked, *more])
    with dgemma.Model(tmp_path / "x.gguf", threads=1) as model:
        for given, place in (
            ({"messages": asked, "tools": TOOLS}, "tools"),
            ({"messages": [*asked, {"role": "assistant", "tool_calls": [CALL]}]}, "messages.1.tool_calls"),
        ):
            with pytest.raises(Refusal) as refusal:
                read_request("chat", {"model": "m", **given}, model, "m", 2048)
            assert (refusal.value.status, refusal.value.param) == (400, place)
            with Batch(model) as batch:
                assert "reads no" in (said := batch.answer(json.dumps(given))["error"]["message"]) or "no tools" in said


def test_a_file_without_a_template_has_room_for_a_users_text_alone(bundled: dgemma.Model) -> None:
    asked: Messages = [{"role": "user", "content": "1"}]
    for more, problem in (
        ([{"role": "developer", "content": "x"}], "a system message needs a chat template"),
        ([{"role": "assistant", "tool_calls": [CALL]}], "a call of a tool needs a chat template"),
    ):
        with pytest.raises(dgemma.UsageError, match=rf"messages\[1\]: {problem}"):
            bundled.tokenizer.chat([*asked, *more])
    assert bundled.tokenizer.chat([*asked, {"role": "assistant", "content": "2"}]) == bundled.prompt_ids("1")


def test_parts_are_joined_where_a_template_reads_text_alone(chatting: str, tidy: dgemma.Model) -> None:
    given = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "sky"}]}]
    plain = [{"role": "user", "content": "the sky"}]
    for tokenizer in (dgemma.Tokenizer.from_gguf(chatting), tidy.tokenizer):
        assert tokenizer.render(given) == tokenizer.render(plain)


# ---- tools ----


def test_functions_by_themselves_are_tools(tidy: dgemma.Model) -> None:
    asked = [{"role": "user", "content": "Figs?"}]
    wanted = tidy.tokenizer.render(asked, TOOLS)
    assert "declaration:get_fig" in wanted
    bare = [{**FUNCTION, "strict": False}]
    assert tidy.tokenizer.render(asked, bare) == tidy.tokenizer.render(asked, ({"function": FUNCTION},)) == wanted
    assert read_tools([{"type": "function", **FUNCTION}]) == TOOLS  # as the Responses API has it


@pytest.mark.parametrize(
    ("tool", "problem"),
    [
        ("get_fig", r"tools\[1\]: expected {type, function}, found str"),
        ({}, r"tools\[1\]: it names no function"),
        ({"type": "function"}, r"tools\[1\]: it names no function"),
        ({"type": "function", "function": {"name": ""}}, r"tools\[1\]: it names no function"),
        ({"type": "web_search"}, r"tools\[1\]: it is of type web_search"),
        ({"name": "f", "parameters": "x"}, r"tools\[1\]: parameters must be a JSON schema, not str"),
        ({"name": "f", "description": 3}, r"tools\[1\]: description must be text, not int"),
        ({"name": "f", "strict": True}, r"tools\[1\]: strict is true"),
    ],
)
def test_what_is_no_tool_is_refused_by_name(tool: Any, problem: str, tidy: dgemma.Model) -> None:
    asked = [{"role": "user", "content": "Figs?"}]
    with pytest.raises(dgemma.UsageError, match=problem):
        tidy.tokenizer.chat(asked, [TOOLS[0], tool])
    with Conversation(tidy, asked, tools=[TOOLS[0], tool]) as chat, pytest.raises(dgemma.UsageError, match=problem):
        chat.prompt()
    for no_list in ("get_fig", TOOLS[0], 3):
        with pytest.raises(dgemma.UsageError, match="tools must be a list"):
            tidy.tokenizer.chat(asked, no_list)  # type: ignore[arg-type]


def test_what_only_a_template_can_say_needs_one(bundled: dgemma.Model) -> None:
    for more in ({"tools": TOOLS}, {"thinking": True}):
        with pytest.raises(dgemma.UsageError, match=r"needs? a chat template"):
            bundled.tokenizer.chat([{"role": "user", "content": "1"}], **more)  # type: ignore[arg-type]


def test_thinking_needs_a_template_that_knows_it(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, layers=1, dtype="f32", chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    convert(tmp_path, tmp_path / "x.gguf", type="f32")
    tokenizer = dgemma.Tokenizer.from_gguf(tmp_path / "x.gguf")
    assert tokenizer.render([{"role": "user", "content": "Hi"}]) == "Hi"
    with pytest.raises(dgemma.UsageError, match="knows no thinking"):
        tokenizer.render([{"role": "user", "content": "Hi"}], thinking=True)


@pytest.mark.parametrize("name", ["system", "tools", "thinking", "raw", "fill"])
def test_calibration_leaves_nothing_out_of_a_prompt(name: str, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"prompt": "x"}\n' + json.dumps({"prompt": "x", name: [1]}))
    with pytest.raises(dgemma.FormatError, match=rf"c\.jsonl, line 2: {name} cannot be part of a prompt"):
        read_prompts(tmp_path / "c.jsonl")


def test_a_line_of_a_batch_has_one_system_message(tidy: dgemma.Model) -> None:
    messages = [{"role": "developer", "content": "a"}, {"role": "user", "content": "Sort:\nsea fig"}]
    with Batch(tidy) as batch:
        answer = batch.answer(json.dumps({"messages": messages, "system": "b"}))
        assert "one system message" in answer["error"]["message"]
    with Batch(tidy, system="b") as batch:  # a line's own wins over the flag
        answer = batch.answer(json.dumps({"messages": messages}))
        assert answer["prompt_tokens"] == len(tidy.tokenizer.chat(messages))


# ---- whatever comes ----

values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4) | st.binary(max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = ["role", "content", "name", "tool_calls", "tool_call_id", "tool_responses", "thinking", "refusal", "x"]
message = st.dictionaries(
    st.sampled_from(FIELDS), values | st.sampled_from(["user", "assistant", "model", "tool", [CALL]])
)


@settings(max_examples=300, deadline=None)
@given(st.lists(message | values, max_size=3))
def test_any_messages_are_read_or_refused(messages: Any) -> None:
    try:
        made = read(messages)
    except dgemma.UsageError:
        return
    assert len(made) == len(messages) > 0
    for each, given_ in zip(made, messages, strict=True):
        assert each["role"] in ("system", "user", "assistant", "model", "tool") and isinstance(each["content"], str)
        if isinstance(given_.get("content"), str):
            assert given_["content"] in each["content"]
    assert read(made) == made  # what was read is read as itself


# ---- as transformers ----


@pytest.mark.oracle
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("which", ["tidy", "gemma"])
def test_a_history_with_tools_is_the_prompt_of_transformers(which: str, parts: int, tidy: dgemma.Model) -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    file = Path(os.environ.get("DGEMMA_TEST_DATA", "none")) / "gemma-4-vocab.gguf"
    if which == "gemma" and not file.exists():
        pytest.skip("DGEMMA_TEST_DATA names no folder with gemma-4-vocab.gguf")
    ours = tidy.tokenizer if which == "tidy" else dgemma.Tokenizer.from_gguf(file)
    texts = [{"type": "text", "text": text} for text in (" Why? ", " How? ")[:parts]]
    history = [*OPENAI[:-1], {"role": "user", "content": texts}]
    theirs = [*PLAIN[:-1], {"role": "user", "content": texts}]  # its users write arguments as dicts themselves
    wanted, _ = utils.render_jinja_template(
        conversations=[theirs],
        tools=TOOLS,
        chat_template=ours.chat_template,
        add_generation_prompt=True,
        bos_token="<bos>",
        enable_thinking=False,
    )
    assert ours.render(history, TOOLS) == wanted[0]
