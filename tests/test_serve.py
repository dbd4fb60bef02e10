"""dg-serve, live: driven by OpenAI's own client, whose types its answers have to fit."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params
from starlette.requests import Request
from support.serving import PATIENCE, Live, get, post, serving, soon

import dgemma
from dgemma.chat.answer_parser import Delta, read
from dgemma.options import options
from dgemma.serve.app import ActiveRequest
from dgemma.serve.auth import is_loopback
from dgemma.serve.edits import EditDiffusion, EditRequest
from dgemma.serve.errors import Refusal
from dgemma.serve.generation import WorkerEvents
from dgemma.serve.lifecycle import listen
from dgemma.serve.metrics import Metrics
from dgemma.serve.parameters import PARAMETERS, parameters
from dgemma.serve.requests import ChatRequest, Diffusion, TextRequest
from dgemma.serve.sessions import Pool
from dgemma.serve.stops import StopFilter
from dgemma.serve.worker import Job, Worker

PUZZLE = (Path(__file__).parent / "models" / "sudoku" / "puzzle.txt").read_text()
SHORT = {"steps": 3, "max_tokens": 70}


@pytest.fixture(scope="module")
def chat_model(chatting: str) -> Iterator[dgemma.Model]:
    with dgemma.Model(chatting) as model:
        yield model


@pytest.fixture(scope="module")
def live(chat_model: dgemma.Model) -> Iterator[Live]:
    with serving(chat_model) as found:
        yield found


@pytest.fixture(scope="module")
def sudoku(bundled: dgemma.Model) -> Iterator[Live]:
    with serving(bundled) as found:
        yield found


# ---- answers ----


def test_a_completion_is_what_the_model_generates(sudoku: Live, bundled: dgemma.Model) -> None:
    expected = bundled.generate(PUZZLE, seed=5)
    answer = sudoku.complete(PUZZLE, seed=5)
    choice = answer.choices[0]
    assert choice.text == expected.text and choice.finish_reason == expected.finish_reason == "stop"
    seconds = choice.diffusion.pop("seconds")
    assert choice.diffusion == {"seed": 5, "steps": expected.steps, "converged": True, "fault": None}
    assert set(seconds) == {"waiting", "prompt", "steps"} and seconds["steps"] > 0
    assert answer.usage.prompt_tokens == expected.prompt_tokens and answer.usage.completion_tokens == len(expected.ids)
    again = sudoku.complete(PUZZLE, seed=5)
    assert again.choices[0].text == expected.text
    assert again.usage.prompt_tokens_details.cached_tokens == expected.prompt_tokens


def test_several_prompts_and_answers_are_choices_in_order(sudoku: Live, bundled: dgemma.Model) -> None:
    other = PUZZLE.replace("5", ".", 1)
    prompts = [bundled.prompt_ids(p) for p in (PUZZLE, other)]
    answer = sudoku.complete(prompts, n=2, seed=3, extra_body={"diffusion": {"steps": 2}})
    expected = [bundled.generate(p, seed=s, steps=2).text for p in (PUZZLE, other) for s in (3, 4)]
    assert [c.text for c in answer.choices] == expected and [c.index for c in answer.choices] == [0, 1, 2, 3]


def test_a_canvas_with_pins_is_kept(sudoku: Live, bundled: dgemma.Model) -> None:
    ids = bundled.tokenizer.encode("534678912\n")
    pinned = [i != 7 for i in range(10)]
    own = {"canvas": ids, "pinned": pinned}
    expected = bundled.generate(PUZZLE, canvas=ids, pinned=pinned, seed=1)
    answer = sudoku.complete(PUZZLE, seed=1, extra_body={"diffusion": own})
    assert answer.choices[0].text == expected.text
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        sudoku.complete(PUZZLE, max_tokens=5, extra_body={"diffusion": own})


def test_a_chat_is_what_the_model_generates_whole_or_streamed(live: Live, chat_model: dgemma.Model) -> None:
    expected = chat_model.generate([{"role": "user", "content": "why"}], seed=7, **SHORT)
    parts = read(chat_model.tokenizer, expected.ids)
    given = {
        "seed": 7,
        "max_tokens": 70,
        "extra_body": {"diffusion": {"sampler": "entropy-bound", "steps": 3, "events": None, "effort": None}},
    }
    answer = live.chat("why", **given)
    whole = answer.choices[0]
    calls = "".join(call.text for call in parts.calls)  # without tools in the request, they are text
    assert len(whole.message.content) == len(parts.text) + len(calls) and (calls or whole.message.content == parts.text)
    assert getattr(whole.message, "reasoning_content", "") == parts.thinking
    assert whole.finish_reason == expected.finish_reason and answer.usage.completion_tokens == len(expected.ids)
    chunks = list(live.chat("why", stream=True, stream_options={"include_usage": True}, **given))
    said = [c.choices[0].delta for c in chunks if c.choices]
    assert said[0].role == "assistant" and "".join(d.content or "" for d in said) == whole.message.content
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in said) == parts.thinking
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.finish_reason
    assert not chunks[-1].choices and chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1


def test_a_conversation_encodes_only_what_is_new(live: Live) -> None:
    given = {"seed": 1, "max_tokens": 70, "extra_body": {"diffusion": {"steps": 2}}}
    first = live.chat("the sky is blue and you are", **given)
    messages = [
        {"role": "user", "content": "the sky is blue and you are"},
        first.choices[0].message.model_dump(),
        {"role": "user", "content": "why"},
    ]
    live.chat("is it", **given)  # somebody else's, meanwhile
    second = live.chat("", messages=messages, **given)
    assert second.usage.prompt_tokens_details.cached_tokens >= first.usage.prompt_tokens - 4


def test_every_step_is_an_event_when_asked(live: Live) -> None:
    own = {"steps": 3, "events": True}
    chunks = list(live.chat("why", seed=2, stream=True, max_tokens=10, extra_body={"diffusion": own}))
    steps = [c.canvas for c in chunks if getattr(c, "canvas", None)]
    figures = next(c.choices[0].diffusion for c in chunks if c.choices and c.choices[0].finish_reason)
    assert [s["step"] for s in steps] == list(range(figures["steps"]))
    assert all(len(s["ids"]) == len(s["text"]) == len(s["entropy"]) == len(s["accepted"]) for s in steps)
    with pytest.raises(openai.BadRequestError, match="needs stream"):
        live.chat("why", extra_body={"diffusion": own})


CALL = '<|tool_call>call:look{at:<|"|>the "sky"<|"|>,deep:{n:[1,2.5,true]}}<tool_call|>'
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def saying(model: dgemma.Model, text: str) -> dict[str, Any]:
    """Pins a text, so that a model without a mind of its own says it."""
    ids = [*model.tokenizer.encode(text), model.config.end_ids[0]]
    return {"diffusion": {"canvas": ids, "pinned": [True] * len(ids), "steps": 1}}


def test_calls_arrive_as_calls_with_json(live: Live, chat_model: dgemma.Model) -> None:
    asked = {"tools": TOOLS, "extra_body": saying(chat_model, "Hi" + CALL)}
    choice = live.chat("why", **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and choice.message.content == "Hi" and call.function.name == "look"
    assert json.loads(call.function.arguments) == {"at": 'the "sky"', "deep": {"n": [1, 2.5, True]}}
    deltas = [c.choices[0] for c in live.chat("why", stream=True, **asked)]
    (streamed,) = [call for c in deltas for call in c.delta.tool_calls or ()]
    assert streamed.function == type(streamed.function)(**call.function.model_dump()) and streamed.index == 0
    assert deltas[-1].finish_reason == "tool_calls"
    response = {"role": "tool", "tool_call_id": call.id, "content": "blue"}
    messages = [{"role": "user", "content": "why"}, choice.message.model_dump(), response]
    assert live.chat("", messages=messages, max_tokens=5, tools=TOOLS).choices[0].message.role == "assistant"
    with pytest.raises(openai.BadRequestError, match="no call before"):
        live.chat("", messages=[messages[0], response])


@pytest.mark.parametrize("tools", [TOOLS, None])
def test_what_is_no_call_or_was_not_offered_is_text(live: Live, chat_model: dgemma.Model, tools: Any) -> None:
    text = CALL if tools is None else CALL.replace("{n:", "{n")
    choice = live.chat("why", extra_body=saying(chat_model, text), **({"tools": tools} if tools else {})).choices[0]
    assert choice.message.content == text and not choice.message.tool_calls and choice.finish_reason == "stop"


def test_a_thought_is_told_apart(live: Live, chat_model: dgemma.Model) -> None:
    asked = {"reasoning_effort": "high", "extra_body": saying(chat_model, "<|channel>thought\nit is<channel|>blue")}
    message = live.chat("why", **asked).choices[0].message
    assert (message.reasoning_content, message.content) == ("it is", "blue")


@pytest.mark.parametrize("stop", ["is", ["of", " is", "blue is"]])
def test_an_answer_ends_before_a_stop_text(live: Live, chat_model: dgemma.Model, stop: Any) -> None:
    for stream in (False, True):
        asked = {"stop": stop, "stream": stream, "extra_body": saying(chat_model, "the sky is blue is it")}
        got = live.chat("why", **asked)
        if stream:
            chunks = list(got)
            text = "".join(c.choices[0].delta.content or "" for c in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = got.choices[0].message.content, got.choices[0].finish_reason
            assert got.usage.completion_tokens < len(chat_model.tokenizer.encode("the sky is blue is it"))
        assert text.rstrip() == "the sky" and reason == "stop"


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stops_do_not_depend_on_how_a_text_is_cut(parts: list[str], stops: list[str]) -> None:
    def heard(pieces: list[str]) -> str:
        waits = StopFilter(tuple(stops))
        told = [delta.text for piece in pieces for delta in waits.feed([Delta("text", piece)])]
        return "".join(told + ([] if waits.hit else [delta.text for delta in waits.finish()]))

    text = "".join(parts)
    assert heard(parts) == heard([text]) and not any(stop in heard(parts) for stop in stops)
    if not any(stop in text for stop in stops):
        assert heard(parts) == text


# ---- parameters ----


def test_every_parameter_of_the_client_is_used_ignored_or_refused() -> None:
    for endpoint, module in (("chat", chat_params), ("completions", text_params)):
        known = set(get_type_hints(module.CompletionCreateParamsBase)) | {"stream"}
        assert not known - set(parameters(endpoint)), "parameters that nothing is said of"
    for endpoint, schema in (("chat", ChatRequest), ("completions", TextRequest), ("edits", EditRequest)):
        used = {p.name for p in PARAMETERS if p.what == "used" and endpoint in p.of}
        assert used == set(schema.model_fields)
    assert set(options()) < set(Diffusion.model_fields)
    assert set(options()) - set(EditDiffusion.model_fields) == {"max_tokens"}, "an edit is as long as its hole"


@pytest.mark.parametrize("name", [p.name for p in parameters("chat").values() if p.what == "refused"])
def test_what_is_refused_is_refused_by_name(live: Live, name: str) -> None:
    value = {"logprobs": True, "parallel_tool_calls": False, "functions": []}.get(name, 1)
    with pytest.raises(openai.BadRequestError, match=name) as caught:
        live.chat("why", extra_body={name: value})
    assert caught.value.param == name and caught.value.code == "unsupported_parameter"


def test_what_is_ignored_is_named(live: Live) -> None:
    raw = live.client.chat.completions.with_raw_response.create(
        model=live.model, messages=[{"role": "user", "content": "why"}], max_tokens=3, temperature=0.5, top_p=None,
        presence_penalty=0, extra_body={"top_k": 4},
    )  # fmt: skip
    assert raw.headers["x-ignored-parameters"] == "temperature, top_k"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"diffusion": {"nonsense": 1}}, "diffusion.nonsense"),
        ({"diffusion": {"steps": 0}}, "diffusion.steps"),
        ({"diffusion": {"sampler": "greedy"}}, "diffusion.sampler"),
        ({"diffusion": {"effort": "lazy"}}, "diffusion.effort"),
        ({"diffusion": {"seed": 1}, "seed": 1}, "seed"),
        ({"seed": -1}, "seed"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"stop": [""]}, "stop"),
        ({"max_tokens": 100000}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, None),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"diffusion": {"canvas": [1], "pinned": [True, False]}}, None),
    ],
)
def test_what_is_wrong_is_named(live: Live, body: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        live.chat("why", extra_body=body)
    assert param is None or caught.value.param == param


def test_another_model_and_another_path_are_not_there(live: Live) -> None:
    assert [m.id for m in live.client.models.list()] == [live.model] == [live.client.models.retrieve(live.model).id]
    with pytest.raises(openai.NotFoundError):
        live.client.models.retrieve("gpt")
    with pytest.raises(openai.NotFoundError):
        live.client.embeddings.create(model="a", input="b")
    with pytest.raises(openai.NotFoundError, match="is served"):
        live.client.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "why"}])


# ---- safety ----


def test_a_key_is_needed_for_all_but_health(live: Live) -> None:
    assert get(f"{live.url}/health").json() == {"status": "ok"}
    for headers in ({}, {"Authorization": "Bearer secret2"}, {"Authorization": "Basic secret"}):
        for path in ("/v1/models", "/metrics"):
            assert get(live.url + path, headers=headers).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        live.client.with_options(api_key="wrong").models.list()


def test_bodies_are_json_and_short_and_no_other_page_may_ask(bundled: dgemma.Model) -> None:
    with serving(bundled, key=None, body=1000) as live:
        url, kind = f"{live.url}/v1/completions", {"Content-Type": "application/json"}
        assert post(url, content=b"x" * 1001, headers=kind).status_code == 413
        assert post(url, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert post(url, content=b"[" * 900, headers=kind).json()["error"]["code"] == "invalid_json"
        assert get(f"{live.url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
        answer = get(f"{live.url}/v1/models", headers={"Origin": "http://evil.example"})
        assert answer.status_code == 200 and not [h for h in answer.headers if h.startswith("access-control")]


def test_the_command_wants_a_key_beyond_this_machine() -> None:
    run = [sys.executable, "-m", "dgemma.cli.serve", "--host", "0.0.0.0"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and "--api-key" in done.stderr and done.stderr.count("\n") == 1
    assert is_loopback("::1") and is_loopback("127.9.9.9") and not is_loopback("0.0.0.0") and not is_loopback("::")


def test_small_pieces_of_an_answer_are_sent_at_once() -> None:
    """Else the body waits until the client has confirmed the headers, and each piece of a stream for the one before."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        (at,) = listen("127.0.0.1", 0)
        async with await asyncio.start_server(connected, sock=at):
            _, writer = await asyncio.open_connection(*at.getsockname())
            try:
                return await asyncio.wait_for(found, PATIENCE)
            finally:
                writer.close()

    assert asyncio.run(accepted())


