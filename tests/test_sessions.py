"""Sessions in use: conversations, threads, asyncio, rules of the caller's, interrupts; and what closed ones leave."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from contextlib import aclosing

import numpy as np
import pytest
from measure.solve_rate import puzzles
from support.cases import Case
from test_sampler import accept

import dgemma

EASY, HARD = puzzles(30, 1)[0], puzzles(54, 1)[0]
FOREVER = {"steps": 100000, "confidence": 0.0}


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model with a chat template, whose answers seldom end."""
    folder = tmp_path_factory.mktemp("talker")
    case = Case("talker", seed=6, shape=dict(layers=3, hidden=64, canvas=32, eos=[1, 6]))
    with dgemma.Model(case.convert(folder / "hf", folder / "talker.gguf")) as model:
        yield model


# ---- conversations ----


def test_a_turn_encodes_only_its_own_tokens(talker):
    """And its answer is that of a fresh session that is given the whole history."""
    messages: list[dict[str, str]] = []
    with talker.session() as session:
        held = 0
        for turn, text in enumerate(("why is the sky blue", "and you", "Hi")):
            messages.append({"role": "user", "content": text})
            result = session.generate(messages, steps=2, seed=turn, max_tokens=80)
            fresh = talker.generate(messages, steps=2, seed=turn, max_tokens=80)
            assert (result.ids, result.text, result.steps) == (fresh.ids, fresh.text, fresh.steps)
            prompt = talker.prompt_ids(messages)
            assert result.prompt_tokens == fresh.encoded_tokens == len(prompt)
            assert result.encoded_tokens == len(prompt) - held
            held = len(prompt)
            assert session.ids[:held] == prompt and len(session.ids) == session.length
            messages.append({"role": "model", "content": "blue"})  # shorter than the answer: the rest is forgotten


def test_an_answer_that_is_kept_is_not_encoded_again(talker):
    """The canvases of an answer but the last are in the cache; a history that has them goes on behind them."""
    prompt = talker.prompt_ids([{"role": "user", "content": "the sky"}])
    with talker.session() as session:
        first = session.generate(prompt, steps=1, max_tokens=96)
        kept = [token for block in first.blocks[:-1] for token in block.ids]
        assert session.ids == prompt + kept and len(kept) == 64
        history = [*prompt, *first.ids, 6, 20, 21]
        second = session.generate(history, steps=1)
        assert second.encoded_tokens == len(history) - len(prompt) - len(kept)
        assert second.ids == talker.generate(history, steps=1).ids


def test_a_session_may_hold_any_beginning_of_a_prompt(talker):
    prompt = list(range(20, 60))
    want = talker.generate(prompt, steps=2, max_tokens=32).ids
    with talker.session() as session:
        for held in ([], prompt[:1], prompt[:39], prompt, [*prompt, 5], [*prompt[:7], 9, 9], [9]):
            session.rewind(0)
            if held:
                session.encode(held)
            same = next(n for n in range(len(prompt), -1, -1) if held[:n] == prompt[:n])
            assert session.prompt(prompt) == len(prompt) - same
            assert session.ids == prompt and session.generate(steps=2, max_tokens=32).ids == want
        with pytest.raises(dgemma.UsageError, match="1025 tokens, more than the session's context of 1024"):
            session.prompt([5] * 1025)
        assert session.ids == prompt


# ---- threads ----


