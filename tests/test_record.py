"""The visible canvas: frames, how they are laid out, drawn on terminals and recorded."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from support.terminal import RUN, on_terminal

import dgemma
from dgemma.cli.frames import LOOKS, Cell, Frame, Framer, lines, shown, sparkline
from dgemma.cli.palette import DARK, LIGHT, level, of_terminal
from dgemma.cli.record.recorder import FASTEST, HELD, SLOWEST, Recorder, recording

PUZZLE = (Path(__file__).parent / "models" / "sudoku" / "puzzle.txt").read_text()
TINY = Path(__file__).parent / "models" / "tiny-bpe" / "tiny-bpe.gguf"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    """Of the bundled model at work."""
    with dgemma.Model() as model:
        framer = Framer(model.tokenizer, model.config, 48)
        return [framer.frame(event) for event in model.stream(PUZZLE) if isinstance(event, dgemma.Step)]


def run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*RUN, "-p", PUZZLE, *arguments], capture_output=True, timeout=60)


# ---- frames ----


def step(ids: list[int], entropy: list[float], accepted: list[bool], index: int = 0) -> dgemma.Step:
    e = np.array(entropy, np.float32)
    canvas = np.array(ids, np.int32)
    return dgemma.Step(0, index, 0, 0.5, canvas, e, np.array(accepted), float(e.mean()), False, canvas)


class TinyConfig:
    end_ids = (1,)


def test_a_frame_is_the_canvas_up_to_its_end() -> None:
    tokenizer = dgemma.Tokenizer.from_gguf(TINY)
    party, pad, channel = tokenizer.encode("🎉"), tokenizer.pad_id, tokenizer.encode("<|channel>")
    assert len(party) == 4 and pad is not None
    ids = [*tokenizer.encode("the"), *party, pad, *channel, 1, *tokenizer.encode("the")]
    framer = Framer(tokenizer, TinyConfig(), 48)  # type: ignore[arg-type]
    frame = framer.frame(step(ids, [0.5 * i for i in range(len(ids))], [i == 0 for i in range(len(ids))]))
    assert [cell.text for cell in frame.cells] == ["the", "🎉", "", "", "", "·", "<|channel>", "<eos>"]
    assert [cell.mark for cell in frame.cells] == [False] * 5 + [True] * 3
    assert [cell.entropy for cell in frame.cells] == [0.5 * i for i in range(8)]
    assert [cell.look for cell in frame.cells] == ["sure", "u2", "u3", "u3", "u4", "mark", "mark", "mark"]
    assert (frame.accepted, frame.length) == (1, len(ids)) and "step 1 of 48 at most" in frame.status
    framer.finished(tokenizer.encode("the"))
    second = framer.frame(step(ids[:1], [0.0], [False], index=1))
    assert [(cell.text, cell.look) for cell in second.before] == [("the", "done")]
    assert second.means == (frame.means[0], 0.0) and second.sparkline == "█▁"


def test_frames_of_a_model(frames: list[Frame]) -> None:
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert [len(frame.means) for frame in frames] == list(range(1, len(frames) + 1))
    last = frames[-1]
    assert last.converged and {cell.look for cell in last.cells} == {"sure", "mark"}
    with dgemma.Model() as model:
        assert "".join(cell.text for cell in last.cells[:-1]) == model.generate(PUZZLE).text


def test_colours_are_in_the_order_of_entropy() -> None:
    def lightness(colour: str) -> float:
        r, g, b = ((int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5))
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for palette, brighter in ((DARK, True), (LIGHT, False)):
        shades = [lightness(palette.colour(look)) for look in LOOKS if look.startswith("u")]
        assert shades == sorted(shades, reverse=brighter)
        ground = lightness(palette.ground)
        for shade in shades:  # legible (WCAG asks 3 of large text, 4.5 of small)
            assert (max(shade, ground) + 0.05) / (min(shade, ground) + 0.05) > 2.5
    levels = [level(entropy) for entropy in (0.0, 0.1, 0.5, 1.5, 3.0, 12.0)]
    assert levels == list(range(len(DARK.levels)))


def test_a_sparkline_has_a_bar_per_step() -> None:
    assert sparkline([4.0, 2.0, 1.0, 0.0]) == "█▅▃▁"
    assert sparkline([0.0]) == "▁"


cells = st.builds(
    Cell, st.text("ab \n你🎉é", max_size=12), st.floats(0, 12), st.booleans(), st.booleans(), st.booleans()
)


@given(st.lists(cells, max_size=20), st.integers(2, 30))
def test_lines_fit_and_lose_nothing_but_spaces_at_their_ends(drawn: list[Cell], columns: int) -> None:
    laid = lines(drawn, columns)
    assert all(sum(cell_len(text) for text, _ in line) <= columns for line in laid)
    letters = [(letter, cell.look) for cell in drawn for letter in cell.text if not letter.isspace()]
    assert [(c, look) for line in laid for text, look in line for c in text if not c.isspace()] == letters
    newlines = sum(cell.text.count("\n") for cell in drawn)
    assert len(laid) > newlines


def test_words_stay_whole_across_cells() -> None:
    laid = lines([Cell("one tw"), Cell("o thr", accepted=False), Cell("ee")], 8)
    assert ["".join(text for text, _ in line).rstrip() for line in laid] == ["one two", "three"]
    assert laid[1] == [("thr", "u0"), ("ee", "sure")]


# ---- recordings ----


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    folder = tmp_path_factory.mktemp("recorded")
    flags = [part for kind in ("cast", "svg", "gif") for part in ("--record", str(folder / f"a.{kind}"))]
    done = run(*flags, "--quiet")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.count(b"\n") == 9
    yield {kind: (folder / f"a.{kind}").read_bytes() for kind in ("cast", "svg", "gif")}


def test_a_cast_is_asciicast_2(files: dict[str, bytes], frames: list[Frame]) -> None:
    header, *events = (json.loads(line) for line in files["cast"].decode().splitlines())
    assert header["version"] == 2 and header["width"] >= 40 and header["height"] >= 12
    assert all(len(event) == 3 and event[1] == "o" for event in events) and len(events) == len(frames) + 1
    times = [event[0] for event in events]
    assert times[0] == 0 and times == sorted(times)
    assert times[-1] - times[-2] == pytest.approx(HELD)  # the last frame is held
    assert all(FASTEST - 0.01 <= b - a <= SLOWEST + 0.01 for a, b in pairwise(times[:-1]))
    for event in events[:-1]:
        rows = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", event[2]).split("\r\n")
        assert len(rows) == header["height"] and all(len(row) <= header["width"] for row in rows)
    assert events[-2][2].count("\x1b[1;38;2;255;255;255m") == 9  # nine rows that are sure


def test_an_svg_has_a_group_per_step_and_nothing_else_but_style(files: dict[str, bytes], frames: list[Frame]) -> None:
    root = ET.fromstring(files["svg"])
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(frames) and len({g.get("id") for g in groups}) == len(frames)
    style = root.findtext(f"{SVG}style") or ""
    assert all(f"@keyframes {g.get('id')}" in style for g in groups) and "prefers-reduced-motion" in style
    assert b"<script" not in files["svg"] and files["svg"].count(b"http") == 1  # the name of SVG itself
    rows = ["".join(text.itertext()) for text in groups[-1].findall(f"{SVG}text")]
    with dgemma.Model() as model:
        assert rows[:9] == model.generate(PUZZLE).text.split()
    assert rows[9] == "<eos>" and rows[10] == frames[-1].status


def test_a_gif_has_a_picture_per_step(files: dict[str, bytes], frames: list[Frame]) -> None:
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(files["gif"]))
    assert image.format == "GIF" and image.n_frames == len(frames) and image.info["loop"] == 0
    times, pictures = [], []
    for i in range(image.n_frames):
        image.seek(i)
        times.append(image.info["duration"])
        pictures.append(np.asarray(image.convert("RGB")))
    assert times[-1] == 1000 * HELD and all(1000 * FASTEST <= t <= 1000 * SLOWEST for t in times[:-1])
    ground = [int(DARK.ground[i : i + 2], 16) for i in (1, 3, 5)]
    assert all((p[0, 0] == ground).all() and p.max() > 200 for p in pictures)


def test_a_gif_is_drawn_without_any_font_of_the_systems(
    tmp_path: Path, frames: list[Frame], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("PIL")
    monkeypatch.setattr("dgemma.cli.record.gif.FONTS", ())
    monkeypatch.setattr("dgemma.cli.record.gif.WIDE", ())
    recorder = Recorder(tmp_path / "a.gif")
    recorder.step(frames[-1])
    recorder.write()
    image = pytest.importorskip("PIL.Image").open(tmp_path / "a.gif")
    assert np.asarray(image.convert("RGB")).max() > 200 and image.width > 300


def test_what_is_filled_is_recorded_too(tmp_path: Path) -> None:
    (tmp_path / "grid.txt").write_text("534678912\n672[[3]]348\n")
    done = run("--fill", str(tmp_path / "grid.txt"), "--steps", "4", "--record", str(tmp_path / "a.svg"))
    assert done.returncode == 0
    groups = ET.parse(tmp_path / "a.svg").findall(f"{SVG}g")
    rows = ["".join(text.itertext()) for text in groups[0].findall(f"{SVG}text")]
    assert rows[0] == "534678912" and rows[1].startswith("672") and rows[1].endswith("348")


def test_marks_of_markup_are_text_in_an_svg(tmp_path: Path) -> None:
    nasty = Cell(shown("<b>&\"' ]]> \x00\x1b[31m\ufffe"))
    frame = Frame(0, 0, 1, (nasty, Cell("你")), (), 2, 2, (0.0,), True)
    recorder = Recorder(tmp_path / "a.svg")
    recorder.step(frame)
    recorder.write()
    text = ET.parse(tmp_path / "a.svg").findtext(f"{SVG}g/{SVG}text/{SVG}tspan")
    assert text == nasty.text + "你"


def test_what_terminals_obey_never_reaches_a_frame() -> None:
    tokenizer = dgemma.Tokenizer.from_gguf(TINY)
    ids = tokenizer.encode("a\x1b[31mb\x00\u202ec\ufffe\r")
    framer = Framer(tokenizer, TinyConfig(), 1)  # type: ignore[arg-type]
    frame = framer.frame(step(ids, [0.0] * len(ids), [True] * len(ids)))
    assert "".join(cell.text for cell in frame.cells) == "a·[31mb··c··"


def test_a_long_answer_is_recorded_by_its_end() -> None:
    cells = tuple(Cell(f"line {i}\n") for i in range(100))
    pages = recording([Frame(1, 0, 9, cells, cells, 1, 1, (1.0,), False)], [9.9])
    assert pages.rows == 30 and len(pages.pages[0].lines) == 30 and pages.columns <= 80
    assert pages.pages[0].lines[-2] == [("line 99", "sure")]


@pytest.mark.parametrize(
    ("name", "code", "told"), [("a.mp4", 2, "must end in .cast, .svg or .gif"), ("none/a.svg", 1, "there is no folder")]
)
def test_a_recording_that_cannot_be_is_refused_before_any_work(name: str, code: int, told: str, tmp_path: Path) -> None:
    done = run("--record", str(tmp_path / name))
    assert (done.returncode, done.stdout) == (code, b"") and done.stderr.count(b"\n") == 1
    assert told in done.stderr.decode() and not list(tmp_path.iterdir())


def test_without_pillow_a_gif_is_refused_in_a_line(tmp_path: Path) -> None:
    hidden = "import sys; sys.modules['PIL'] = None; from dgemma.cli.run import main; main.main(prog_name='dg-run')"
    done = subprocess.run(
        [sys.executable, "-c", hidden, "-p", PUZZLE, "--record", str(tmp_path / "a.gif")], capture_output=True
    )
    assert done.returncode == 1 and done.stdout == b"" and done.stderr.count(b"\n") == 1
    assert b"pip install 'dgemma[record]'" in done.stderr


# ---- terminals ----

HARD = ["-p", "." * 9 + PUZZLE[9:], "--steps", "6", "--confidence", "0", "--quiet", "--visual"]


@pytest.mark.parametrize(
    ("environ", "sequence"),
    [
        ({"COLORTERM": "truecolor"}, r"\x1b\[38;2;\d+;\d+;\d+m"),
        ({"TERM": "xterm-256color"}, r"\x1b\[38;5;\d+m"),
    ],
)
def test_entropy_has_colours_where_the_terminal_has_them(environ: dict[str, str], sequence: str) -> None:
    code, written = on_terminal(*HARD, **environ)
    assert code == 0 and re.search(sequence, written) and "\x1b[1m" in written
    assert "entropy" in written and re.search("accepted [▁▂▃▄▅▆▇█]{2,6}", written)


@pytest.mark.parametrize("environ", [{"NO_COLOR": "1", "COLORTERM": "truecolor"}, {"TERM": "xterm"}])
def test_without_colours_the_uncertain_is_dim(environ: dict[str, str]) -> None:
    code, written = on_terminal(*HARD, **environ)
    assert code == 0 and not re.search(r"\x1b\[[\d;]*3[0-9]", written)
    assert "\x1b[1m" in written and "\x1b[2m" in written


def test_a_light_terminal_has_its_own_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    for told, palette in (("0;15", LIGHT), ("0;default;15", LIGHT), ("15;0", DARK), ("", DARK)):
        monkeypatch.setenv("COLORFGBG", told)
        assert of_terminal() is palette


def test_a_terminal_that_cannot_go_back_gets_lines() -> None:
    code, written = on_terminal(*HARD, TERM="dumb")
    assert code == 0 and "\x1b" not in written
    told = written.splitlines()
    assert [line[:17] for line in told[:6]] == [f"canvas 1 · step {i}" for i in range(1, 7)]
    assert len(told[6:]) == run(*HARD[2:]).stdout.count(b"\n")


def test_a_terminal_that_shrinks_is_left_clean() -> None:
    from rich.console import Console
    from rich.text import Text

    from dgemma.cli.live_region import Region

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=40, height=10, legacy_windows=False)
    region = Region(console)
    region.draw([Text("x" * 40), Text("y" * 30)])
    console.width = 15  # the terminal wraps what stands there: into 3 rows and 2
    region.draw([Text("z" * 40)])
    written = out.getvalue()
    assert written.count("\x1b[1A") == 4 and "z" * 15 in written and "z" * 16 not in written
    region.clear()
    assert out.getvalue().endswith("\r\x1b[2K\x1b[?25h")