# ---- several users ----

LONG = {"max_tokens": 400, "extra_body": {"diffusion": {"steps": 5000, "confidence": 0, "stability": 1000}}}


def test_who_leaves_is_not_worked_for(live: Live) -> None:
    left = live.figure("dgemma_requests_left_total")
    with live.chat("why", stream=True, **LONG) as stream:
        next(iter(stream))
        assert live.figure("dgemma_requests_running") == 1
    soon(lambda: live.figure("dgemma_requests_left_total") == left + 1, "a stream that was left was not noticed")
    soon(lambda: live.figure("dgemma_requests_running") == 0, "work went on for nobody")

    body = {"model": live.model, "messages": [{"role": "user", "content": "why"}], "max_tokens": 400}
    with asking(live, body | LONG["extra_body"]):
        soon(lambda: live.figure("dgemma_requests_running") == 1, "nothing runs")
    soon(lambda: live.figure("dgemma_requests_left_total") == left + 2, "a client that left was not noticed")
    soon(lambda: live.figure("dgemma_requests_running") == 0, "work went on for nobody")


def asking(live: Live, body: dict[str, Any]) -> socket.socket:
    """A connection on which a chat was asked for, and which nobody reads from yet."""
    url = httpx.URL(live.url)
    text = json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.host}:{url.port}\r\nAuthorization: Bearer secret\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
    )
    connection = socket.create_connection((str(url.host), int(url.port or 0)))
    connection.sendall(head.encode() + text)
    return connection


