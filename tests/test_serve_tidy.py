"""dg-serve with the bundled `tidy`, which has one right answer to each question: through OpenAI's client, whose types
every answer is validated by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from typing import Any

import httpx
import openai
import pytest
from models.tidy import tasks
from support.serving import Live, post, serving

import dgemma
from dgemma.model import bundled


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with dgemma.Model(bundled("tidy")) as model, serving(model) as found:
        yield found


def right(live: Live, task: str) -> tasks.Case:
    """The first held-out case that the model itself gets right."""
    model = live.server.model
    for case in tasks.cases(task, 10):
        prompt = model.tokenizer.chat(case.messages, case.tools or None, case.thinking)
        if model.generate(prompt, seed=1).text == case.output:
            return case
    raise AssertionError(f"tidy gets no case of {task} right")


def ask(live: Live, case: tasks.Case, **given: Any) -> Any:
    effort = {"reasoning_effort": "high"} if case.thinking else {}
    tools = {"tools": list(case.tools)} if case.tools else {}
    return live.chat("", messages=as_openai(case.messages), seed=1, **effort, **tools, **given)


def as_openai(messages: Any) -> list[dict[str, Any]]:
    """With what OpenAI's API wants and chat templates do not: ids of calls, arguments as JSON."""
    told = [dict(message) for message in messages]
    for message in told:
        if message.get("tool_calls"):
            (call,) = message["tool_calls"]
            arguments = json.dumps(call["function"]["arguments"])
            function = {"name": call["function"]["name"], "arguments": arguments}
            message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
        if message["role"] == "tool":
            message["tool_call_id"] = "call_1"
    return told


def streamed(chunks: Any) -> dict[str, Any]:
    """What the chunks of a stream add up to, and how it ended."""

    def add(whole: dict[str, Any], chunk: Any) -> dict[str, Any]:
        if chunk.choices:
            delta = chunk.choices[0].delta
            whole["content"] += delta.content or ""
            whole["thinking"] += getattr(delta, "reasoning_content", None) or ""
            whole["calls"] += delta.tool_calls or []
            whole["reason"] = chunk.choices[0].finish_reason or whole["reason"]
        whole["usage"] = chunk.usage or whole["usage"]
        return whole

    return reduce(add, chunks, {"content": "", "thinking": "", "calls": [], "reason": None, "usage": None})


@pytest.mark.parametrize("task", [*tasks.PASSAGES, "reply", "again"])
def test_it_answers_and_streams_what_is_right(live: Live, task: str) -> None:
    case = right(live, task)
    answer = ask(live, case)
    (choice,) = answer.choices
    assert choice.message.content == case.answer and choice.finish_reason == "stop" and not choice.message.tool_calls
    told = streamed(ask(live, case, stream=True, stream_options={"include_usage": True}))
    assert told["content"] == case.answer and told["reason"] == "stop"
    assert told["usage"].completion_tokens == answer.usage.completion_tokens
    assert told["usage"].prompt_tokens_details.cached_tokens == told["usage"].prompt_tokens, "it was asked just before"


def test_a_thought_is_reasoning_and_no_part_of_the_answer(live: Live) -> None:
    case = right(live, "think")
    message = ask(live, case).choices[0].message
    assert (message.reasoning_content, message.content) == (case.thought, case.answer)
    told = streamed(ask(live, case, stream=True))
    assert (told["thinking"], told["content"], told["reason"]) == (case.thought, case.answer, "stop")
    # Given back, the thought is left out of the next prompt.
    history = [*case.messages, message.model_dump(), {"role": "user", "content": "Again."}]
    plain = [*case.messages, {"role": "assistant", "content": case.answer}, {"role": "user", "content": "Again."}]
    assert (
        live.chat("", messages=history, seed=1).usage.prompt_tokens
        == live.chat("", messages=plain, seed=1).usage.prompt_tokens
    )


def test_a_tool_is_called_with_what_the_user_said_and_its_answer_is_told(live: Live) -> None:
    case = right(live, "tool")
    wanted = dict(line.split("=", 1) for line in case.messages[0]["content"].split("\n")[1:])
    choice = ask(live, case).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert json.loads(call.function.arguments) == tasks.typed(wanted) and call.id
    told = streamed(ask(live, case, stream=True))
    (again,) = told["calls"]
    assert again.function.model_dump() == call.function.model_dump() and told["reason"] == "tool_calls"
    response = {"role": "tool", "tool_call_id": call.id, "content": "12"}
    messages = [*case.messages, choice.message.model_dump(), response]
    assert live.chat("", messages=messages, tools=list(case.tools), seed=1).choices[0].message.content == "It is 12."


def test_several_choices_are_those_of_one_seed_after_another(live: Live) -> None:
    case = right(live, "sort")
    answer = live.chat("", messages=list(case.messages), seed=1, n=3)
    alone = [live.chat("", messages=list(case.messages), seed=seed).choices[0] for seed in (1, 2, 3)]
    assert [c.message.content for c in answer.choices] == [c.message.content for c in alone]
    assert [c.diffusion["seed"] for c in answer.choices] == [1, 2, 3]


def test_an_answer_cut_by_max_tokens_says_so(live: Live) -> None:
    case = right(live, "upper")
    answer = ask(live, case, max_tokens=2)
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 2
    assert case.answer.startswith(answer.choices[0].message.content)


