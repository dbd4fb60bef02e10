"""The bundled model `tidy` does its text tasks, as prompts and as holes, about as often as its README says."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from measure.success_rate import FORMS, names, success_rate
from models.tidy import shipped, tasks

import dgemma
from dgemma.convert import convert
from dgemma.model import bundled

TIDY = Path(__file__).parent / "models" / "tidy"


@pytest.mark.parametrize(("form", "task"), [(form, task) for form in FORMS for task in names(form)])
def test_it_does_what_it_was_trained_for(tidy: dgemma.Model, form: str, task: str) -> None:
    """Held-out cases; the whole table over 100 of each and three seeds: tests/measure/success_rate.py."""
    rate = success_rate(tidy, task, form, count=10)
    assert rate.right >= 8, f"{rate.right} of {rate.tries}: {rate.first_wrong}"


def test_the_bundled_file_is_the_checkpoint_converted(tmp_path: Path) -> None:
    convert(TIDY, tmp_path / "tidy.gguf", type="q8_0")
    assert (tmp_path / "tidy.gguf").read_bytes() == Path(bundled("tidy")).read_bytes()


def test_another_bundled_model_is_refused() -> None:
    with pytest.raises(dgemma.UsageError, match="no model 'chess'"):
        bundled("chess")


def test_the_template_writes_gemmas_turns(tidy: dgemma.Model) -> None:
    """System, tools, thinking, calls and responses; and thoughts are no part of later prompts."""
    render, user = tidy.tokenizer.render, {"role": "user", "content": " Sort:\nfig ant\n"}
    asked = "<|turn>user\nSort:\nfig ant<turn|>\n"
    answer = "<|turn>model\n<|channel>thought\n<channel|>"
    assert render([user]) == f"<bos>{asked}{answer}"
    assert render([user], thinking=True) == f"<bos><|turn>system\n<|think|>\n<turn|>\n{asked}<|turn>model\n"
    told = render([{"role": "system", "content": "Be brief."}, user])
    assert told == f"<bos><|turn>system\nBe brief.<turn|>\n{asked}{answer}"

    thought = {"role": "assistant", "content": "<|channel>thought\nSort<channel|>ant fig"}
    assert render([user, thought, user]) == f"<bos>{asked}<|turn>model\nant fig<turn|>\n{asked}{answer}"

    tool = tasks.declare("find", {"city": "oslo", "day": "2"})
    call = {"function": {"name": "find", "arguments": {"city": "oslo", "day": 2}}}
    calling = {"role": "assistant", "tool_calls": [call]}
    found = {"role": "tool", "name": "find", "content": "ant"}
    assert render([user, calling, found], tools=[tool]) == (
        '<bos><|turn>system\n<|tool>declaration:find{city:<|"|>STRING<|"|>,day:<|"|>INTEGER<|"|>}<tool|><turn|>\n'
        f'{asked}<|turn>model\n<|tool_call>call:find{{city:<|"|>oslo<|"|>,day:2}}<tool_call|>'
        '<|tool_response>response:find{value:<|"|>ant<|"|>}<tool_response|><|channel>thought\n<channel|>'
    )


def test_words_are_single_tokens_wherever_a_text_is_cut(tidy: dgemma.Model) -> None:
    """What holes rely on: pieces cut at words and marks have the tokens of the whole."""
    encode = tidy.tokenizer.encode
    assert all(len(encode(word)) == len(encode(word.upper())) == 1 for word in tasks.WORDS)
    for form in tasks.FORMS:
        for task in names(form):
            for holes in tasks.holes(form, task, 20):
                pieces = [i for text, _ in holes.pieces for i in encode(text)]
                assert tidy.tokenizer.decode(pieces, special=True) == holes.text
                assert len(pieces) + holes.slack <= tidy.config.canvas_length, holes


def test_no_held_out_case_is_trained_on() -> None:
    tested = [case for task in tasks.TASKS for case in tasks.cases(task, 40)]
    trained = [item if isinstance(item, tasks.Case) else item.case for item in islice(tasks.training(0), 4000)]
    assert all(case.held_out for case in tested) and not any(case.held_out for case in trained)
    single = {case.messages[0]["content"] for case in tested if len(case.messages) == 1}
    passages = {text.partition("\n")[2] for text in single}
    assert not passages & {m.get("content", "").partition("\n")[2] for case in trained for m in case.messages}


def test_every_right_answer_is_told_from_a_wrong_one() -> None:
    for task in tasks.TASKS:
        for case in tasks.cases(task, 5):
            assert case.right(case.output) and not case.right(case.output + ".") and not case.right("")


def test_dg_evals_tasks_for_it_are_its_held_out_cases() -> None:
    for name, text in shipped.made().items():
        assert (shipped.DATA / name).read_text() == text, f"{name}: cd tests && python -m models.tidy.shipped"
