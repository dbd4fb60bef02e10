"""dg-info: its page and its JSON, against what gguf-py reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.checkpoints import TEMPLATE, write_checkpoint
from support.commands import Inside

from dgemma.cli import inspect as facts_module
from dgemma.cli.info import main
from dgemma.cli.inspect import PARTS, facts, part_of
from dgemma.convert import convert

BUNDLED = Path(facts_module.__file__).parents[1] / "models" / "sudoku-q8_0.gguf"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("info") / "tiny-model"
    write_checkpoint(folder, hidden=256)
    convert(folder, folder.parent / "out.gguf", "q4_k_m")
    return folder.parent / "out.gguf"


run = Inside(main, "dg-info").run


def test_json_has_what_is_in_the_file(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model, "--json")
    assert (code, err) == (0, "")
    told, reader = json.loads(out), gguf.GGUFReader(model)
    assert (told["path"], told["bytes"], told["parts"]) == (str(model), model.stat().st_size, 1)
    assert (told["runs"], told["refusal"]) == (True, None)
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(told["metadata"]) == list(fields)
    for name, value in told["metadata"].items():
        wanted = fields[name].contents()
        assert np.allclose(value["value"], wanted) if "F32" in value["kind"] else value["value"] == wanted, name
        assert value.get("count") == (len(wanted) if isinstance(wanted, list) else None)
    assert told["metadata"]["diffusion.eb_t_min"]["value"] == 0.4
    names = [(t.name, t.tensor_type.name, list(t.shape), t.n_bytes) for t in reader.tensors]
    assert [(t["name"], t["format"], t["dims"], t["bytes"]) for t in told["tensors"]] == names
    assert told["chat_template"] == TEMPLATE
    assert told["tokenizer"]["tokens"] == 512 and told["tokenizer"]["ids"]["bos"] == 2
    assert told["tokenizer"]["texts"]["bos"] == "<bos>" and sum(told["tokenizer"]["kinds"].values()) == 512
    assert told["config"]["n_layer"] == 6 and told["config"]["sliding"] == [1, 1, 1, 1, 1, 0]


def test_parameters_are_counted_by_part_and_type(model: Path) -> None:
    told, tensors = facts(model), gguf.GGUFReader(model).tensors
    parts: dict[str, int] = {}
    for tensor in tensors:
        parts[part_of(tensor.name)] = parts.get(part_of(tensor.name), 0) + int(tensor.n_elements)
    assert {name: part["parameters"] for name, part in told["parameters"]["parts"].items()} == parts
    assert set(parts) == set(PARTS)
    experts = 6 * 8 * 3 * 32 * 256
    assert parts["experts"] == experts
    assert told["parameters"]["total"] == sum(parts.values())
    assert told["parameters"]["active"] == sum(parts.values()) - experts * 6 // 8
    for name, of in told["formats"].items():
        these = [t for t in tensors if t.tensor_type.name == name]
        expected = (len(these), sum(int(t.n_elements) for t in these), sum(int(t.n_bytes) for t in these))
        assert (of["tensors"], of["parameters"], of["bytes"]) == expected


def test_every_tensor_of_a_checkpoint_belongs_to_a_part(model: Path) -> None:
    others = {"blk.0.attn_q_norm.weight": "norms and scales", "blk.0.ffn_norm.weight": "norms and scales"}
    others |= {"blk.0.ffn_gate_inp.scale": "router", "blk.0.ffn_down_exps.scale": "router", "x": "others"}
    others |= {"blk.0.ffn_up_exps.weight": "experts", "self_cond_pre_norm.weight": "self-conditioning"}
    assert {name: part_of(name) for name in others} == others
    assert "others" not in facts(model)["parameters"]["parts"]


def test_the_page_is_for_reading(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, model)
    assert (code, err) == (0, "") and "\x1b" not in out
    titles = ("Model", "Parameters", "Types", "Tokenizer", "Chat template", "Metadata")
    for words in (*titles, "6: 5 sliding, 1 full", "begin with"):
        assert words in out, words
    assert "8, of which a token meets 2" in out and "MiB" in out and "tokenizer.ggml.tokens" in out
    assert "blk.0.attn_q.weight" not in out
    _, with_tensors, _ = run(capsys, model, "--tensors")
    assert with_tensors.startswith(out) and with_tensors.count("blk.0.") == 25 - 2
    assert max(map(len, with_tensors.splitlines())) <= 120 + len(str(model))


def test_a_vocabulary_alone_and_another_architecture_are_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = gguf.GGUFReader(model), gguf.GGUFWriter(tmp_path / "vocab.gguf", "gemma4")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=field.types[-1])
    writer.add_string("general.name", "evil \x1b[31m\nname")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    code, out, _ = run(capsys, tmp_path / "vocab.gguf")
    assert code == 0 and "does not run this file" in out and "'gemma4'" in out
    assert "Tokenizer" in out and "Parameters" not in out and "\x1b" not in out
    told = facts(tmp_path / "vocab.gguf")
    assert not told["runs"] and told["config"] is None and told["tensors"] == []


def test_a_split_file_is_told_as_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "tiny"
    write_checkpoint(folder, layers=2)
    done = convert(folder, tmp_path / "out.gguf", "bf16", split_max_size=200_000)
    told = facts(done.path)
    assert told["runs"] and told["parts"] == len(done.paths) > 1 and told["bytes"] == done.plan.file_bytes
    assert f"in {len(done.paths)} files" in run(capsys, done.path)[1]


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        ([], 2, "MODEL"),
        (["{tmp}/none.gguf"], 1, "none.gguf: cannot open"),
        (["{tmp}"], 1, "a folder, not a GGUF file"),
        (["{tmp}/text"], 1, "text: not a GGUF file"),
        (["{tmp}/text", "--everything"], 2, "--everything"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(
    arguments: list[str], code: int, complaint: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "text").write_text("text")
    status, out, err = run(capsys, *(a.replace("{tmp}", str(tmp_path)) for a in arguments))
    assert (status, out) == (code, "") and err.count("\n") == 1
    assert err.startswith("dg-info: ") and complaint in err


def test_it_is_a_command_with_a_manual(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0 and out.count("dg-info ") >= 3 and all(flag in out for flag in ("--tensors", "--json"))
    assert run(capsys, "--version")[1].startswith("dg-info ")
    assert run(capsys, BUNDLED)[0] == 0