def test_the_beginning_of_a_canvas_is_sent_before_its_end(live: Live) -> None:
    """With `commit`, and never taken back: chunks come between canvas events, and add up to the answer."""
    case = right(live, "indent")
    own = {"commit": 0.001, "stability": 40, "events": True}
    chunks = list(live.chat("", messages=list(case.messages), seed=1, stream=True, extra_body={"diffusion": own}))
    steps = [at for at, chunk in enumerate(chunks) if getattr(chunk, "canvas", None)]
    said = [at for at, chunk in enumerate(chunks) if chunk.choices and chunk.choices[0].delta.content]
    assert said[0] < steps[-1], "nothing was said before the last step"
    whole = live.chat("", messages=list(case.messages), seed=1, extra_body={"diffusion": {**own, "events": False}})
    assert streamed(chunks)["content"] == whole.choices[0].message.content == case.answer
    for at in steps:  # what is said and the draft are the answer as it stands
        canvas, told = chunks[at].canvas, streamed(chunks[:at])["content"]
        assert told == "".join(canvas["text"][: canvas["final"]]) and "draft" in canvas
    last = chunks[steps[-1]].canvas
    assert streamed(chunks[: steps[-1]])["content"] + last["draft"]["content"] == case.answer


def test_a_stop_inside_a_canvas_counts_what_was_done(live: Live) -> None:
    case = right(live, "indent")
    stop = case.answer.split("\n")[0]
    own = {"commit": 0.001, "stability": 40}
    choice = live.chat("", messages=list(case.messages), seed=1, stop=stop, extra_body={"diffusion": own}).choices[0]
    assert not choice.message.content and choice.finish_reason == "stop" and 0 < choice.diffusion["steps"] < 40


TEXT = "# map\nsea fig ant\nred: 12"
SPAN = (TEXT.index("sea"), TEXT.index("\nred"))


def edit(live: Live, **given: Any) -> httpx.Response:
    body = {"model": live.model, "input": TEXT, "instruction": "Sort:", "seed": 0} | given
    return post(f"{live.url}/v1/edits", json=body, headers={"Authorization": "Bearer secret"})


def test_a_passage_is_rewritten_in_place(live: Live) -> None:
    wanted = live.server.model.edit(TEXT, SPAN, "Sort:", seed=0)
    assert wanted.passage == "ant fig sea"
    answer = edit(live, diffusion={"span": SPAN}).json()
    (choice,) = answer["choices"]
    figures = choice["diffusion"]
    assert (choice["text"], choice["finish_reason"]) == (wanted.text, "stop")
    assert (figures["passage"], tuple(figures["span"])) == (wanted.passage, wanted.span)
    assert figures["steps"] == wanted.filled.steps and len(figures["trials"]) == len(wanted.filled.trials)
    assert answer["usage"]["completion_tokens"] == len(live.server.model.tokenizer.encode(wanted.passage))

    own = {"span": SPAN, "events": True, "lengths": [4, 8]}
    told = edit(live, diffusion=own, stream=True, stream_options={"include_usage": True}).text
    chunks = [json.loads(line[6:]) for line in told.splitlines() if line.startswith("data: {")]
    assert told.endswith("data: [DONE]\n\n") and chunks[-1]["usage"]["total_tokens"] > 0
    canvases = [chunk["canvas"] for chunk in chunks if "canvas" in chunk]
    assert {canvas["trial"] for canvas in canvases} == {0, 1}
    for canvas in canvases:  # the hole stands between what stays
        holes = [text for text, pinned in zip(canvas["text"], canvas["pinned"], strict=True) if not pinned]
        assert len(holes) == [4, 8][canvas["trial"]]
        assert "".join(canvas["text"]).startswith(TEXT[: SPAN[0]])
    assert [c["choices"][0]["text"] for c in chunks if c["choices"]] == [
        live.server.model.edit(TEXT, SPAN, "Sort:", seed=0, lengths=[4, 8]).text
    ]


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"instruction": " "}, "instruction"),
        ({"diffusion": {"span": [3, 2]}}, "diffusion.span"),
        ({"diffusion": {"span": [0, 999]}}, "diffusion.span"),
        ({"diffusion": {"span": [0]}}, "diffusion.span"),
        ({"diffusion": {"lengths": []}}, "diffusion.lengths"),
        ({"diffusion": {"max_tokens": 3}}, "diffusion.max_tokens"),
        ({"diffusion": {"events": True}}, "diffusion.events"),
        ({"input": "fig " * 3000}, "input"),
        ({"n": 2}, "n"),
        ({"input": None}, "input"),
    ],
)
def test_what_is_wrong_with_an_edit_is_named(live: Live, given: dict[str, Any], param: str) -> None:
    answer = edit(live, **given)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(param)


def test_a_system_message_is_read(live: Live) -> None:
    case = right(live, "upper")
    told = live.chat("", messages=[{"role": "developer", "content": "Be brief."}, *case.messages], seed=1)
    assert told.choices[0].message.content == case.answer
    assert told.usage.prompt_tokens > ask(live, case).usage.prompt_tokens


def test_errors_are_the_clients_own(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="more than 2048") as caught:
        live.chat("fig " * 3000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "messages"
    with pytest.raises(openai.BadRequestError, match="no JSON object"):
        function = {"name": "get_fig", "arguments": "fig"}
        call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]}
        live.chat("", messages=[{"role": "user", "content": "Again."}, call])
    with pytest.raises(openai.AuthenticationError):
        live.client.with_options(api_key="wrong").models.list()
    assert live.chat("Sort:\nsea fig ant", seed=1).choices[0].message.content == "ant fig sea", "it goes on"