def test_what_a_request_held_goes_with_it(live: Live) -> None:
    """At once, not when Python next looks for cycles: that is seldom, and a refused body may be megabytes."""

    def held() -> int:
        return sum(isinstance(each, (ActiveRequest, Job, Refusal, Request)) for each in gc.get_objects())

    asked = {"model": live.model, "messages": [{"role": "user", "content": "why"}], "max_tokens": 70}
    streamed = {**asked, "stream": True}
    until = [
        (asked, b'"usage"'),
        (streamed, b"[DONE]"),
        (streamed, b"data"),  # and leaves
        (asked | LONG["extra_body"], b""),
        ({**asked, "seed": -1}, b"seed"),
        ({**asked, "model": "gpt"}, b"gpt"),
        ({**asked, "max_tokens": 10**9}, b"max_tokens"),
        ({**streamed, "diffusion": {"deadline": 1e-9}}, b"deadline"),
        ({**asked, "diffusion": {"deadline": 1e-9}}, b"deadline"),
    ]
    gc.collect()
    before = held()
    gc.disable()
    try:
        for body, what in until:
            with asking(live, body) as connection:
                connection.settimeout(PATIENCE)
                heard = b""
                while what not in heard:
                    more = connection.recv(1 << 16)
                    assert more, heard
                    heard += more
            soon(lambda: held() <= before, f"what was held for {body} is still there")
    finally:
        gc.enable()


