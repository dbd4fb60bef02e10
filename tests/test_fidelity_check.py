"""dg-convert --verify where dg-eval is there: what the new file says beside what its source says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.converting import leftovers, run

from dgemma.convert import convert
from dgemma.errors import SystemFailure
from dgemma.model import bundled

pytest.importorskip("dgemma.eval.fidelity")
SUDOKU = Path(__file__).parent / "models" / "sudoku"


def test_fewer_bits_say_other_things_and_the_report_tells(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out.gguf"
    found = {}
    for type_ in ("bf16", "q4_0"):
        code, text, _ = run(capsys, SUDOKU, "-o", out, "--type", type_, "--verify", "--json", "--force")
        found[type_] = json.loads(text)["fidelity"]
        assert code == 0
    code, text, _ = run(capsys, SUDOKU, "-o", out, "--type", "bf16", "--verify", "--force")
    assert code == 0 and f"of {found['bf16']['prompts']} prompts" in text.splitlines()[-1]
    assert found["bf16"]["kl_mean"] == 0 and found["bf16"]["committed"] == 1
    assert 0 < found["q4_0"]["kl_mean"] < 0.5
    assert leftovers(tmp_path) == ["out.gguf"]


def test_a_gguf_source_is_compared_as_it_is(tmp_path: Path) -> None:
    done = convert(bundled(), tmp_path / "out.gguf", "q8_0", verify=True)
    assert done.fidelity.kl_mean == 0 and done.fidelity.base["name"] == Path(bundled()).name


def test_where_there_is_no_room_for_the_source_the_file_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(target: Path, size: int) -> None:
        if "working" in target.name:
            raise SystemFailure(f"{target}: no space left on device")

    monkeypatch.setattr("dgemma.convert.writer.refuse_full_disk", full)
    code, text, _ = run(capsys, SUDOKU, "-o", tmp_path / "out.gguf", "--type", "q8_0", "--verify")
    assert code == 0 and "what it says was not compared: " in text and "no space left" in text.splitlines()[-1]
    assert leftovers(tmp_path) == ["out.gguf"]