def test_sessions_in_threads_answer_as_they_do_alone(bundled):
    """Six threads with a session each over one model of two threads, twice: the same answers, steps and entropies."""
    cases = [(p, seed) for seed, level in enumerate((30, 40, 44, 48, 51, 54)) for p in puzzles(level, 1)]
    with dgemma.Model(threads=2) as model:

        def solve(prompt: str, seed: int) -> list[tuple[list[int], float]]:
            with model.session() as session:
                steps = session.stream(prompt, seed=seed, steps=12)
                return [(s.canvas.tolist(), s.mean_entropy) for s in steps if isinstance(s, dgemma.Step)]

        alone = [solve(puzzle.prompt, seed) for puzzle, seed in cases]
        together: dict[int, list] = {}
        workers = [
            threading.Thread(target=lambda i=i, p=p.prompt, s=s: together.update({i: [solve(p, s), solve(p, s)]}))
            for i, (p, s) in enumerate(cases)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert [together.get(i) for i in range(len(cases))] == [[want, want] for want in alone]


# ---- asyncio ----


def test_a_stream_for_asyncio_has_the_same_events(bundled):
    async def collect() -> list:
        return [event async for event in bundled.astream(EASY.prompt, seed=3)]

    events, want = asyncio.run(collect()), list(bundled.stream(EASY.prompt, seed=3))
    assert [type(event) for event in events] == [type(event) for event in want]
    assert events[-1].ids == want[-1].ids and events[-2] == want[-2]


def test_answers_for_asyncio_are_made_beside_each_other(bundled):
    async def both() -> list[dgemma.Result]:
        with bundled.session() as session:
            return await asyncio.gather(bundled.agenerate(HARD.prompt, steps=5), session.agenerate(EASY.prompt))

    hard, easy = asyncio.run(both())
    assert hard.ids == bundled.generate(HARD.prompt, steps=5).ids and easy.text == EASY.solution


def test_a_cancelled_answer_stops_within_one_step(bundled):
    """No step begins after the task has ended, and the session is free again."""
    steps: list[dgemma.Step] = []

    async def cancel() -> None:
        with bundled.session() as session:
            task = asyncio.create_task(session.agenerate(HARD.prompt, on_step=steps.append, **FOREVER))
            while len(steps) < 3:
                await asyncio.sleep(0.001)
            before = len(steps)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(steps) <= before + 1
            assert (await session.agenerate(EASY.prompt)).text == EASY.solution

    asyncio.run(cancel())


def test_a_cancelled_prompt_stops_within_one_chunk(bundled):
    done: list[int] = []

    async def cancel() -> None:
        given = dict(on_encode=lambda encoded, total: done.append(encoded), steps=1)
        task = asyncio.create_task(bundled.agenerate([7] * 1000, **given))
        while not done:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert done[-1] < 1000


def test_a_stream_for_asyncio_can_be_left_and_can_fail(bundled):
    def fail(step: dgemma.Step) -> None:
        raise ZeroDivisionError

    async def leave() -> None:
        with bundled.session() as session:
            async with aclosing(session.astream(HARD.prompt, **FOREVER)) as events:
                async for _ in events:
                    break
            with pytest.raises(ZeroDivisionError):
                await session.agenerate(HARD.prompt, on_step=fail)
            with pytest.raises(TypeError, match="temperature"):
                await session.agenerate(HARD.prompt, temperature=1)
            assert (await session.agenerate(EASY.prompt)).text == EASY.solution

    asyncio.run(leave())


# ---- a rule in place of the entropy bound ----


def test_the_entropy_bound_as_a_callers_rule_gives_the_same_tokens(bundled):
    seen: list[bool] = []

    def rule(entropy: np.ndarray, step: dgemma.Step) -> np.ndarray:
        assert entropy.dtype == np.float32 and entropy is step.entropy
        mask = accept(entropy, 0.1)
        seen.append(bool((mask == step.accepted).all()))
        return mask

    want = list(bundled.stream(HARD.prompt, seed=4))
    got = list(bundled.stream(HARD.prompt, seed=4, accept=rule))
    assert got[-1].ids == want[-1].ids and got[-1].steps == want[-1].steps == len(seen) and all(seen)
    assert all((a.accepted == b.accepted).all() for a, b in zip(got[:-2], want[:-2], strict=True))


def test_a_rule_decides_what_is_kept(bundled):
    """Accepting nothing draws every canvas anew, so no step follows from another but by self-conditioning."""
    none = [s for s in bundled.stream(HARD.prompt, steps=3, accept=lambda e, s: e < 0) if isinstance(s, dgemma.Step)]
    bound = [s for s in bundled.stream(HARD.prompt, steps=3) if isinstance(s, dgemma.Step)]
    assert not any(step.accepted.any() for step in none)
    assert (none[0].canvas == bound[0].canvas).all() and (none[1].entropy != bound[1].entropy).any()
    pinned = np.arange(96) < 9
    ids = [*bundled.tokenizer.encode(HARD.solution), 1, 0, 0, 0, 0, 0]
    steps = bundled.stream(HARD.prompt, canvas=ids, pinned=pinned, steps=2, accept=lambda e, s: e < 0)
    assert all((s.accepted == pinned).all() for s in steps if isinstance(s, dgemma.Step))


def test_a_rule_that_makes_no_sense_is_refused(bundled):
    for rule in (lambda e, s: e, lambda e, s: [True], lambda e, s: None):
        with pytest.raises(dgemma.UsageError, match=r"accept must return bool \(96,\)"):
            bundled.generate(HARD.prompt, accept=rule)
    with pytest.raises(ZeroDivisionError):
        bundled.generate(HARD.prompt, accept=lambda e, s: 1 / 0)


# ---- interrupts, and what is left ----


def test_ctrl_c_is_heard_within_one_step(bundled):
    steps: list[dgemma.Step] = []
    told: list[int] = []

    def interrupt() -> None:
        while len(steps) < 4:
            threading.Event().wait(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        told.append(len(steps))

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        bundled.generate(HARD.prompt, on_step=steps.append, **FOREVER)
    thread.join()
    assert len(steps) <= told[0] + 1


def test_ctrl_c_is_heard_between_the_layers_of_a_pass():
    """The plain backend takes long for so many tokens, which one call encodes."""
    with dgemma.Model(backend="reference", threads=1) as model, model.session() as session:
        session.encode([2, 3])
        ids = [5] * 256
        began, threads = [], []

        def encoded(done: int, total: int) -> None:
            began.append(done)

        def heard(number: int, frame: object) -> None:
            began.append(-1)
            raise KeyboardInterrupt

        before = signal.signal(signal.SIGINT, heard)
        try:
            for _ in range(20):  # one that comes after the pass is heard behind it
                threads.append(threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)))
                threads[-1].start()
                began.clear()
                try:
                    session.encode(ids, on_encode=encoded)
                    threads[-1].join()
                except KeyboardInterrupt:
                    pass
                assert session.length == (2 if began[0] < 0 else 258) and session.ids[:2] == [2, 3]
                if began == [-1]:
                    break
                session.rewind(2)
            else:
                pytest.fail("no pass was stopped")
        finally:
            signal.signal(signal.SIGINT, before)
        session.encode(ids)  # and it goes on
        assert session.length == 258


