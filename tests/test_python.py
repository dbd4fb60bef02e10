"""The Python API: what its docstrings promise, on the bundled Sudoku model."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgemma
from dgemma.model import has_vram
from dgemma.options import options

SUDOKU = Path(__file__).parent / "models" / "sudoku"
FOREVER = {"steps": 100000, "confidence": 0.0}  # never certain enough


def puzzles(blanks: int, count: int) -> list[tuple[str, str]]:
    """Prompts and answers of the first puzzles with so many blanks."""
    lines = [line.split() for line in (SUDOKU / "puzzles_test.txt").read_text().splitlines() if line[0] != "#"]
    found = [tuple(text.replace("/", "\n") + "\n" for text in line[1:]) for line in lines if line[0] == str(blanks)]
    return [(puzzle, solution) for puzzle, solution in found[:count]]


EASY, EASY_ANSWER = puzzles(30, 1)[0]
HARD = puzzles(54, 1)[0][0]


@pytest.fixture(scope="module")
def model() -> Iterator[dgemma.Model]:
    with dgemma.Model() as opened:
        yield opened


@pytest.fixture
def session(model: dgemma.Model) -> Iterator[dgemma.Session]:
    with model.session() as opened:
        yield opened


# ---- generating ----


@pytest.mark.parametrize(("puzzle", "solution"), [*puzzles(20, 5), *puzzles(30, 5)])
def test_the_bundled_model_solves_sudoku(model: dgemma.Model, puzzle: str, solution: str) -> None:
    result = model.generate(puzzle)
    assert result.text == str(result) == solution
    assert result.finish_reason == "stop" and result.converged and result.prompt_tokens == 91
    assert result.ids == model.tokenizer.encode(solution) and result.blocks[0].ids == result.ids
    assert result.steps == result.blocks[0].steps <= 10 and result.blocks[0].tokens == 90
    assert result.seconds > 0 and result.tokens_per_second == pytest.approx(90 / result.seconds)


def test_same_seed_same_tokens_on_any_number_of_threads(model: dgemma.Model) -> None:
    with dgemma.Model(threads=1) as one, dgemma.Model(threads=2) as two:
        assert (one.threads, two.threads) == (1, 2)
        answers = [m.generate(HARD, seed=5, steps=12) for m in (model, one, two, two)]
    assert all(a.ids == answers[0].ids and a.steps == answers[0].steps for a in answers)


def test_a_seed_changes_the_draws(model: dgemma.Model) -> None:
    first = [next(model.stream(HARD, seed=seed)) for seed in (0, 0, 2**64 - 1)]
    assert all(isinstance(step, dgemma.Step) for step in first)
    assert np.array_equal(first[0].entropy, first[1].entropy) and not np.array_equal(first[0].entropy, first[2].entropy)


def test_a_stream_is_steps_then_a_block_then_the_result(model: dgemma.Model) -> None:
    heard: list[dgemma.Step] = []
    *steps, block, result = model.stream(EASY, on_step=heard.append)
    assert all(isinstance(step, dgemma.Step) for step in steps) and steps == heard
    assert [step.index for step in steps] == list(range(len(steps))) and {step.block for step in steps} == {0}
    assert [step.converged for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[0].temperature == pytest.approx(0.8) and steps[1].temperature == pytest.approx(0.4 + 0.4 * 47 / 48)
    assert isinstance(block, dgemma.Block) and (block.index, block.steps, block.tokens) == (0, len(steps), 90)
    assert isinstance(result, dgemma.Result) and result.blocks == [block]
    assert result.ids == model.generate(EASY).ids


def test_steps_own_their_arrays(model: dgemma.Model) -> None:
    steps = [event for event in model.stream(EASY) if isinstance(event, dgemma.Step)]
    gc.collect()
    for step in steps:
        assert (step.canvas.dtype, step.entropy.dtype, step.accepted.dtype) == (np.int32, np.float32, np.bool_)
        assert step.canvas.shape == step.entropy.shape == step.accepted.shape == (96,)
        assert step.mean_entropy == pytest.approx(float(step.entropy.mean()), abs=1e-5)
    assert model.tokenizer.decode(steps[-1].canvas[:90].tolist()) == EASY_ANSWER
    steps[-1].canvas[:] = 0  # writable, and the library's memory is not behind it


def test_max_tokens_cuts_the_answer(model: dgemma.Model) -> None:
    result = model.generate(EASY, max_tokens=25)
    assert (len(result.ids), result.finish_reason, result.text) == (25, "length", EASY_ANSWER[:25])


def test_an_end_id_ends_an_answer_that_may_be_longer(model: dgemma.Model) -> None:
    result = model.generate(EASY, max_tokens=900)
    assert (result.text, len(result.blocks), result.finish_reason) == (EASY_ANSWER, 1, "stop")


def test_steps_without_convergence_are_told(model: dgemma.Model) -> None:
    result = model.generate(EASY, steps=3, confidence=0)
    assert (result.steps, result.converged, result.blocks[0].converged) == (3, False, False)


def test_a_long_answer_takes_several_canvases(model: dgemma.Model) -> None:
    given = {"max_tokens": 250, "steps": 2}
    events = list(model.stream("." * 200, **given))
    result = events[-1]
    assert isinstance(result, dgemma.Result) and result.ids == model.generate("." * 200, **given).ids
    blocks = [event for event in events if isinstance(event, dgemma.Block)]
    assert blocks == result.blocks and len(blocks) > 1 and [b.index for b in blocks] == list(range(len(blocks)))
    assert [token for block in blocks for token in block.ids] == result.ids and len(result.ids) <= 250
    assert sum(block.steps for block in blocks) == result.steps == 2 * len(blocks)
    assert [e.block for e in events if isinstance(e, dgemma.Step)] == sorted([*range(len(blocks))] * 2)


def test_a_stream_can_be_left_at_any_event(model: dgemma.Model) -> None:
    for _ in range(50):
        for _event in model.stream(HARD, **FOREVER):
            break
    stream = model.stream(HARD, **FOREVER)
    next(stream)
    stream.close()
    assert not list(stream)


def test_an_exception_in_on_step_stops(model: dgemma.Model, session: dgemma.Session) -> None:
    def stop(step: dgemma.Step) -> None:
        if step.index == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(HARD, on_step=stop, **FOREVER)
    session.encode(model.prompt_ids(EASY))
    with pytest.raises(KeyboardInterrupt):
        session.generate(on_step=stop, **FOREVER)
    assert session.generate().text == EASY_ANSWER  # and leaves the session as it was


def test_threads_share_a_model(model: dgemma.Model) -> None:
    cases = puzzles(30, 4)
    answers: dict[str, str] = {}

    def solve(puzzle: str) -> None:
        answers[puzzle] = model.generate(puzzle).text

    workers = [threading.Thread(target=solve, args=(puzzle,)) for puzzle, _ in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert answers == dict(cases)


# ---- options ----


def test_options_are_those_of_the_library(model: dgemma.Model) -> None:
    used = model.settings()
    assert list(used) == list(options())
    published = {"steps": 48, "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8, "stability": 1, "confidence": 0.005}
    own = {"plateau": 0, "settled": False, "short_canvas": False, "pins_conditioned": False, "retries": 0}
    own["commit"] = 0
    assert (
        used
        == {"max_tokens": 0, "sampler": "entropy-bound", **published, "seed": 0, **own}
        == model.settings(effort="reference")
    )
    assert model.settings(**dict.fromkeys(used)) == used  # None is the default
    assert model.settings(**used) == used
    assert model.settings(seed=2**64 - 1)["seed"] == 2**64 - 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inside: st.lists(inside, max_size=2) | st.dictionaries(st.text(max_size=4), inside, max_size=2),
    max_leaves=4,
)


@given(st.dictionaries(st.sampled_from([*options(), "effort"]), JSON, min_size=1, max_size=2))
@settings(max_examples=300, deadline=None)
def test_a_value_of_any_kind_is_taken_or_its_option_is_named(model: dgemma.Model, given: dict[str, object]) -> None:
    """As JSON gives them: a request, a line of a batch, a saved chat."""
    try:
        used = model.settings(**given)
    except (TypeError, dgemma.UsageError) as refused:
        assert any(name in str(refused) for name in given), refused
    else:
        named = {name: value for name, value in given.items() if name != "effort" and value is not None}
        assert {name: used[name] for name in named} == pytest.approx(named)


def test_an_unknown_option_is_named_beside_the_known(model: dgemma.Model) -> None:
    for call in (model.generate, model.stream):
        with pytest.raises(TypeError, match=r"'temperature'.*max_tokens.*entropy_bound.*seed"):
            call(EASY, temperature=1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("max_tokens", 2**31),
        ("steps", 0),
        ("steps", 10**400),
        ("entropy_bound", -0.1),
        ("t_min", float("nan")),
        ("t_max", float("inf")),
        ("stability", -1),
        ("confidence", -1e-9),
        ("seed", -1),
        ("seed", 2**64),
        ("sampler", "greedy"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(model: dgemma.Model, name: str, value: float | str) -> None:
    with pytest.raises(dgemma.UsageError, match=f"^{name} must be "):
        model.stream(EASY, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("steps", 2.5), ("steps", "4"), ("t_min", "0.4"), ("seed", True), ("sampler", 0)]
)
def test_a_value_of_another_type_is_refused_by_name(model: dgemma.Model, name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be a"):
        model.generate(EASY, **{name: value})


# ---- prompts ----


def test_a_prompt_is_taken_as_it_is(model: dgemma.Model) -> None:
    ids = model.tokenizer.encode(EASY)
    assert len(ids) == 90 and model.prompt_ids(EASY) == [2, *ids]
    assert model.prompt_ids(EASY.rstrip("\n")) == [2, *ids[:-1]]
    assert model.prompt_ids("\n" + EASY)[1] == ids[-1]


def test_bos_is_put_in_front_of_text_once(model: dgemma.Model) -> None:
    assert model.prompt_ids("<bos>" + EASY) == model.prompt_ids(EASY)


def test_ids_are_taken_as_they_are(model: dgemma.Model) -> None:
    ids = model.tokenizer.encode(EASY)
    assert model.prompt_ids(ids) == model.prompt_ids(np.array(ids)) == model.prompt_ids(tuple(ids)) == ids


def test_messages_without_a_chat_template_are_the_last_of_the_user(model: dgemma.Model) -> None:
    messages = [{"role": "user", "content": "1"}, {"role": "user", "content": EASY}, {"role": "model", "content": "2"}]
    assert model.prompt_ids(messages) == model.prompt_ids(EASY)
    with pytest.raises(dgemma.UsageError, match="no user message"):
        model.prompt_ids([{"role": "system", "content": "1"}])


def test_a_prompt_that_makes_no_sense_is_refused(model: dgemma.Model) -> None:
    for prompt in (b"12", {"role": "user", "content": EASY}, [1.5], [[1, 2]], ["12"]):
        with pytest.raises(TypeError):
            model.generate(prompt)
    for ids in ([2, 64], [-1], [2, 2**40]):
        with pytest.raises(dgemma.UsageError, match=r"prompt\[.\] is .*outside the vocabulary of 64"):
            model.generate(ids)


def test_a_prompt_longer_than_the_context_is_refused_with_both_numbers(model: dgemma.Model) -> None:
    with pytest.raises(dgemma.UsageError, match=r"1101 tokens.*1024"):
        model.generate("1" * 1100)
    with pytest.raises(dgemma.UsageError, match=r"max_tokens 100000 .*91.*1024"):
        model.generate(EASY, max_tokens=100000)


# ---- the model ----


def test_config_is_what_the_checkpoint_says(model: dgemma.Model) -> None:
    file = json.loads((SUDOKU / "config.json").read_text())
    text, config = file["text_config"], model.config
    assert (config.n_layer, config.d_model, config.n_vocab) == (6, text["hidden_size"], text["vocab_size"])
    assert (config.canvas_length, config.context_length) == (file["canvas_length"], text["max_position_embeddings"])
    assert config.sliding == (True,) * 5 + (False,) and config.n_head_kv == (2,) * 5 + (1,)
    assert config.end_ids == (1,) and config.causal is False
    assert (config.rms_eps, config.t_max, config.rope_base_swa) == (1e-06, 0.8, 1694.8)
    assert dict(config)["sliding_window"] == config.sliding_window == 128
    assert "d_expert" in dir(config) and "d_expert=32" in repr(config)
    assert dict(pickle.loads(pickle.dumps(config))) == dict(copy.deepcopy(config)) == dict(config)


def test_config_is_read_only(model: dgemma.Model) -> None:
    with pytest.raises(AttributeError, match="read-only"):
        model.config.n_layer = 1
    with pytest.raises(AttributeError, match="read-only"):
        del model.config.n_layer
    with pytest.raises(AttributeError, match=r"'layers'.*n_layer"):
        _ = model.config.layers


def test_a_model_says_what_runs_it(model: dgemma.Model) -> None:
    assert model.backend.split()[0] in dgemma.backends() and "cpu" in dgemma.backends()
    assert model.threads >= 1 and model.path.endswith("sudoku-q8_0.gguf") and model.path in repr(model)


def test_wrong_backends_and_threads_are_refused(model: dgemma.Model) -> None:
    with pytest.raises(dgemma.Error, match="abacus"):
        dgemma.Model(backend="abacus")
    for threads in (0, -1, 2**31):
        with pytest.raises(dgemma.UsageError, match="threads"):
            dgemma.Model(threads=threads)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(dgemma.SystemFailure, match=r"nothing\.gguf"):
        dgemma.Model(tmp_path / "nothing.gguf")
    with pytest.raises(dgemma.UsageError, match="null character"):
        dgemma.Model("a\0b")


def test_nothing_crashes_after_close() -> None:
    model = dgemma.Model()
    session, tokenizer, config = model.session(), model.tokenizer, model.config
    session.encode([2, 7])
    stream = session.stream(**FOREVER)
    next(stream)
    model.close()
    model.close()
    session.close()
    calls = [
        lambda: model.generate(EASY),
        lambda: model.stream(EASY),
        lambda: model.session(),
        lambda: model.settings(),
        lambda: model.prompt_ids(EASY),
        lambda: model.tokenizer,
        lambda: session.encode([2]),
        lambda: session.denoise([2]),
        lambda: session.rewind(0),
        lambda: session.length,
        lambda: session.generate(),
        lambda: next(stream),
    ]
    for call in calls:
        with pytest.raises(dgemma.Error, match="closed"):
            call()
    assert tokenizer.decode(tokenizer.encode(EASY)) == EASY and config.n_layer == 6
    assert "closed" in repr(model) and "closed" in repr(session)


def test_forgetting_frees_in_the_right_order() -> None:
    for _ in range(20):
        model = dgemma.Model()
        session = model.session()
        session.encode([2, 7])
        stream = session.stream(**FOREVER)
        next(stream)
        cycle = [model, session, stream]
        cycle.append(cycle)
        del model, session, stream, cycle
        gc.collect()


def test_pickling_is_refused_with_a_way_out(model: dgemma.Model, session: dgemma.Session) -> None:
    for thing in (model, session):
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"cannot be pickled or copied: \w+"):
                attempt(thing)


# ---- sessions ----


def test_encode_returns_the_logits_asked_for(model: dgemma.Model, session: dgemma.Session) -> None:
    ids = model.prompt_ids(EASY)
    assert session.encode(ids) is None and session.length == len(ids) == 91
    session.rewind(0)
    every = session.encode(ids, logits="all")
    session.rewind(0)
    final = session.encode(np.array(ids), logits="last")
    assert every is not None and every.shape == (91, 64) and every.dtype == np.float32
    assert final is not None and final.shape == (64,) and np.array_equal(every[-1], final)
    assert np.abs(every).max() <= 30.0  # softcapped


def test_encoding_in_parts_is_encoding(model: dgemma.Model, session: dgemma.Session) -> None:
    ids = (model.prompt_ids(EASY) * 8)[:700]  # more than one chunk
    whole = session.encode(ids, logits="all")
    session.rewind(0)
    parts = [session.encode(part, logits="all") for part in (ids[:1], ids[1:300], ids[300:])]
    assert whole is not None and np.allclose(whole, np.concatenate([p for p in parts if p is not None]), atol=1e-4)
    session.rewind(300)
    again = session.encode(ids[300:], logits="last")
    assert again is not None and np.allclose(whole[-1], again, atol=1e-4)


def test_an_encode_that_fails_or_is_interrupted_encodes_nothing(session: dgemma.Session) -> None:
    session.encode([2, 8, 9])

    def interrupt(done: int, total: int) -> None:
        assert (done, total) == (256, 600)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.encode([7] * 600, on_encode=interrupt)
    for ids, message in ([7, 64], "outside"), ([7] * 1022, r"1022 .*3 .*1024"), ([], "no ids"):
        with pytest.raises(dgemma.UsageError, match=message):
            session.encode(ids)
    with pytest.raises(dgemma.UsageError, match="'first'"):
        session.encode([7], logits="first")
    assert session.length == 3


def test_rewind_keeps_what_is_before(session: dgemma.Session) -> None:
    session.encode([2, 8, 9])
    session.rewind(1)
    assert session.length == 1
    for length in (2, -1):
        with pytest.raises(dgemma.UsageError, match=f"rewind to {length} of 1"):
            session.rewind(length)


def test_denoise_leaves_the_session_as_it_was(model: dgemma.Model, session: dgemma.Session) -> None:
    session.encode(model.prompt_ids(EASY))
    canvas = np.arange(96) % 64
    first = session.denoise(canvas)
    assert first.shape == (96, 64) and first.dtype == np.float32 and session.length == 91
    assert np.array_equal(first, session.denoise(canvas.tolist()))
    conditioned = session.denoise(canvas, first / 0.8)
    assert not np.array_equal(first, conditioned)
    assert np.array_equal(conditioned, session.denoise(canvas, (first / 0.8).astype(np.float64)))
    assert session.denoise(canvas[:1]).shape == (1, 64)


def test_a_canvas_of_another_shape_is_refused(session: dgemma.Session) -> None:
    session.encode([2])
    for canvas in ([], [2] * 97, [64]):
        with pytest.raises(dgemma.UsageError, match="canvas"):
            session.denoise(canvas)
    for condition in (np.zeros((1, 63), np.float32), np.zeros(64, np.float32), np.zeros((1, 64), np.int32)):
        with pytest.raises(dgemma.UsageError, match="condition"):
            session.denoise([2], condition)


def test_a_session_goes_on_from_its_answer(model: dgemma.Model, session: dgemma.Session) -> None:
    session.encode(model.prompt_ids(EASY))
    result = session.generate()
    assert result.text == EASY_ANSWER and result.prompt_tokens == session.length == 91
    session.encode([*result.ids, model.config.end_ids[0]])
    assert session.length == 182


def test_a_session_does_one_thing_at_a_time(model: dgemma.Model, session: dgemma.Session) -> None:
    session.encode(model.prompt_ids(EASY))
    stream = session.stream()
    next(stream)
    for call in (
        session.generate,
        lambda: session.encode([2]),
        lambda: session.rewind(0),
        lambda: session.denoise([2]),
    ):
        with pytest.raises(dgemma.Error, match="generating"):
            call()
    del stream
    assert session.generate().text == EASY_ANSWER


def test_an_empty_session_has_nothing_to_answer(session: dgemma.Session) -> None:
    with pytest.raises(dgemma.UsageError, match="empty prompt"):
        session.generate()


def test_a_context_is_the_callers(model: dgemma.Model) -> None:
    with model.session(context=10) as small:
        assert small.context == 10 and repr(small) == "<dgemma.Session, 0 of 10 tokens>"
        with pytest.raises(dgemma.UsageError, match=r"11 tokens .*10"):
            small.encode([2] * 11)
        small.encode([2] * 10)
        assert len(small.generate(max_tokens=96, steps=1).ids) <= 96  # the last canvas needs no room
        with pytest.raises(dgemma.UsageError, match="max_tokens 97"):
            small.generate(max_tokens=97)
    for context in (0, 1025):
        with pytest.raises(dgemma.UsageError, match=f"1024 tokens, not {context}"):
            model.session(context)


@pytest.mark.skipif("cuda" in dgemma.backends(), reason="it runs here")
def test_cuda_says_why_it_cannot_run():
    with pytest.raises(dgemma.BackendError, match=r"^cuda: ") as e:
        dgemma.Model(backend="cuda")
    reasons = ("no CUDA backend; 'make CUDA=1'", "no NVIDIA driver", "no GPU", "compute capability")
    assert any(reason in str(e.value) for reason in reasons) and "\n" not in str(e.value)


def test_a_budget_of_vram_is_for_a_gpu():
    with pytest.raises(dgemma.UsageError, match=r"vram: .* computes in RAM; .* is for the backend cuda$"):
        dgemma.Model(backend="cpu", vram="4G")


def test_backends_of_the_cpu_have_no_memory_of_their_own():
    with_vram = [name for name in ("auto", "abacus", *dgemma.backends()) if has_vram(name)]
    assert with_vram == [name for name in dgemma.backends() if name == "cuda"]
