"""dg-eval's tasks, statistics, sweeps and command."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.commands import Inside

import dgemma
from dgemma.cli.eval import main
from dgemma.convert import convert
from dgemma.errors import FormatError, UsageError
from dgemma.eval import checks, tasks, word_tasks
from dgemma.eval.approximations import APPROXIMATIONS, comparisons, faster, optional, work
from dgemma.eval.checks import holds
from dgemma.eval.results import Attempt, Log, Variant, run, scores, shown
from dgemma.eval.statistics import mean_of, share_of, wilson
from dgemma.eval.sweep import front, named, read_axes, settings
from dgemma.files.identity import identity
from dgemma.infill.fill import Hole, pieces_of
from dgemma.model import bundled as bundled_path

SUDOKU = Path(__file__).parent / "models" / "sudoku"
WORDS = re.compile(r"\w+|\W")


INSIDE = Inside(main, "dg-eval")
run_eval, refused = INSIDE.run, INSIDE.refused


@pytest.fixture(scope="module")
def tidy() -> Iterator[dgemma.Model]:
    with dgemma.Model(bundled_path("tidy")) as model:
        yield model


# ---- Statistics ----


@pytest.mark.parametrize(
    "right, tries, low, high",
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_published_one(right, tries, low, high):
    """Newcombe 1998, Statistics in Medicine 17:857-872, table I, method 3."""
    assert wilson(right, tries) == pytest.approx((low, high), abs=5e-5)


def test_tries_at_one_item_count_for_less_the_more_they_are_alike():
    """Ten items of five seeds: all tries of an item the same is ten tries; as if independent, it is fifty."""
    alike = share_of([[True] * 5] * 8 + [[False] * 5] * 2)
    assert (alike.share, alike.tries) == (0.8, 50)
    assert (alike.low, alike.high) == pytest.approx(wilson(8, 10))
    independent = share_of([[True] * 4 + [False]] * 10)
    assert (independent.low, independent.high) == pytest.approx(wilson(40, 50))
    perfect = share_of([[True] * 5] * 10)
    assert (perfect.low, perfect.high) == pytest.approx(wilson(10, 10))


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=4), min_size=1, max_size=20))
def test_a_share_lies_in_its_interval(items):
    share = share_of(items)
    assert 0 <= share.low <= share.share + 1e-12 and share.share <= share.high + 1e-12 <= 1 + 2e-12


def test_what_differs_between_levels_is_no_error_of_the_mean():
    assert mean_of([[1.0, 1.0], [5.0, 5.0]]) == (3.0, 0.0)
    one_group = pytest.approx((2.5, 1.959964 * (5 / 3) ** 0.5 / 2))
    assert mean_of([[1.0, 2.0, 3.0, 4.0]]) == mean_of([[1.0], [2.0], [3.0], [4.0]]) == one_group
    assert mean_of([[7.0]]) == (7.0, 0.0)


# ---- Checks ----


@pytest.mark.parametrize(
    "check, right, wrong",
    [
        ({"kind": "exact", "text": "a b"}, ["a b"], ["a b\n", "A b", ""]),
        ({"kind": "exact", "text": "a b", "strip": True}, [" a b\n"], ["a  b"]),
        ({"kind": "regex", "pattern": r"^\d+$"}, ["42"], ["4 2", ""]),
        (
            {"kind": "json"},
            ["{}", "```json\n[1]\n```", " 3 "],
            ["{", "", "{} {}", "[" * 100000, "NaN", '{"a": -Infinity}'],
        ),
        ({"kind": "json", "equals": {"a": 1, "b": [True]}}, ['{"b": [true], "a": 1}'], ['{"a": 1}', "[]"]),
        ({"kind": "json", "equals": 1}, ["1", "1.0"], ["true", "1.5"]),
        ({"kind": "json", "equals": {"a": [1]}}, ['{"a": [1]}'], ['{"a": [true]}', '{"a": [1, 1]}', '{"a": 1}']),
        (
            {"kind": "call", "name": "look", "arguments": {"at": "sky", "n": 2}},
            ['<|tool_call>call:look{at:<|"|>sky<|"|>,n:2}<tool_call|>'],
            [
                '<|tool_call>call:look{at:<|"|>sky<|"|>,n:3}<tool_call|>',
                '<|tool_call>call:look{at:<|"|>sky<|"|>}<tool_call|>',
                '<|tool_call>call:find{at:<|"|>sky<|"|>,n:2}<tool_call|>',
                '<|tool_call>call:look{at:<|"|>sky<|"|>,n:2}<tool_call|>' * 2,
                '<|tool_call>call:look{at:<|"|>sky<|"|>,n:2}',
                "look at the sky",
            ],
        ),
        ({"kind": "call", "name": "look"}, ["I will.<|tool_call>call:look{n:2}<tool_call|>"], ["look"]),
        ({"kind": "numeric", "value": 1200}, ["It is 1,200.", "3 and then 1200"], ["1200 or 3", "none", ""]),
        ({"kind": "numeric", "value": 3.14159, "tolerance": 0.01}, ["3.14", "-1 then 3.15"], ["3.2", "-3.14"]),
        ({"kind": "python-compiles"}, ["x = 1", "```python\ndef f():\n    pass\n```"], ["def f(", "", "x = \0"]),
        (
            {"kind": "markdown-balanced"},
            ["", "a (b [c]) `(` **d**", "```\n(\n```", "| a | b |\n|---|:-:|\n| 1 | 2 |", "a) one\nb) two", r"\( \*\*"],
            ["a (b", "```\nx", "**a", "`a", "([)", "| a | b |\n|---|---|\n| 1 |", "| a |\n| 1 |", "| a |\n|---|\n| 1"],
        ),
        (
            {"kind": "markdown-balanced"},  # its lines end at \\n, \\r\\n and \\r alone
            ["| a |\n|---|\n| 1\u20282\x0c |", "```\r\n(\u2028```x\r\n```", "| a |\r|---|\r| 1 |"],
            ["```\n(\u2028```", "| a |\r\n|---|\r\n| 1"],
        ),
        ([{"kind": "json"}, {"kind": "regex", "pattern": "7"}], ["[7]"], ["[8]", "7]"]),
    ],
)
def test_a_check_tells_right_from_wrong(check, right, wrong):
    checks.refuse(check)
    assert [answer for answer in right if not holds(answer, check)] == []
    assert [answer for answer in wrong if holds(answer, check)] == []


def test_python_is_never_run(tmp_path):
    assert holds(f"open({str(tmp_path / 'made')!r}, 'w')", {"kind": "python-compiles"})
    assert not (tmp_path / "made").exists()


# ---- Tasks ----


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "no JSON"),
        ("[]", "not a JSON object"),
        ('{"id": 1}', "check is missing"),
        ('{"id": 1, "check": {"kind": "json"}}', "either a prompt or messages"),
        ('{"id": 1, "prompt": "", "check": {"kind": "json"}}', "prompt must be text"),
        ('{"id": 1, "messages": ["x"], "check": {"kind": "json"}}', "messages must be a list"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "magic"}}', "a check needs a kind"),
        ('{"id": 1, "prompt": "x", "check": []}', "empty list"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "regex", "pattern": "("}}', "check regex"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "exact", "txt": "x"}}', "check exact"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "exact", "text": 3}}', "check exact: text must be text, not 3"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "exact", "text": 3, "strip": true}}', "check exact: text must be"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "numeric", "value": "4"}}', "check numeric"),
        ('{"id": 1, "messages": [{"role": "user"}], "check": {"kind": "json"}}', "the user message has no content"),
        ('{"id": 1, "prompt": "x", "tools": [{}], "check": {"kind": "json"}}', r"tools\[0\]: it names no function"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "json"}, "max_tokens": "9"}', "max_tokens must be of type int"),
        ('{"id": 1, "fill": "no hole", "check": {"kind": "json"}}', "a hole in it"),
        ('{"id": 1, "fill": "[[1]]", "max_tokens": 9, "check": {"kind": "json"}}', "no max_tokens"),
        ('{"id": 1, "prompt": "x", "check": {"kind": "json"}, "hint": 9}', "unknown field 'hint'"),
    ],
)
def test_what_is_no_task_is_refused_by_file_and_line(line, message, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"id": 0, "prompt": "x", "check": {"kind": "json"}}\n\n' + line + "\n")
    with pytest.raises(UsageError, match=message) as caught:
        tasks.load(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


def test_shipped_tasks_are_the_same_every_time_and_have_an_answer():
    for name, make in word_tasks.MADE.items():
        items = make()
        assert items == make() and len({item.ask for item in items}) > 50, name
    table = word_tasks.MADE["table"]()[1]
    rows = [row.strip("| ").split(" | ") for row in table.ask.rpartition("\n\n")[2].splitlines()]
    whole = ["| " + " | ".join(row) + " |" for row in rows]
    right = "\n".join([whole[0], "|---|---|---|", *whole[1:]])
    assert holds(right, table.check)
    assert not holds(right.replace(rows[1][0], "Zoe"), table.check) and not holds("\n".join(whole), table.check)
    bracket = word_tasks.MADE["brackets"]()[0]
    assert holds(bracket.ask.rpartition("\n\n")[2] + bracket.check["text"][-1], bracket.check)  # type: ignore[call-overload]


def test_a_model_is_given_tasks_that_it_can_read(bundled, tidy):
    assert tasks.suitable(bundled) == ["sudoku", "sudoku-rows"]
    assert tasks.suitable(tidy) == [name for name in tasks.SHIPPED if name not in ("sudoku", "sudoku-rows")]
    with pytest.raises(UsageError, match="cannot read"):
        tasks.shipped(bundled, "json")
    with pytest.raises(UsageError, match="cannot read"):
        tasks.shipped(tidy, "sudoku")


def test_words_are_for_vocabularies_that_have_words(tidy):
    """tidy's spells out what it does not know; the tasks' other wording is for one that has a token per word."""
    words = SimpleNamespace(unk_id=-1, chat_template="", encode=lambda text, special=True: WORDS.findall(text))
    words.decode = "".join
    model = SimpleNamespace(tokenizer=words)
    for name, wordings in tasks.SHIPPED.items():
        if first := wordings.wordings[0](True):
            assert tasks.fits(model, first) and wordings.of(model) == first, name  # type: ignore[arg-type]
            assert not tasks.fits(tidy, first), name


@pytest.mark.parametrize("name", ["brackets", "infill", "json", "table", "tools"])
def test_tidy_does_its_tasks_with_several_seeds(name, tidy):
    """One of each level, twice: what it fails, it fails seldom."""
    variant = Variant.of("", tidy, identity(tidy.path))
    levels = {task.level: task for task in tasks.shipped(tidy, name)}
    tried = run([variant], list(levels.values()), Log(), seeds=2)[""]
    whole = scores(tried)[-1]
    assert whole.right.tries == 2 * len(levels) and whole.right.low < whole.right.share
    assert whole.right.share >= 0.7, [each for each in tried if not each.right]


def test_holes_are_filled_and_what_is_written_there_is_checked(bundled, tmp_path):
    """The middle of a held-out grid; the rest of it is given, so that it is done at once."""
    mine = tmp_path / "rows.jsonl"
    task = tasks.shipped(bundled, "sudoku-rows")[0]
    wrong = {"kind": "exact", "text": "123456789"}
    lines = [
        {"id": i, "prompt": task.prompt, "fill": task.fill, "check": check}
        for i, check in enumerate((task.check, wrong))
    ]
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tried = run([Variant.of("", bundled, identity(bundled.path))], tasks.load(mine), Log())[""]
    assert [each.right for each in tried] == [True, False]
    assert tried[0].text == task.check["text"] and tried[0].tokens == 27


def test_shipped_infill_has_one_hole_and_an_answer_each():
    made = tasks.infill(True)
    assert len(made) == 24
    for task in made:
        assert sum(isinstance(piece, Hole) for piece in pieces_of(task.fill)) == 1, task
        assert holds(task.check["text"], task.check) and task.prompt is None


# ---- Results ----


@pytest.fixture
def few(bundled) -> list[tasks.Task]:
    return [task for task in tasks.shipped(bundled, "sudoku") if task.level in ("20 blanks", "54 blanks")][98:102]


def test_answers_are_those_of_generate(bundled, few):
    variant = Variant.of("", bundled, identity(bundled.path))
    tried = run([variant], few, Log(), seeds=2)[""]
    assert [(t.id, t.seed) for t in tried] == [(task.id, seed) for seed in (0, 1) for task in few]
    for each, task in zip(tried, few * 2, strict=True):
        result = bundled.generate(task.prompt, seed=each.seed)
        assert (each.text, each.steps, each.tokens) == (result.text, result.steps, len(result.ids))
        assert each.right == (result.text == task.check["text"])  # type: ignore[call-overload]
    by_level = scores(tried)
    assert [(s.level, s.right.tries) for s in by_level] == [("20 blanks", 4), ("54 blanks", 4), ("", 8)]


def test_what_was_done_before_a_kill_is_not_done_again(bundled, few, tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    variant = Variant.of("", bundled, identity(bundled.path))
    with Log(path) as log:
        first = run([variant], few[:3], log)[""]
    path.write_bytes(path.read_bytes()[:-40])  # killed within the third line
    asked: list[object] = []
    generate = dgemma.Model.generate
    monkeypatch.setattr(dgemma.Model, "generate", lambda self, *a, **b: asked.append(a) or generate(self, *a, **b))
    with Log(path) as log:
        again = run([variant], few, log)[""]
    assert len(asked) == 2  # the third and the fourth
    assert [t.text for t in again[:3]] == [t.text for t in first]
    with Log(path) as log:
        assert list(log.tried.values()) == again
        other = Variant.of("", bundled, identity(bundled.path), options={"steps": 3})
        run([other], few[:1], log)  # another setting is another try
        changed = [tasks.Task(few[0].name, few[0].id, few[0].prompt, {"kind": "json"}, few[0].level)]
        run([variant], changed, log)  # and so is another check
    assert len(asked) == 4
    path.write_text("{}\n")
    with pytest.raises(FormatError, match="line 1: not a line of dg-eval's results"):
        Log(path)


def test_another_model_is_another_whatever_byte_differs(tmp_path):
    path = tmp_path / "m.gguf"
    data = bytearray(Path(bundled_path()).read_bytes())
    path.write_bytes(data)
    before = identity(path)
    assert before["sha256"] == identity(bundled_path())["sha256"] == hashlib.sha256(data).hexdigest()
    for at in (len(data) // 2, len(data) - 1):
        data[at] ^= 1
        path.write_bytes(data)
        assert identity(path)["sha256"] != before["sha256"] and identity(path)["vocabulary"] == before["vocabulary"]


def test_lines_of_others_are_no_results(tmp_path):
    path = tmp_path / "results.jsonl"
    names = [field.name for field in dataclasses.fields(Attempt)]
    for line in (dict.fromkeys(names), {"run": '["0123456789abcdef", "cpu"]'}, {"run": "mine"}):
        text = json.dumps(line) + "\n"
        path.write_text(text)
        with pytest.raises(FormatError, match="line 1: not a line"):
            Log(path)
        assert path.read_text() == text


def test_a_thought_is_not_part_of_the_answer():
    """An answer whose tokens spell one: the tokenizer of the chat tests has the marks."""
    tokenizer = dgemma.Tokenizer.from_gguf(Path(__file__).parent / "models" / "tiny-bpe" / "tiny-bpe.gguf")
    model = SimpleNamespace(tokenizer=tokenizer)
    for text, seen in (("<|channel>thought\nsee<channel|>42", "42"), ("<|channel>thought\ncut off", ""), ("1", "1")):
        result = SimpleNamespace(ids=tokenizer.encode(text))
        assert shown(model, tokenizer.encode("a"), result) == seen  # type: ignore[arg-type]


# ---- Sweeps ----


def test_axes_are_read_and_combined():
    axes = read_axes(["steps=8,16,entropy-bound=0.1", "t_min=0.2, 0.4"])
    assert axes == {"steps": [8, 16], "entropy_bound": [0.1], "t_min": [0.2, 0.4]}
    assert read_axes(["effort=low,high,settled=yes,no"]) == {"effort": ["low", "high"], "settled": [True, False]}
    assert named({"effort": "low", "settled": True, "t_min": 0.5}) == "effort=low, settled=yes, t_min=0.5"
    assert settings(axes)[1] == {"steps": 8, "entropy_bound": 0.1, "t_min": 0.4} and len(settings(axes)) == 4


@pytest.mark.parametrize(
    "text",
    [
        "steps",
        "8,16",
        "steps=",
        "steps=x",
        "steps=0",
        "seed=1",
        "magic=1",
        "steps=8,8",
        "steps=1,steps=2",
        "effort=x",
        "settled=1",
    ],
)
def test_what_is_no_axis_is_refused(text):
    with pytest.raises(UsageError, match=r"steps|sweep"):
        read_axes([text])


def test_a_sampler_is_an_axis_by_name():
    assert read_axes(["sampler=entropy-bound"]) == {"sampler": ["entropy-bound"]}
    with pytest.raises(UsageError, match="sampler must be one of entropy-bound, not 'x'"):
        read_axes(["sampler=x"])


def test_the_front_is_what_nothing_beats():
    assert front([(1, 0.5), (2, 0.9), (2, 0.8), (3, 0.9), (4, 1.0), (1, 0.5)]) == {0, 1, 4, 5}


def test_approximations_are_tried_on_against_off(few, bundled, monkeypatch):
    def names(those):
        return {name for each in optional(those) for name in each.options}

    monkeypatch.setattr("dgemma.eval.approximations.PROMPTS", 1)
    found = comparisons(bundled_path(), few[:2], Log(), seeds=1, seed=0, model={"threads": 1})
    assert [t.name for t in found] == [a.name for a in [*APPROXIMATIONS, *optional(few)]]
    assert {"plateau", "settled", "short_canvas", "retries"} <= (told := names(few))
    assert "pins_conditioned" not in told and "pins_conditioned" in names(tasks.shipped(bundled, "sudoku-rows"))
    for comparison in found:
        assert comparison.off.right.tries == comparison.on.right.tries == 2
        assert (
            0 <= comparison.same <= 1
            and 0 < comparison.times_low <= comparison.times_high
            and comparison.times_as_fast > 0
        )
    assert found[0].kl_mean is not None and found[0].kl_mean < 0.01 and found[1].kl_mean is None


def timed(steps, seconds):
    return Attempt("", "", "", "", 0, "", True, steps, True, 9, seconds, "")


def test_one_slow_answer_is_not_taken_for_work():
    """Nine answers of two steps in a second, one of twenty in a minute: 38 steps of half a second."""
    assert work([*[timed(2, 1.0)] * 9, timed(20, 60.0)], np.arange(10)[None]) == [38 * 0.5]


def test_how_much_faster_has_an_interval():
    """Alike: exactly one. Half the steps of every task: exactly two. Of some tasks alone: as sure as tasks are many."""
    tries = [timed(2 + 2 * (i % 3), 1.0 + i % 3) for i in range(30)]
    halved = [timed(each.steps // 2, each.seconds / 2) for each in tries]
    assert faster(tries, tries) == (1, 1, 1)
    assert faster(tries, halved) == pytest.approx((2, 2, 2))
    ratio, low, high = faster(tries, [*halved[:15], *tries[15:]])
    assert 1 < low < ratio < high < 2
    assert ratio == pytest.approx(120 / 90)


def test_a_tolerance_of_nothing_conditions_on_the_whole_vocabulary(few):
    """It is what exact does, but for the rounded activations; any bound at all gives other bits."""
    entropies = []
    for arguments in ({"tolerance": 0.0}, {"tolerance": 0.001}, {}):
        with dgemma.Model(**arguments) as model:
            steps = model.stream(few[-1].prompt)
            entropies.append([event.mean_entropy for event in steps if isinstance(event, dgemma.Step)][1])
    if "avx2" in " ".join(dgemma.backends()):
        assert entropies[0] != entropies[1]
    assert entropies[1] == entropies[2]
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="tolerance"):
            dgemma.Model(tolerance=wrong)


# ---- The command ----


def test_one_file_against_another(capsys, tmp_path):
    """The JSON has the four numbers on top, and those of the file itself are perfect."""
    report, base = tmp_path / "report.json", tmp_path / "base.npz"
    arguments = ["--against", bundled_path(), "--prompts", 2, "--layers", "--save-base", base, "-o", report]
    status, out, err = run_eval(capsys, bundled_path(), *arguments)
    assert status == 0, err
    told = json.loads(report.read_text())
    assert (told["kl_mean"], told["kl_p99"], told["top1"], told["committed"]) == (0, 0, 1, 1)
    assert told["files"][0]["scores"] == [] and "same committed token" in out and "hidden state" in out
    assert err == ""
    status, again, _ = run_eval(capsys, bundled_path(), "--base", base, "--layers")
    assert status == 0 and again == out


def test_within_a_budget(capsys, tmp_path):
    """The same figures and answers; the report says so."""
    report = tmp_path / "report.json"
    arguments = ["--against", bundled_path(), "--prompts", 1, "--task", "sudoku", "--count", 1, "-o", report]
    status, out, err = run_eval(capsys, bundled_path(), *arguments, "--ram", "4G")
    assert status == 0 and "within 4.0 GiB" in out, err
    told = json.loads(report.read_text())
    assert (told["kl_mean"], told["top1"], told["ram"]) == (0, 1, 4 << 30)
    assert "comparing takes" in refused(capsys, 1, bundled_path(), *arguments, "--ram", "1M")


def test_a_line_per_file(capsys, tmp_path):
    files = [tmp_path / f"{kind}.gguf" for kind in ("f32", "q4_0")]
    for path in files:
        convert(SUDOKU, path, type=path.stem)
    report = tmp_path / "report.json"
    status, out, err = run_eval(
        capsys, *files, "--against", files[0], "--prompts", 2, "--task", "sudoku", "--count", 1, "-o", report
    )
    assert status == 0, err
    lines = out.splitlines()
    assert lines[2].startswith("| file ") and "sudoku, %" in lines[2]
    assert lines[4].startswith("| f32.gguf ") and lines[5].startswith("| q4_0.gguf ") and len(lines) == 6
    told = json.loads(report.read_text())
    assert told["kl_mean"] == 0 < told["files"][1]["fidelity"]["kl_mean"]
    assert told["commit"] is None or len(told["commit"]) >= 7


def test_levels_alone(capsys):
    levels = ("20 blanks", "36 blanks")
    flags = [flag for level in levels for flag in ("--level", level)]
    status, out, err = run_eval(capsys, "--task", "sudoku", "--count", 1, *flags)
    assert status == 0, err
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| ")]
    assert rows[2:] == [*(f"sudoku, {level}" for level in levels), "**sudoku**"]


def test_a_task_file_and_a_sweep_drawn(capsys, tmp_path, bundled):
    mine, picture, report = tmp_path / "mine.jsonl", tmp_path / "trade.png", tmp_path / "trade.json"
    lines = [
        {"id": i, "prompt": task.prompt, "check": task.check, "level": task.level}
        for i, task in enumerate(tasks.shipped(bundled, "sudoku")[:400:100])
    ]
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = run_eval(
        capsys, "--task", mine, "--sweep", "steps=1,4,entropy_bound=0.1,1", "--plot", picture, "-o", report
    )
    assert status == 0, err
    assert out.count("\n| steps=") == 4 and "steps=4, entropy_bound=1" in out
    assert picture.read_bytes().startswith(b"\x89PNG") and "<svg" in (tmp_path / "trade.svg").read_text()
    told = json.loads(report.read_text())
    assert told["tasks"] == ["mine"] and any(point["front"] for point in told["sweep"])
    one, *_, four = (point["score"] for point in told["sweep"])
    assert one["steps"] == 1 < four["steps"] <= 4


def test_wrong_usage_is_one_line(capsys, tmp_path):
    for message, *arguments in (
        ("give one", "--against", "a", "--base", "b"),
        ("--layers needs", "--layers"),
        ("--save-base needs", "--save-base", tmp_path / "x"),
        ("--plot needs --sweep", "--plot", tmp_path / "x.svg"),
        ("ends in .svg or .png", "--sweep", "steps=1", "--plot", tmp_path / "x.pdf"),
        ("one model", "a", "b", "--sweep", "steps=1"),
        ("tries --exact itself", "--approximations", "--exact"),
        ("no --ram", "--approximations", "--ram", "1G"),
        ("--level needs tasks", "--against", "a", "--level", "48 blanks"),
        ("--level '48 b': there is none", "--level", "48 b"),
        ("no option 'magic'", "--sweep", "magic=1"),
        ("same name", "--task", "sudoku", "--task", "sudoku.jsonl"),
    ):
        assert message in refused(capsys, 2, *arguments)
    assert "no such file" in refused(capsys, 1, "--task", tmp_path / "none.jsonl")
    assert "there is no folder" in refused(capsys, 1, "-o", tmp_path / "none" / "x.json")
    assert "x.gguf" in refused(capsys, 1, tmp_path / "x.gguf")


def test_without_matplotlib_it_says_what_to_install(capsys, monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    told = refused(capsys, 1, "--sweep", "steps=1", "--plot", tmp_path / "x.svg")
    assert "pip install 'dgemma[eval]'" in told