def test_a_deadline_ends_a_request(live: Live) -> None:
    own = {"diffusion": {**LONG["extra_body"]["diffusion"], "deadline": 0.3}}
    with pytest.raises(openai.InternalServerError) as caught:
        live.chat("why", max_tokens=400, extra_body=own)
    assert caught.value.status_code == 504
    with pytest.raises(openai.APIError, match="deadline"):
        list(live.chat("why", stream=True, max_tokens=400, extra_body=own))
    soon(lambda: live.figure("dgemma_requests_running") == 0, "work went on behind the deadline")


def test_a_full_queue_says_when_to_come_again(chat_model: dgemma.Model) -> None:
    with serving(chat_model, queue=1, together=1) as live:
        streams = [live.chat("why", stream=True, **LONG)]
        soon(lambda: live.figure("dgemma_requests_running") == 1, "nothing runs")
        streams.append(live.chat("why", stream=True, **LONG))
        soon(lambda: live.figure("dgemma_requests_waiting") == 1, "nothing waits")
        with pytest.raises(openai.RateLimitError) as caught:
            live.chat("why")
        assert int(caught.value.response.headers["retry-after"]) >= 1
        for stream in streams:
            stream.close()


def test_an_end_finishes_nothing_where_there_is_no_grace(chat_model: dgemma.Model) -> None:
    """Who is at work and who waits hear 503, and when to come again; then the server ends."""
    with serving(chat_model, grace=0, together=2) as live:
        stream = iter(live.chat("why", stream=True, **LONG))
        next(stream)
        heard: list[openai.APIStatusError] = []

        def ask() -> None:
            with pytest.raises(openai.InternalServerError) as caught:
                live.chat("why", **LONG)
            heard.append(caught.value)

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        soon(lambda: live.figure("dgemma_requests_running") == 2, "the second does not run")
        soon(lambda: live.figure("dgemma_requests_waiting") == 1, "the third does not wait")
        live.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        for asker in askers:
            asker.join(PATIENCE)
        assert [e.status_code for e in heard] == [503, 503] and {e.code for e in heard} == {"shutting_down"}
        assert all(int(e.response.headers["retry-after"]) >= 1 for e in heard)


