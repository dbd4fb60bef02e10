"""dg-convert with a tokenizer.model: the package sentencepiece trains them, and says what texts become."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from fuzz import parser_seeds
from support.checkpoints import write_checkpoint, write_json
from support.converting import refused, run

import dgemma
from dgemma.convert import convert

CORPUS = Path(__file__).parent / "fuzz" / "corpus" / "sentencepiece"
# One of these files is not damaged for this test: it has too many pieces for the 16 of the fuzz target's vocabulary.
DAMAGED = sorted(file for file in CORPUS.glob("odd-*") if file.name != "odd-too-many")


def train_sentencepiece(file: Path, **options: Any) -> Any:
    arguments: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "eos_piece": "<eos>",
        "bos_piece": "<bos>",
        "user_defined_symbols": ["<mask>", "<|turn>", '<|"|>', "\n", "\n\n", "\u2581\u2581"],
        "minloglevel": 2,
    }
    lines = ["the quick brown fox jumps over the lazy dog", "why is the sky blue and the sea too"] * 40
    with file.open("wb") as out:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=out, **(arguments | options)
        )
    return sentencepiece.SentencePieceProcessor(model_proto=file.read_bytes())


@pytest.fixture
def spm_checkpoint(tmp_path: Path) -> Path:
    """A checkpoint without a tokenizer, for a tokenizer.model."""
    folder = tmp_path / "checkpoint"
    write_checkpoint(folder, layers=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    return folder


def test_tokenizer_model_alone_is_enough(spm_checkpoint: Path) -> None:
    pieces = train_sentencepiece(spm_checkpoint / "tokenizer.model")
    convert(spm_checkpoint, spm_checkpoint / "out.gguf", "q8_0")
    fields = gguf.GGUFReader(spm_checkpoint / "out.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:340] == [pieces.id_to_piece(i) for i in range(340)] and len(tokens) == 512
    types = dict(zip(tokens, fields["tokenizer.ggml.token_type"].contents(), strict=True))
    expected = {"<pad>": 3, "<unk>": 3, "<mask>": 3, "<|turn>": 3, '<|"|>': 4, "\n\n": 4, "<0x41>": 6, "\u2581the": 1}
    assert {token: types[token] for token in expected} == expected
    special = {name: fields[f"tokenizer.ggml.{name}_token_id"].contents() for name in ("bos", "unknown", "mask")}
    assert special == {"bos": 2, "unknown": 3, "mask": 4}
    tokenizer = dgemma.Tokenizer.from_gguf(spm_checkpoint / "out.gguf")
    for text in ("the quick brown fox", "why  is the\n\nsky too \u00fc", " jumps over", "blue<|turn>"):
        assert tokenizer.encode(text, special=True) == pieces.encode(text), text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram", "vocab_size": 296}, "not a BPE model"),
        ({"add_dummy_prefix": True}, "puts a space in front"),
        ({"remove_extra_whitespaces": True}, "folds spaces"),
        ({"normalization_rule_name": "nfkc"}, "its normalizer changes '\\xa0'"),
        ({"normalization_rule_name": "nmt_nfkc"}, "its normalizer changes '\\x01'"),
        ({"normalization_rule_name": "nfkc_cf"}, "its normalizer changes 'A'"),
        ({"user_defined_symbols": ["<0x41>"], "byte_fallback": False, "vocab_size": 100}, "'<0x41>' is no byte there"),
        ({"user_defined_symbols": ["\u2581zq\u2581"]}, "user-defined piece '\u2581zq\u2581'"),
        ({"vocab_size": 520, "user_defined_symbols": [f"<{i}>" for i in range(190)]}, "more than vocab_size"),
        (None, "not a SentencePiece model"),
    ],
)
def test_a_sentencepiece_model_of_another_kind_is_refused(
    options: dict[str, Any] | None, complaint: str, spm_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options is None:
        (spm_checkpoint / "tokenizer.model").write_bytes(b"no model")
    else:
        train_sentencepiece(spm_checkpoint / "tokenizer.model", **options)
    err = refused(capsys, 1, spm_checkpoint, "-o", spm_checkpoint / "out.gguf")
    assert "tokenizer.model" in err and complaint in err


@pytest.mark.parametrize("file", DAMAGED, ids=lambda file: file.name)
def test_a_damaged_file_is_refused_in_one_line_and_the_package_prints_nothing(
    file: Path, spm_checkpoint: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (spm_checkpoint / "tokenizer.model").write_bytes(file.read_bytes())
    err = refused(capfd, 1, spm_checkpoint, "-o", spm_checkpoint / "out.gguf")
    assert f"{spm_checkpoint / 'tokenizer.model'}: " in err


def test_the_package_prints_nothing_of_an_odd_piece(spm_checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train_sentencepiece(file := spm_checkpoint / "tokenizer.model")
    odd = file.read_bytes().replace(b"\n\x01q", b"\n\x01\0", 1)
    assert odd != file.read_bytes()
    file.write_bytes(odd)
    status, _, err = run(capfd, spm_checkpoint, "-o", spm_checkpoint / "out.gguf")
    assert status == 0 and err.count("\n") == 1 and err.startswith(f"{spm_checkpoint / 'out.gguf'}: q4_k_m"), err


def test_a_piece_that_the_runtime_does_not_read_is_refused_before_its_merges_are_sought(
    spm_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are sought in the square of its length."""
    monkeypatch.setattr("dgemma.convert.tokenizer_model._merges", lambda *_: pytest.fail("merges are sought"))
    long = parser_seeds._piece(b"ab" * 3500, -4.0)
    (spm_checkpoint / "tokenizer.model").write_bytes(parser_seeds.sentencepiece()["seed-whole"] + long)
    err = refused(capsys, 1, spm_checkpoint, "-o", spm_checkpoint / "out.gguf")
    assert "tokenizer.model: token 10 has 7000 bytes, more than the 1024 there may be" in err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"extra_special_tokens": ["\u2581the"]}),
        ("tokenizer_config.json", {"mask_token": {"content": "<mask>", "lstrip": True}}),
        ("special_tokens_map.json", {"sep_token": "\u2581the"}),
        ("added_tokens.json", {"\u2581the": None}),
    ],
)
def test_tokens_that_other_files_add_to_a_sentencepiece_model_are_refused(
    name: str, content: Any, spm_checkpoint: Path, capsys: Any
) -> None:
    pieces = train_sentencepiece(spm_checkpoint / "tokenizer.model")
    write_json(
        spm_checkpoint / "special_tokens_map.json", {"bos_token": "<bos>", "additional_special_tokens": ["<|turn>"]}
    )
    convert(spm_checkpoint, spm_checkpoint / "out.gguf", "q8_0", force=True)
    if None in content.values():
        content = dict.fromkeys(content, pieces.piece_to_id("\u2581the"))
    write_json(spm_checkpoint / name, content)
    err = refused(capsys, 1, spm_checkpoint, "-o", spm_checkpoint / "out.gguf", "--force")
    assert "another token than in tokenizer.model is made of" in err


def test_a_sentencepiece_model_without_bytes_is_told_of(spm_checkpoint: Path, capsys: Any) -> None:
    pieces = train_sentencepiece(spm_checkpoint / "tokenizer.model", byte_fallback=False, vocab_size=90)
    status, _, err = run(capsys, spm_checkpoint, "-o", spm_checkpoint / "out.gguf")
    assert status == 0 and "tokenizer.model: no tokens of bytes: characters that are no token become <unk>" in err
    tokenizer = dgemma.Tokenizer.from_gguf(spm_checkpoint / "out.gguf")
    for text in ("the quick", "\u00fc the \u4f60\u597d", "fox\u00fc\u00fc"):
        assert tokenizer.encode(text) == pieces.encode(text), text
