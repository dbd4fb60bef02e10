"""Turns over one cache: what is encoded, what is kept, and that nobody can tell from the answers."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

import dgemma
from dgemma.chat.answer_parser import Delta
from dgemma.chat.conversation import Conversation
from dgemma.session import Session

NO_THOUGHT = ["<|channel>", "thought", "\n", "<channel|>"]
SHORT: dict[str, Any] = {"steps": 3, "max_tokens": 70}  # three canvases of the model here


@pytest.fixture(scope="module")
def model(chatting: str) -> Iterator[dgemma.Model]:
    with dgemma.Model(chatting) as opened:
        yield opened


@pytest.fixture
def chat(model: dgemma.Model) -> Iterator[Conversation]:
    with Conversation(model, system="the sky") as opened:
        yield opened


def result(chat: Conversation) -> dgemma.Result:
    assert chat.last is not None and chat.last.result is not None
    return chat.last.result


# ---- reuse ----


def test_a_later_turn_encodes_what_is_new_and_answers_as_a_new_session_does(tidy: dgemma.Model) -> None:
    """Real answers, right in every turn; of each prompt all before the last answer is there already."""
    said = {"Sort:\nsea fig ant": "ant fig sea", "Upper case:\nowl tea": "OWL TEA", "Again.": "OWL TEA"}
    with Conversation(tidy, system="Be brief.") as chat:
        for turn, (text, answer) in enumerate(said.items()):
            held = chat.session.ids
            reply = chat.ask(text)
            prompt = tidy.tokenizer.chat(chat.messages[:-1])
            fresh = tidy.generate(prompt)
            assert (reply.answer.text, fresh.text) == (answer, answer)
            assert (result(chat).ids, result(chat).steps) == (fresh.ids, fresh.steps)
            assert result(chat).prompt_tokens == fresh.prompt_tokens == len(prompt) == reply.encoded + reply.reused
            if turn:
                before = tidy.tokenizer.chat(chat.messages[:-3])
                assert reply.reused == len(before) - len(NO_THOUGHT) and prompt[: reply.reused] == held[: reply.reused]
                assert prompt[reply.reused] != held[reply.reused]


def test_canvases_of_an_answer_that_is_kept_are_not_encoded_again(model: dgemma.Model, chat: Conversation) -> None:
    """Long answers, of random weights: every turn is as a new session has it."""
    for seed, said in enumerate(["why is the sky blue", "and the model", "you\nthat was it"]):
        held = chat.session.ids
        reply = chat.ask(said, seed=seed, **SHORT)
        prompt = model.tokenizer.chat(chat.messages[:-1])
        fresh = model.generate(prompt, seed=seed, **SHORT)
        assert result(chat).ids == fresh.ids and len(fresh.blocks) > 1
        assert prompt[: reply.reused] == held[: reply.reused] and reply.encoded + reply.reused == len(prompt)


def test_another_answer_encodes_nothing(tidy: dgemma.Model) -> None:
    with Conversation(tidy) as chat:
        first = chat.ask("Close the brackets:\n({[")
        assert chat.unanswer() and chat.unanswered
        with closing(chat.stream(seed=1)) as events:
            list(events)
        again = chat.last
        assert again is not None and (again.encoded, again.reused) == (0, first.encoded)
        assert result(chat).seed == 1 and first.answer.text == again.answer.text == "({[]})"
        assert [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_an_edited_message_reuses_what_is_before_it(tidy: dgemma.Model) -> None:
    with Conversation(tidy, system="Be brief.") as chat:
        chat.ask("Sort:\nsea fig ant")
        chat.unanswer()
        reply = chat.ask("Sort:\nsea owl bee")
        assert [m["content"] for m in chat.messages] == ["Be brief.", "Sort:\nsea owl bee", "bee owl sea"]
        begins = "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nSort:\nsea "
        assert reply.reused == len(tidy.tokenizer.encode(begins))
        assert result(chat).ids == tidy.generate(tidy.tokenizer.chat(chat.messages[:-1])).ids


def test_only_what_is_committed_reaches_the_cache(model: dgemma.Model, chat: Conversation) -> None:
    ends = set(model.config.end_ids)
    prompts = set()
    for seed in range(12):
        chat.ask("why is the sky blue", seed=seed, **SHORT)
        prompt = model.tokenizer.chat(chat.messages[:-1])
        prompts.add(tuple(prompt))
        held = chat.session.ids
        assert held == (prompt + result(chat).ids)[: len(held)] and len(held) >= len(prompt)
        behind = held[len(prompt) :]
        assert not ends & set(behind) and len(behind) % model.config.canvas_length == 0
        chat.unanswer()
        chat.messages.pop()
    assert len(prompts) == 1


def test_an_answer_that_is_left_keeps_its_finished_canvases(model: dgemma.Model, chat: Conversation) -> None:
    chat.say("why is the sky blue")
    with closing(chat.stream(**SHORT)) as events:
        for event in events:
            if isinstance(event, dgemma.Step) and event.block == 1:
                break
    reply = chat.last
    assert reply is not None and reply.result is None and reply.answer.text
    assert chat.messages[-1] == {"role": "assistant", "content": reply.answer.text}
    assert model.generate(model.tokenizer.chat(chat.messages[:-1]), **SHORT).text.startswith(reply.answer.text)
    chat.ask("and", **SHORT)  # and the next turn is right
    assert result(chat).ids == model.generate(model.tokenizer.chat(chat.messages[:-1]), **SHORT).ids


def test_a_message_without_an_answer_is_replaced_by_the_next(chat: Conversation) -> None:
    chat.say("why")
    with closing(chat.stream(**SHORT)) as events:
        next(events)
    assert chat.unanswered and chat.last is not None and chat.last.answer.text == ""
    chat.say("and")
    assert [m["content"] for m in chat.messages] == ["the sky", "and"]


def test_an_interrupted_prompt_leaves_a_cache_that_is_right(model: dgemma.Model, chat: Conversation) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    chat.ask("why", **SHORT)
    chat.say("the sky is blue " * 20)
    with pytest.raises(KeyboardInterrupt):
        list(chat.stream(on_encode=interrupt, **SHORT))
    chat.say("and")
    list(chat.stream(**SHORT))
    assert result(chat).ids == model.generate(model.tokenizer.chat(chat.messages[:-1]), **SHORT).ids


# ---- room ----


def test_room_grows_with_what_is_asked_up_to_the_models_context(model: dgemma.Model) -> None:
    with Conversation(model, [{"role": "user", "content": "the sky is " * 60}]) as chat:
        chat._session.close()
        chat._session = model.session(16)  # as if there had been little room
        list(chat.stream(**SHORT))
        assert chat.session.context >= len(model.tokenizer.chat(chat.messages[:-1])) + 64
        assert chat.last is not None and chat.last.reused == 0
        chat.unanswer()
        list(chat.stream(**SHORT))
        held, reply = chat.session.ids, chat.last
        assert reply is not None and (reply.encoded, reply.reused) == (0, len(model.tokenizer.chat(chat.messages[:-1])))
        with pytest.raises(dgemma.UsageError, match=r"need a context of \d+ tokens, more than 512"):
            chat.ask("the sky is " * 300, **SHORT)
        assert chat.session.ids == held  # as it was
    with Conversation(model, context=20) as small, pytest.raises(dgemma.UsageError, match="more than 20"):
        small.ask("the sky is blue", **SHORT)


def test_wrong_prompts_and_options_are_refused(model: dgemma.Model, chat: Conversation) -> None:
    with pytest.raises(dgemma.UsageError, match="no message"):
        chat.stream()
    with pytest.raises(dgemma.UsageError, match="max_tokens"):
        chat.ask("why", max_tokens=-1)
    chat.ask("why", **SHORT)


def test_one_answer_at_a_time(chat: Conversation) -> None:
    chat.say("why")
    running = chat.stream(**SHORT)
    next(running)
    with pytest.raises(dgemma.Error, match="is answering"):
        list(chat.stream(**SHORT))
    del running  # forgotten is closed
    gc.collect()
    chat.ask("and", **SHORT)


def test_a_closed_model_ends_its_conversations(chatting: str) -> None:
    with dgemma.Model(chatting) as model:
        chat = Conversation(model)
        chat.say("why")
        running = chat.stream(**SHORT)
        next(running)
    with pytest.raises(dgemma.Error, match="closed"):
        next(running)
    assert chat.unanswered and chat.last is not None and chat.last.result is None


# ---- thoughts ----


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, model: dgemma.Model) -> list[str]:
    """What the model is made to answer, turn by turn; canvases are cut at |."""
    answers: list[str] = []

    def stream(self: Session, ids: list[int], **_: object) -> Iterator[dgemma.Block | dgemma.Result]:
        parts = [model.tokenizer.encode(part) for part in answers.pop(0).split("¦")]
        blocks = [dgemma.Block(i, 1, len(part), True, part) for i, part in enumerate(parts)]
        yield from blocks
        every = [token for part in parts for token in part]
        yield dgemma.Result(
            "", every, blocks, len(blocks), True, "stop", len(ids), 0, 0, 0, None, 1.0, float(len(every))
        )

    monkeypatch.setattr(Session, "stream", stream)
    return answers


def test_a_thought_is_told_apart_and_left_out_of_later_prompts(
    model: dgemma.Model, chat: Conversation, scripted: list[str]
) -> None:
    chat.thinking = True
    scripted += ["<|channel>thou¦ght\nis it¦ blue<channel|>the sky¦ is", "and"]
    chat.say("why")
    deltas = [event for event in chat.stream() if isinstance(event, Delta)]
    assert deltas == [
        Delta("thinking", "is it"),
        Delta("thinking", " blue"),
        Delta("text", "the sky"),
        Delta("text", " is"),
    ]
    assert chat.messages[-1] == {"role": "assistant", "content": "the sky is", "thinking": "is it blue"}
    assert chat.ask("and").answer.thinking == ""
    prompt = model.tokenizer.decode(chat.prompt(), special=True)
    assert "the sky is<turn|>" in prompt and "is it blue" not in prompt and prompt.endswith("<|turn>model\n")


def test_a_model_that_thinks_is_asked_to_and_asked_not_to(tidy: dgemma.Model) -> None:
    """Real thoughts: told apart, kept beside the answer, and in no later prompt."""
    with Conversation(tidy, thinking=True) as chat:
        first = chat.ask("Sort, upper case:\nsea fig ant").answer
        assert (first.thinking.strip(), first.text) == ("ant fig sea", "ANT FIG SEA")
        kept = {"role": "assistant", "content": "ANT FIG SEA", "thinking": first.thinking}
        assert chat.messages[-1] == kept
        chat.say("Sort:\nowl bee fox")
        assert "ant fig sea" not in tidy.tokenizer.decode(chat.prompt(), special=True)
        chat.thinking = False
        second = chat.ask("Sort:\nowl bee fox").answer
        assert (second.thinking, second.text) == ("", "bee fox owl")


def test_a_tool_is_called_and_its_answer_is_told(tidy: dgemma.Model) -> None:
    parameters = {"type": "object", "properties": {"city": {"type": "string"}, "day": {"type": "integer"}}}
    tool = {"type": "function", "function": {"name": "get_sun", "description": "", "parameters": parameters}}
    with Conversation(tidy, tools=[tool]) as chat:
        (call,) = chat.ask("Call get_sun:\ncity=oslo\nday=2").answer.calls
        assert (call.name, call.arguments) == ("get_sun", {"city": "oslo", "day": 2})
        chat.messages.append({"role": "tool", "name": "get_sun", "content": "12"})
        list(chat.stream())
        assert chat.messages[-1] == {"role": "assistant", "content": "It is 12."}


def test_a_system_message_comes_and_goes(chat: Conversation) -> None:
    assert chat.system == "the sky"
    chat.say("why")
    chat.system = "the model"
    assert [m["content"] for m in chat.messages] == ["the model", "why"]
    chat.system = None
    assert chat.system is None and [m["content"] for m in chat.messages] == ["why"]