def test_who_comes_to_a_server_that_ends_is_sent_away(chat_model: dgemma.Model) -> None:
    with serving(chat_model) as live:
        live.server.worker.drain()
        assert get(f"{live.url}/health").status_code == 503
        with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
            live.chat("why")
        assert caught.value.status_code == 503 and int(caught.value.response.headers["retry-after"]) >= 1


def test_answers_together_are_those_of_one_alone(live: Live, chat_model: dgemma.Model) -> None:
    texts = ["why", "the sky is", "and you", "to it", "blue in a model", "was that you"]
    given = {"max_tokens": 70, "extra_body": {"diffusion": {"steps": 4}}}
    alone = [live.chat(text, seed=i, **given).choices[0].message.content for i, text in enumerate(texts)]
    got: dict[int, str] = {}

    def ask(i: int) -> None:
        got[i] = live.chat(texts[i], seed=i, **given).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(len(texts))] == alone


def test_who_asks_much_does_not_keep_others_waiting(chat_model: dgemma.Model) -> None:
    """With one place, a client's second request comes behind the first one of everybody who waits."""
    begun: list[str] = []
    gates = {name: threading.Event() for name in ("first", "a1", "a2", "a3", "b1", "c1")}

    def job(name: str, client: str) -> Job:
        def begin(session: dgemma.Session, waited: float) -> WorkerEvents:
            begun.append(name)
            assert gates[name].wait(PATIENCE)
            yield from ()

        return Job([2], 64, begin, client, lambda told: None)

    worker = Worker(chat_model, Pool(chat_model, 256, 1 << 30), Metrics(), queue=8, together=1)
    try:
        worker.submit(job("first", "z"))
        soon(lambda: begun == ["first"], "nothing is begun")
        for name, client in (("a1", "a"), ("a2", "a"), ("a3", "a"), ("b1", "b"), ("c1", "c")):
            worker.submit(job(name, client))
        for gate in gates.values():
            gate.set()
        soon(lambda: len(begun) == len(gates), f"only {begun} were begun")
        assert begun == ["first", "a1", "b1", "c1", "a2", "a3"]
    finally:
        worker.close()


