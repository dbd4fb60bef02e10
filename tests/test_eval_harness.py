"""lm-eval drives our models: a tiny local task through its own evaluator. Skipped where lm-eval is not installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'dgemma[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

import dgemma  # noqa: E402
from dgemma.errors import UsageError  # noqa: E402
from dgemma.eval.harness import Harness, cut  # noqa: E402
from dgemma.eval.prompts import puzzles  # noqa: E402

TASK = """
task: tiny_sudoku
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{puzzle}}}}"
doc_to_target: {target}
{more}
"""
EXACT = """generation_kwargs: {until: ["<never>"], max_gen_toks: 96, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"""
CHOICE = """target_delimiter: ""
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]"""


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def evaluated(folder: Path, kind: str, target: str, more: str, docs: list[dict[str, Any]]) -> dict[str, Any]:
    data = folder / "data.json"
    data.write_text("\n".join(map(json.dumps, docs)))
    (folder / "tiny.yaml").write_text(TASK.format(data=data, kind=kind, target=target, more=more))
    tasks = TaskManager(include_path=str(folder), include_defaults=False)
    told = lm_eval.simple_evaluate(
        model="dgemma", tasks=["tiny_sudoku"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    return told


def test_its_evaluator_runs_our_model(tmp_path, offline):
    chosen = [p for p in puzzles() if p.blanks == 20][:3]
    docs = [{"puzzle": p.prompt, "solution": p.solution} for p in chosen]
    docs[0]["solution"] = "wrong"
    told = evaluated(tmp_path, "generate_until", "solution", EXACT, docs)
    assert told["results"]["tiny_sudoku"]["exact_match,none"] == pytest.approx(2 / 3)
    assert [sample["resps"][0][0] for sample in told["samples"]["tiny_sudoku"]] == [p.solution for p in chosen]


def test_likelihoods_choose_an_answer(tmp_path, offline, bundled):
    """They are those of plain encoder logits, and the larger one is chosen."""
    puzzle = puzzles()[0].prompt.rstrip()  # lm-eval moves white space from a prompt's end to the answers
    choices = ["9.2", "111"]
    docs = [{"puzzle": puzzle, "choices": choices, "answer": 0}]
    told = evaluated(tmp_path, "multiple_choice", "answer", CHOICE, docs)
    with bundled.session() as session:
        plain = []
        for choice in choices:
            session.rewind(0)
            prompt, ids = bundled.tokenizer.prompt(puzzle), bundled.tokenizer.encode(choice)
            logits = session.encode(prompt + ids, logits="all").astype(np.float64)[len(prompt) - 1 : -1]
            log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            plain.append(log_p[np.arange(len(ids)), ids].sum())
    (sample,) = told["samples"]["tiny_sudoku"]
    assert [float(resp[0][0]) for resp in sample["resps"]] == pytest.approx(plain, rel=1e-4)
    assert told["results"]["tiny_sudoku"]["acc,none"] == (plain[0] > plain[1])


def request(*arguments: Any) -> Instance:
    return Instance("generate_until", {}, arguments, 0)


def test_lengths_and_stops_are_the_tasks(bundled):
    harness = Harness(steps=4)
    puzzle = puzzles()[0]
    (text,) = harness.generate_until([request(puzzle.prompt, {"until": ["\n"], "max_gen_toks": 40})])
    assert text == puzzle.solution[:9]
    (text,) = harness.generate_until([request(puzzle.prompt, {"until": "<none>", "max_gen_toks": 40})])
    assert text == puzzle.solution[:40]
    assert cut("one two three", ["three", "two"]) == "one "
    with pytest.raises(UsageError, match="no 'stepps'"):
        Harness(stepps=4)


def test_a_text_longer_than_the_context_is_scored_in_windows(bundled):
    whole, short = Harness(), Harness(context=40)
    text = puzzles()[0].solution
    ids = whole.tok_encode(text, add_special_tokens=False)
    total, _ = whole.score([whole.prefix_token_id], ids)
    assert whole.loglikelihood_rolling([request(text)]) == pytest.approx([total])
    (windowed,) = short.loglikelihood_rolling([request(text)])
    parts = [short.score([short.prefix_token_id], ids[:40]), short.score(ids[39:79], ids[79:80])]
    assert np.isfinite(windowed) and windowed != pytest.approx(total) and all(np.isfinite(p[0]) for p in parts)
    assert whole.score([2, 9], ids[:5]) == pytest.approx(whole.score([2, 9], ids[:5]))
    with pytest.raises(UsageError, match="longer than the context"):
        short.score([2], ids)


def test_a_chat_goes_through_the_files_template(bundled):
    harness = Harness()
    assert harness.chat_template() is None
    assert harness.apply_chat_template([{"role": "user", "content": "1.2\n"}]) == "1.2\n"
    assert isinstance(harness.model, dgemma.Model)