def test_stop_ends_the_call_that_runs_or_the_next(bundled):
    with bundled.session() as session:
        session.encode([2, 3])
        session.stop()
        with pytest.raises(dgemma.Stopped) as stopped:
            session.encode([4, 5])
        assert stopped.value.result is None and session.ids == [2, 3]
        session.encode([4, 5])  # it was heard once
        assert session.ids == [2, 3, 4, 5]


def test_a_stopped_stream_keeps_its_finished_canvases(talker):
    """From another thread, at any moment: they are what the stream makes unstopped, are encoded, and in the error."""
    prompt, options = talker.prompt_ids([{"role": "user", "content": "the sky"}]), {"steps": 20, "max_tokens": 192}
    whole = talker.generate(prompt, **options)
    assert len(whole.blocks) == 6
    for wait in (0.0, 0.3, 0.6, 0.9):
        with talker.session() as session:
            timer = threading.Timer(wait * whole.seconds, session.stop)
            timer.start()
            blocks = []
            try:
                for event in session.stream(prompt, **options):
                    if isinstance(event, dgemma.Block):
                        blocks.append(event)
            except dgemma.Stopped as stopped:
                if stopped.result is not None:  # else it came while the prompt was encoded
                    assert stopped.result.blocks == blocks == whole.blocks[: len(blocks)]
                    assert stopped.result.finish_reason == "stopped"
                    assert stopped.result.ids == whole.ids[: len(stopped.result.ids)]
            else:
                session.stop()
                with pytest.raises(dgemma.Stopped):
                    session.encode([2])
            timer.join()
            answer = [token for block in blocks for token in block.ids]
            assert session.ids == (prompt + answer)[: session.length]


def resident() -> int:
    """Bytes of this process that are in memory."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_hundred_sessions_leave_nothing(bundled):
    """Opened, used, closed or forgotten, some in the middle of a stream: less is left than two of them hold."""

    def use(left_open: list | None = None) -> None:
        session = bundled.session()
        session.prompt("." * 90)
        stream = session.stream(**FOREVER)
        next(stream)
        if left_open is None:
            stream.close()
            session.close()
        else:
            left_open += [session, stream]

    for _ in range(5):
        use()
    before = resident()
    held: list = []
    for _ in range(10):
        use(held)
    one = (resident() - before) / 10
    held.clear()
    for i in range(100):
        use([] if i % 2 else None)
    assert one > 200_000
    assert resident() - before < 2 * one