def test_the_longest_beginning_wins_within_the_budget(chat_model: dgemma.Model) -> None:
    one = chat_model.session_bytes(64)
    pool = Pool(chat_model, 256, int(2.5 * one))
    kept = {}
    for text in ("the sky is blue and why", "you are a model with it"):
        ids = chat_model.prompt_ids([{"role": "user", "content": text}])
        slot = pool.acquire(ids, 64)
        assert slot is not None
        slot.session.prompt(ids)
        slot.peak = slot.session.length
        kept[text] = (slot, ids)
        pool.release(slot)
    for slot, ids in kept.values():
        assert pool.acquire([*ids, 20], 64) is slot
        pool.release(slot)
    first, second = (pool.acquire(ids, 64) for _, ids in kept.values())
    assert first is not second and pool.acquire([2], 64) is None, "a third beside two is beyond the budget"
    assert pool.bytes <= 2.5 * one
    pool.release(second)
    pool.release(first)
    third = pool.acquire([2], 64)
    assert third is first and third.session.length == 0, "the one used longest ago gives its memory"
    assert pool.bytes <= 2.5 * one
    pool.close()


def test_a_signal_finishes_what_is_at_work(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run = [sys.executable, "-m", "dgemma.cli.serve", "--port", str(port), "--name", "it", "--grace", "600"]
    server = subprocess.Popen(run, stderr=subprocess.PIPE, text=True, env={**os.environ, "DGEMMA_API_KEY": "k"})
    try:
        assert server.stderr is not None and f":{port}/v1" in server.stderr.readline()
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="k", max_retries=0, timeout=600)
        slow = {"diffusion": {"steps": 40, "stability": 39, "events": True}}
        stream = iter(client.completions.create(model="it", prompt=PUZZLE, stream=True, seed=1, extra_body=slow))
        next(stream)
        server.send_signal(signal.SIGTERM)
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
        assert len(text.strip().splitlines()) == 9
        log = server.stderr.read()
        assert server.wait(PATIENCE) == 0 and text[:10] not in log and "200" in log
    finally:
        server.kill()
        server.wait()
