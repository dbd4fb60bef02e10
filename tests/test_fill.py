"""Infill: what stands in a text stays to the character, and its holes are written around it."""

from __future__ import annotations

import json
import os
import re
import sys
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from measure.solve_rate import puzzles
from support.cases import Case
from test_run import run

import dgemma
from dgemma.cli.run import main
from dgemma.infill.fill import LENGTHS, Hole, Layout, done, fill, filling, pieces_of
from dgemma.model import bundled

CANVAS = 16
CASES = {  # holes wherever they can be
    "in one canvas": "the [[2]] is [[3]]",
    "at both ends": "[[2]]sky[[2]]",
    "alone": "[[5]]",
    "side by side": "why [[2]][[3]] blue",
    "longer than a canvas": "the sky[[40]]and why",
    "on canvases after the first": "the[[1]]" + "sky is blue and " * 4 + "[[1]]" + " why" * 3,
    "far from the beginning": "the sky is blue and " * 9 + "[[3]] why",
    "far from the end": "why[[3]]" + "the sky is blue and " * 9,
    "in the middle": "the sky is blue and " * 9 + "[[3]] why" + "the sky is blue and " * 9,
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fill")
    shape = dict(layers=2, hidden=32, ffn=32, heads=2, kv_heads=1, head_dim=16, global_head_dim=16, experts=4)
    case = Case("fill", seed=4, shape=dict(shape, canvas=CANVAS, context=256))
    with dgemma.Model(case.convert(folder / "hf", folder / "fill.gguf"), threads=1) as model:
        yield model


def as_pattern(text: str) -> str:
    """What a filled text looks like."""
    return "(.*)".join(re.escape(piece) for piece in re.split(r"\[\[[^]]*\]\]", text))


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_the_rest_of_a_text_stays_to_the_character(small, text):
    filled = small.fill(text, steps=2, seed=1)
    assert re.fullmatch(as_pattern(text), filled.text, re.DOTALL), filled.text
    lengths = tuple(int(n) for n in re.findall(r"\[\[(\d+)\]\]", text))
    assert filled.best.lengths == lengths and len(filled.holes) == len(lengths) and len(filled.trials) == 1
    result = filled.best.result
    fixed = sum(len(small.tokenizer.encode(piece)) for piece in pieces_of(text) if isinstance(piece, str))
    assert len(result.ids) <= fixed + sum(lengths) + CANVAS  # and what is pinned behind the end


@pytest.mark.parametrize("text", CASES.values(), ids=CASES)
def test_what_does_not_fit_a_canvas_goes_before_it(small, text):
    """The prompt is <bos> and all that stands before the canvases, which show every hole and what is around it."""
    encode = small.tokenizer.encode
    seen: list[dgemma.Step] = []
    filled = small.fill(text, steps=1, seed=2, on_step=seen.append)
    tokens = [encode(p) if isinstance(p, str) else [None] * p.length for p in pieces_of(text)]
    ids = [token for piece in tokens for token in piece]
    first = filled.best.result.prompt_tokens - 1
    shown = {first + step.place + i: token for step in seen for i, token in enumerate(step.canvas.tolist())}
    assert min(shown) == first and all(at in shown for at, token in enumerate(ids) if token is None)
    assert all(token in (shown.get(at, token), None) for at, token in enumerate(ids))
    if len(ids) <= CANVAS:
        assert first == 0 and len(shown) == CANVAS
        assert [shown[at] for at in range(len(ids), CANVAS)] == [1, *[0] * CANVAS][: CANVAS - len(ids)]
    elif ids.index(None) >= CANVAS // 2 and ids[::-1].index(None) >= CANVAS // 2 and len(seen) == 1:
        assert 0 < ids.index(None) - first < CANVAS - 3  # something on both sides


def test_a_text_longer_than_the_context_keeps_what_is_near(small):
    filled = small.fill("the sky is blue and " * 100 + "[[3]] why", steps=1)
    assert filled.best.result.prompt_tokens == 256 and filled.text.endswith(" why")
    with pytest.raises(dgemma.UsageError, match=r"holes of 400 tokens .*256"):
        small.fill("the [[400]]")


def test_an_unknown_length_is_the_one_of_the_most_evidence(small):
    """Hole by hole; of lengths that give the same text, the most certain."""
    filled = small.fill("the [[...]] sky [[2]] is [[...]]", steps=2, lengths=(1, 3, 6))
    tried = [trial.lengths for trial in filled.trials]
    assert tried[:3] == [(1, 2, 3), (3, 2, 3), (6, 2, 3)] and len(tried) == 5
    first = max(filled.trials[:3], key=lambda trial: trial.evidence).lengths[0]
    assert {lengths for lengths in tried if lengths[0] == first} == {(first, 2, n) for n in (1, 3, 6)}
    last = [trial for trial in filled.trials if trial.lengths[0] == first]
    assert filled.holes == max(last, key=lambda trial: trial.evidence).holes
    same = [trial for trial in last if trial.holes == filled.holes]
    assert filled.best == min(same, key=lambda trial: trial.mean_entropy)
    assert filled.steps == sum(t.result.steps for t in filled.trials)
    known, unknown = small.fill("the [[4]]", steps=1), small.fill("the [[...]]", steps=1)
    assert [t.lengths for t in unknown.trials] == [(n,) for n in LENGTHS]
    assert known.best.evidence is None and known.best.holes == unknown.trials[1].holes


@pytest.mark.parametrize(
    ("before", "after", "seen", "options"),
    [
        ("| fig | 12 |\n", "\n| sea | red |", None, {}),
        ("sea ", " fig" * 40, 24, {"steps": 3}),  # half a canvas is looked at
        ("fig\n", "", None, {"steps": 2, "t_min": 1.0, "t_max": 1.5}),
        ("", " sea", None, {"steps": 4, "entropy_bound": 0.01}),
    ],
)
def test_evidence_is_likelihood_and_the_entropy_of_what_was_accepted(tidy, before, after, seen, options):
    """Log softmax of the encoder's logits, token by token, from the first hole to the end; and of each token of the
    hole the entropy at the step since which it is accepted."""
    encode, pieces = tidy.tokenizer.encode, [before, Hole(), after]
    for trial in tidy.fill(pieces, lengths=(5, 60), **options).trials:
        steps: list[dgemma.Step] = []
        alone = tidy.fill([before, Hole(*trial.lengths), after], on_step=steps.append, **options)
        assert (alone.best.evidence, alone.holes) == (None, trial.holes)
        expected = 0.0
        layout = Layout.of(tidy, [p for p in pieces if p], trial.lengths, special=False)
        ids = []
        for place, token in zip(alone.best.result.places, alone.best.result.ids, strict=True):
            if (*layout.owners[layout.first :], *[-1] * len(steps[0].canvas))[place] == 0:
                ids.append(token)
                mine = [s for s in steps if s.place <= place < s.place + len(s.canvas)]
                refused = [s.index for s in mine if not s.accepted[place - s.place]]
                since = min(max(refused, default=-1) + 1, len(mine) - 1)
                expected += float(mine[since].entropy[place - mine[since].place])
        start = encode("<bos>" + before)
        text = [*ids, *encode(after)[:seen], *([] if seen else encode("<eos>"))]
        with tidy.session() as session:
            logits = session.encode([*start, *text[:-1]], logits="all")[len(start) - 1 :].astype(np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected += log_p[np.arange(len(text)), text].sum()
        assert trial.evidence == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("text", "asked", "holes"),
    [
        ("| fig | 12 |\n[[...]]\n| sea | red |", None, ["|---|---|"]),
        ("ant {\n[[...]]sea\n}", None, ["  "]),
        ('{"fig": 12, [[...]]}', "Write JSON:\nfig=12\nsea=red", ['"sea": "red"']),
        ('{"fig": [[...]], "sea": [[...]]}', "Write JSON:\nfig=12\nsea=red", ["12", '"red"']),
        ("[[...]]", "Sort:\nsea fig ant", ["ant fig sea"]),
    ],
)
def test_what_is_missing_is_written(tidy, text, asked, holes):
    """By a model that learnt to, in holes of unknown length; with nothing but the text, or with a prompt."""
    filled = tidy.fill(text, None if asked is None else [{"role": "user", "content": asked}])
    assert filled.holes == holes
    assert re.fullmatch(as_pattern(text), filled.text)


def test_entropy_is_over_the_tokens_of_the_holes(small):
    steps: list[dgemma.Step] = []
    filled = small.fill("the sky[[40]]and why", steps=3, on_step=steps.append)
    last = {step.block: step for step in steps}
    total = sum(float(step.entropy.sum()) for step in last.values())
    assert filled.best.mean_entropy == pytest.approx(total / 40, rel=1e-5)


def test_trials_share_what_stands_before(small):
    text = "the sky is blue and " * 9 + "[[...]] why"
    encoded = [trial.result.encoded_tokens for trial in small.fill(text, steps=1, lengths=(3, 4, 5)).trials]
    assert encoded[0] > 30 and all(0 <= tokens < 5 for tokens in encoded[1:])


@given(st.lists(st.sampled_from(["the ", "sky", "\n", "é", "[[", "]]", "[[0]]", "[[...]]", Hole(1), Hole(2)])))
@settings(max_examples=100)
def test_pieces_are_the_text(pieces):
    text = "".join(f"[[{piece.length}]]" if isinstance(piece, Hole) else piece for piece in pieces)
    found = pieces_of(text)
    assert "".join(f"[[{p.length or '...'}]]" if isinstance(p, Hole) else p for p in found) == text
    assert "" not in found and sum(isinstance(p, Hole) for p in found) == len(re.findall(r"\[\[[1-9.]", text))


def test_sudoku_through_infill(bundled):
    for puzzle in puzzles(36, 5):
        text = puzzle.prompt.replace(".", "[[1]]")
        filled = bundled.fill(text, puzzle.prompt, pins_conditioned=True)
        assert (filled.text, str(filled), filled.converged) == (puzzle.solution, puzzle.solution, True)


def test_texts_that_make_no_sense_are_refused(small):
    for text, options, message in (
        ("the sky", {}, "no hole"),
        ("", {}, "no hole"),
        ([Hole(0)], {}, "at least 1"),
        ("[[...]]", {"lengths": ()}, "at least 1"),
        ("[[...]]", {"lengths": (0,)}, "at least 1"),
        ("[[2]]", {"max_tokens": 5}, "no max_tokens"),
        ("[[2]]", {"prompt": ""}, "empty prompt"),
    ):
        with pytest.raises(dgemma.UsageError, match=message):
            small.fill(text, **options)
    with pytest.raises(TypeError, match="temperature"):
        small.fill("[[2]]", temperature=1)


def test_control_tokens_in_a_text_are_text_unless_asked_for(small):
    pieces = ["<eos>", Hole(1)]
    text, control = (Layout.of(small, pieces, [1], special).ids for special in (False, True))
    assert control == [1, 0] and len(text) > 3
    assert fill(small, pieces, special=True, steps=1).text.startswith("<eos>")


@pytest.mark.parametrize("text", ["the [[2]] is", "[[2]] sky", "the sky is blue and " * 9 + "[[2]] why"])
def test_a_text_without_a_prompt_begins_with_bos_once(small, text):
    """Whether it has <bos> of its own or not."""
    seen = []
    for begins in ("", "<bos>"):
        with small.session(256) as session:
            filled = done(filling(session, begins + text, special=True, steps=2, seed=1), None)
            seen.append((session.ids, filled.text.removeprefix(begins), filled.holes))
    assert seen[0] == seen[1]
    assert seen[0][0][0] == small.tokenizer.bos_id and seen[0][0].count(small.tokenizer.bos_id) == 1
    assert len(Layout.of(small, pieces_of("<bos>" + text), [2], special=True).ids) > 2  # behind a prompt it is text


# ---- on the command line ----


def test_a_file_is_filled(tmp_path: Path) -> None:
    puzzle = puzzles(30, 1)[0]
    (tmp_path / "grid.txt").write_text(puzzle.prompt)
    (tmp_path / "holes.txt").write_text(puzzle.prompt.replace(".", "[[1]]"))
    prompt = ("-f", str(tmp_path / "grid.txt"), "--pins-conditioned")
    done = run("--fill", str(tmp_path / "holes.txt"), *prompt)
    assert done.stdout.decode() == puzzle.solution
    assert re.match(r"30 holes of 1, .* tokens, entropy 0\.00\d+ per token, converged; 1 trial", done.stderr.decode())
    done = run("--canvas", str(tmp_path / "grid.txt"), "--pin", r"[^.]+", *prompt, "--json", "--quiet")
    told = json.loads(done.stdout)
    assert told["text"] == puzzle.solution and sum(told["lengths"]) == 30 and told["converged"] is True
    trial = {"lengths": told["lengths"], "mean_entropy": told["mean_entropy"], "evidence": None}
    assert done.stderr == b"" and told["trials"] == [trial]
    asked = ("--fill", "-", "--json", "--lengths", "3,1,5")
    told = json.loads(run(bundled("tidy"), *asked, given=b"| fig | 12 |\n[[...]]\n| sea | red |").stdout)
    assert told["text"] == "| fig | 12 |\n|---|---|\n| sea | red |" and told["lengths"] == [5]
    assert [t["lengths"] for t in told["trials"]] == [[3], [1], [5]]
    assert max(told["trials"], key=lambda trial: trial["evidence"])["lengths"] == [5]


def refusal(code: int, *arguments: str) -> str:
    """What dg-run says as it refuses, in one line; in this process."""
    with pytest.raises(SystemExit) as ended, redirect_stderr(StringIO()) as told, open(os.devnull) as nothing:
        sys.stdin, before = nothing, sys.stdin
        try:
            main(list(arguments))
        finally:
            sys.stdin = before
    assert ended.value.code == code and told.getvalue().count("\n") == 1
    return told.getvalue()


def test_half_a_task_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("123")
    file = str(text)
    assert "has no hole" in refusal(2, "--fill", file) and file in refusal(2, "--fill", file)
    assert "--canvas needs --pin" in refusal(2, "--canvas", file)
    assert "--pin needs --canvas" in refusal(2, "--pin", "1", "-p", "1")
    assert "all of it matches --pin" in refusal(2, "--canvas", file, "--pin", ".+")
    assert "no regular expression" in refusal(2, "--canvas", file, "--pin", "(")
    assert "--canvas and --fill do not go together" in refusal(2, "--fill", file, "--canvas", file, "--pin", "1")
    assert "--lengths needs --fill FILE or --edit" in refusal(2, "--lengths", "3", "-p", "1")
    assert "such as 3,5,7" in refusal(2, "--fill", file, "--lengths", "3,0")
    assert "need a prompt" in refusal(2, "--fill", file, "--think")
    assert "max_tokens" in refusal(2, "--canvas", file, "--pin", "1", "--max-tokens", "4")
    text.write_bytes(b"12\xff[[2]]")
    assert "not UTF-8 text: byte 2" in refusal(2, "--fill", file)
    assert "nothing.txt" in refusal(1, "--fill", str(tmp_path / "nothing.txt"))
