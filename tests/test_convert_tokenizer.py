"""A tokenizer.json gives the ids and texts that `tokenizers` gives with it, or is refused by what it does."""

from __future__ import annotations

import copy
import json
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import write_checkpoint, write_json
from support.converting import edit_json, refused, run
from tokenizers import Tokenizer as Reference

import dgemma
from dgemma.convert.config import read_config
from dgemma.convert.metadata import metadata
from dgemma.convert.opening import open_vocabulary
from dgemma.convert.tokenizer import read_vocabulary

SPACE = "\u2581"
SPLIT_TEXT = "why <|think|> the sky"
TEXTS = [
    SPLIT_TEXT,
    "  the\n\n\n\n sky \n is<|turn> blue<turn|>\n",
    "The SKY a1b 22, is\tblue?  \u4f60\u597d \u00e9e\u0301 \u00df\U0001f642\ufb01",
    f"a{SPACE}b <unk><0x41> x<|turn>x the<|turn>\n\n<bos><|think|><|thi the_sky",
    "",
    " ",
    "\n",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "in"
    write_checkpoint(folder, layers=1)
    return folder


@pytest.fixture(scope="module")
def plain(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return value


def tokenizer_of(folder: Path) -> dgemma.Tokenizer:
    """The runtime's tokenizer of a checkpoint's files."""
    config = read_config(folder)
    vocabulary = read_vocabulary(folder, config.values["n_vocab"], config.special_ids)
    return open_vocabulary(metadata(config, vocabulary, [], 0), vocabulary)


def with_tokenizer(
    folder: Path, top: dict[str, Any], beside: dict[str, Any] | None = None, **tokenizer_config: Any
) -> dgemma.Tokenizer:
    """beside: further files, by name."""
    with tempfile.TemporaryDirectory() as name:
        other = Path(name)
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        write_json(other / "tokenizer.json", top)
        found = json.loads((folder / "tokenizer_config.json").read_text())
        write_json(other / "tokenizer_config.json", found | tokenizer_config)
        for name, value in (beside or {}).items():
            write_json(other / name, value)
        return tokenizer_of(other)


def equal(ours: dgemma.Tokenizer, top: dict[str, Any], texts: list[str] = TEXTS) -> None:
    theirs = Reference.from_str(json.dumps(top))
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids, text
        assert ours.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False), text
        if text and not text.startswith("<bos>"):
            assert ours.prompt(text) == begun(theirs.encode(text).ids), text


def begun(ids: list[int]) -> list[int]:
    """Gemma's <bos> comes first in the runtime, whatever a tokenizer does."""
    return ids if ids[:1] == [2] else [2, *ids]


# ---- every part of a tokenizer.json ----


def replace(old: Any = " ", new: str = SPACE, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: old}, "content": new}


def split(pattern: str, behavior: str = "Isolated", kind: str = "Regex", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}


def metaspace(scheme: str = "never", split: bool = False) -> dict[str, Any]:
    return {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": split}


def sequence(key: str, *steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", key: list(steps)}


def strip(left: bool, right: bool) -> dict[str, Any]:
    return {"type": "Strip", "strip_left": left, "strip_right": right}


N, P, D = "normalizers", "pretokenizers", "decoders"
LOWER = {"type": "Lowercase"}
BERT = {"clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": False}
NORMALIZERS = [
    replace(),
    replace(kind="Regex"),
    sequence(N, replace()),
    sequence(N, sequence(N), sequence(N, replace())),
]
NORMALIZERS += [sequence(N, replace(), strip(False, False)), sequence(N, replace(), replace("a b", "ab"))]
NORMALIZERS += [
    None,
    LOWER,
    sequence(N),
    sequence(N, replace(), LOWER),
    sequence(N, LOWER, replace()),
    replace(new="_"),
]
NORMALIZERS += [{"type": kind} for kind in ("NFC", "NFKC", "NFD", "Nmt", "StripAccents")]
NORMALIZERS += [{"type": "Prepend", "prepend": SPACE}, sequence(N, {"type": "Prepend", "prepend": SPACE}, replace())]
NORMALIZERS += [sequence(N, replace(), strip(True, False)), sequence(N, replace(), replace("sky", "the"))]
NORMALIZERS += [sequence(N, replace(" +", SPACE, "Regex")), sequence(N, replace(), {"type": "BertNormalizer"} | BERT)]

PRE_TOKENIZERS = [
    None,
    split(" ", "MergedWithPrevious", "String"),
    split(" ", "Removed", "String"),
    split(" +", "Removed"),
]
PRE_TOKENIZERS += [split("\n+"), split(r"\n+"), split("[^\n]+|[\n]+"), split(r"[^\n]+|\n+"), split("\n", "Contiguous")]
PRE_TOKENIZERS += [
    metaspace(),
    sequence(P, metaspace(), split(" ", kind="String")),
    sequence(P),
    sequence(P, split("\n+")),
]
PRE_TOKENIZERS += [metaspace("always"), metaspace("first"), metaspace("never", True), metaspace("always", True)]
PRE_TOKENIZERS += [split("[a-z]"), split("\n", kind="String"), split("\n+", "Removed"), split("\n+", "MergedWithNext")]
PRE_TOKENIZERS += [split(" ", "Removed", "String", True), split("\n+", invert=True), split("e", "Isolated", "String")]
PRE_TOKENIZERS += [split(" *"), split(" ?"), split(r"\s+"), sequence(P, split(" ", kind="String"), split(r"\d"))]
PRE_TOKENIZERS += [{"type": kind} for kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts")]
PRE_TOKENIZERS += [{"type": "Digits", "individual_digits": True}, {"type": "Punctuation", "behavior": "Isolated"}]
PRE_TOKENIZERS += [{"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}]

BACK, BYTES, FUSE = replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}
DECODERS = [sequence(D, BACK, BYTES, FUSE), sequence(D, BACK, BYTES), sequence(D, sequence(D, BACK), BYTES, FUSE)]
DECODERS += [sequence(D, metaspace(), BYTES, FUSE), sequence(D, BYTES, BACK, FUSE), sequence(D, BYTES, FUSE, BACK)]
DECODERS += [sequence(D, BACK, FUSE, BYTES), sequence(D, BACK, FUSE), BACK, BYTES, FUSE, None, sequence(D)]
DECODERS += [sequence(D, BACK, BYTES, FUSE, {"type": "Strip", "content": " ", "start": n, "stop": 0}) for n in (0, 1)]
DECODERS += [sequence(D, metaspace("always"), BYTES, FUSE), {"type": "ByteLevel", "add_prefix_space": False}]
DECODERS += [sequence(D, BACK, BYTES, replace("sky", "the")), {"type": "BPEDecoder", "suffix": "</w>"}]

BOS, TEXT, EOS = (
    {"SpecialToken": {"id": "<bos>", "type_id": 0}},
    {"Sequence": {"id": "A", "type_id": 0}},
    {"SpecialToken": {"id": "<eos>", "type_id": 0}},
)


def template(*single: Any) -> dict[str, Any]:
    names = {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in (("<bos>", 2), ("<eos>", 1))}
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": list(single), "pair": pair, "special_tokens": names}


OFFSETS = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
POST = [template(BOS, TEXT), template(TEXT), sequence("processors", OFFSETS, template(BOS, TEXT)), OFFSETS]
POST += [template(BOS, TEXT, EOS), template(EOS, TEXT), template(BOS, BOS, TEXT), template(TEXT, EOS)]
POST += [sequence("processors", template(BOS, TEXT), template(TEXT, EOS)), sequence("processors", OFFSETS)]
POST += [{"type": "BertProcessing", "sep": ["<eos>", 1], "cls": ["<bos>", 2]}]

LONG = {"direction": "Right", "strategy": "LongestFirst", "stride": 0, "max_length": 4}
PADDED = {"direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
PADDING = [None, PADDED | {"strategy": "BatchLongest"}, PADDED | {"strategy": {"Fixed": 40}}]
PADDING += [PADDED | {"strategy": "BatchLongest", "pad_to_multiple_of": 8}]

PARTS: dict[str, list[Any]] = {
    "normalizer": NORMALIZERS,
    "pre_tokenizer": PRE_TOKENIZERS,
    "decoder": DECODERS,
    "post_processor": POST,
    "truncation": [None, LONG],
    "padding": PADDING,
}
MODEL: dict[str, list[Any]] = {
    "dropout": [None, 0.0, 0.5, 1.0],
    "unk_token": ["<unk>", None, "<pad>"],
    "fuse_unk": [True, False],
    "byte_fallback": [True, False],
    "ignore_merges": [False, True],
    "continuing_subword_prefix": [None, "", "##"],
    "end_of_word_suffix": [None, "", "</w>"],
}
Change = Callable[[dict[str, Any]], object]


def lose_bytes(keep: int) -> Change:
    """Takes the tokens of bytes from number `keep` on away."""

    def change(top: dict[str, Any]) -> None:
        vocab = top["model"]["vocab"]
        for i in range(keep, 256):
            vocab.pop(f"<0x{i:02X}>", None)

    return change


def merge(left: str, right: str, first: bool = True) -> Change:
    """One merge more, and its token in the place of an unused one."""

    def change(top: dict[str, Any]) -> None:
        vocab, merges = top["model"]["vocab"], top["model"]["merges"]
        if left + right not in vocab:
            unused = next(token for token in vocab if token.startswith("<unused"))
            vocab[left + right] = vocab.pop(unused)
        merges.insert(0 if first else len(merges), [left, right])

    return change


def without_merge(*pair: str) -> Change:
    return lambda top: top["model"]["merges"].remove(list(pair))


def flag(text: str, **flags: Any) -> Change:
    """Sets flags of an added token, which is new where it is only in the vocabulary."""

    def change(top: dict[str, Any]) -> None:
        for entry in top["added_tokens"]:
            if entry["content"] == text:
                entry.update(flags)
                return
        entry = {"id": top["model"]["vocab"][text], "content": text, "special": False, "normalized": True}
        top["added_tokens"].append(entry | {"single_word": False, "lstrip": False, "rstrip": False} | flags)
        top["added_tokens"].sort(key=lambda entry: entry["id"])

    return change


def rename(text: str) -> Change:
    """Gives an unused token another text."""

    def change(top: dict[str, Any]) -> None:
        vocab = top["model"]["vocab"]
        vocab[text] = vocab.pop(next(token for token in vocab if token.startswith("<unused")))

    return change


def not_added(text: str) -> Change:
    return lambda top: top.update(added_tokens=[entry for entry in top["added_tokens"] if entry["content"] != text])


def all_normalized(top: dict[str, Any]) -> None:
    for entry in top["added_tokens"]:
        entry["normalized"] = True


CHANGES: dict[str, Change] = {
    "no bytes": lose_bytes(0),
    "some bytes": lose_bytes(200),
    "newlines and letters": merge("k", "\n"),
    "newlines and letters last": merge("\n\n", SPACE, first=False),
    "newlines otherwise": without_merge("\n", "\n"),
    "one byte": lambda top: [top["model"]["vocab"].pop(f"<0x{i:02X}>", None) for i in range(256) if i != 0x41],
    "all bytes but one": lambda top: top["model"]["vocab"].pop("<0x41>"),
    "an added byte": flag("<0x41>"),
    "an added byte, not normalized": flag("<0x41>", normalized=False),
    "an added byte, special": flag("<0x41>", special=True, normalized=False),
    "bytes merged": merge("<0xE4>", "<0xBD>"),
    "lstrip": flag("<|think|>", lstrip=True),
    "rstrip": flag("<|think|>", rstrip=True),
    "single_word": flag("<|turn>", single_word=True),
    "normalized": flag("<|turn>", normalized=True),
    "all normalized": all_normalized,
    "added letters": flag("the"),
    "added letters, not normalized": flag("the", normalized=False),
    "added with a space": flag(SPACE + "the", normalized=False),
    "added with a space, normalized": flag(SPACE + "the"),
    "added newlines": flag("\n\n", normalized=False),
    "added with a mark": lambda top: (merge("x", "<|turn>")(top), flag("x<|turn>")(top)),
    "a mark is text": not_added("<|turn>"),
    "text that is a mark": rename("<|x|>"),
    "added with half a mark": lambda top: (merge("x", "<|t")(top), flag("x<|t")(top)),
}


def refused_or_equal(folder: Path, top: dict[str, Any], texts: list[str] = TEXTS) -> bool:
    """Whether it was taken, and then is equal."""
    try:
        ours = with_tokenizer(folder, top)
    except dgemma.FormatError as refusal:
        assert ".json: " in str(refusal) and "\n" not in str(refusal)
        return False
    equal(ours, top, texts)
    return True


SINGLE = [(part, value) for part, values in PARTS.items() for value in values]


@pytest.mark.parametrize(("part", "value"), SINGLE)
def test_each_part_of_a_tokenizer_is_known_or_refused(
    part: str, value: Any, folder: Path, plain: dict[str, Any]
) -> None:
    refused_or_equal(folder, plain | {part: value})


def test_other_spellings_of_the_same_are_taken(folder: Path, plain: dict[str, Any]) -> None:
    taken = {part: sum(refused_or_equal(folder, plain | {part: v}) for v in values) for part, values in PARTS.items()}
    assert taken == {
        "normalizer": 6,
        "pre_tokenizer": 13,
        "decoder": 5,
        "post_processor": 5,
        "truncation": 1,
        "padding": 2,
    }


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in MODEL.items() for value in values])
def test_each_setting_of_the_model_is_known_or_refused(key: str, value: Any, folder: Path, plain: Any) -> None:
    taken = refused_or_equal(folder, plain | {"model": plain["model"] | {key: value}})
    assert taken is (
        value in (*MODEL[key][:1], "") or (key, value) == ("dropout", 0.0) or key in ("unk_token", "fuse_unk")
    ), "all bytes are tokens"


@pytest.mark.parametrize("name", CHANGES)
def test_each_change_of_tokens_and_merges_is_known_or_refused(name: str, folder: Path, plain: dict[str, Any]) -> None:
    top = copy.deepcopy(plain)
    CHANGES[name](top)
    harmless = {"normalized", "all normalized", "added letters", "added letters, not normalized", "added newlines"}
    harmless |= {"no bytes", "added with a space"}
    assert refused_or_equal(folder, top) is (name in harmless)


MARKS = ["<|foo|>", "<|foo>", "<foo|>", "<|im_end|>", "<end_of_turn>", "<start_of_turn>", "<|endoftext|>", "<EOT>"]
UNADDED = ["<|turn>", "<turn|>", "<|think|>", "<|tool_call>", '<|"|>']


@pytest.mark.parametrize("text", MARKS + UNADDED)
def test_a_mark_that_is_ordinary_text_in_the_vocabulary_is_refused(
    text: str, folder: Path, plain: dict[str, Any]
) -> None:
    """`tokenizers` takes such texts apart, or merges them; the runtime takes them as what they look like."""
    top = copy.deepcopy(plain)
    (not_added if text in UNADDED else rename)(text)(top)
    i = top["model"]["vocab"][text]
    named = f"tokenizer.json: token {i}, {text!r}, is ordinary text there, and a mark in the runtime"
    with pytest.raises(dgemma.FormatError, match=re.escape(named)):
        with_tokenizer(folder, top)
    if text in MARKS:  # as one that is added it is taken
        flag(text, special=True, normalized=False)(top)
        equal(with_tokenizer(folder, top), top, [*TEXTS, f"x{text}y"])


@pytest.mark.parametrize("text", ["</s>", "<|a b|>", "<||>", "<||", "<|\u65e5|>", "<b>", "<h1>"])
def test_what_only_resembles_a_mark_is_text(text: str, folder: Path, plain: dict[str, Any]) -> None:
    """`</s>` is HTML in Gemma's vocabulary."""
    top = copy.deepcopy(plain)
    rename(text)(top)
    equal(with_tokenizer(folder, top), top, [*TEXTS, f"x{text}y"])


def test_what_the_runtime_does_not_read_is_refused_before_any_weight_is_read(tmp_path: Path, capsys: Any) -> None:
    write_checkpoint(tmp_path / "in", layers=1)
    edit_json(tmp_path / "in" / "tokenizer.json", rename("x" * 1500))
    for more in (["-o", tmp_path / "out.gguf"], ["--dry-run"]):
        err = refused(capsys, 1, tmp_path / "in", *more)
        assert "in/tokenizer.json: token " in err and "has 1500 bytes, more than the 1024" in err
    assert not (tmp_path / "out.gguf").exists()


def test_a_token_that_the_runtime_does_not_read_is_refused_before_it_is_merged(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging newlines takes the square of their number."""
    monkeypatch.setattr("dgemma.convert.steps.merged", lambda *_: pytest.fail("it is merged"))
    write_checkpoint(tmp_path / "in", layers=1)
    edit_json(tmp_path / "in" / "tokenizer.json", rename("\n" * 1_000_000))
    err = refused(capsys, 1, tmp_path / "in", "-o", tmp_path / "out.gguf")
    assert "in/tokenizer.json: token " in err and "has 1000000 bytes, more than the 1024 there may be" in err


@given(st.data())
@settings(max_examples=250, deadline=None)
def test_any_tokenizer_is_refused_or_gives_the_same_ids(
    folder: Path, plain: dict[str, Any], data: st.DataObject
) -> None:
    top = copy.deepcopy(plain)
    likely = [(part, value) for part in ("normalizer", "pre_tokenizer", "decoder") for value in PARTS[part][:5]]
    for part, value in data.draw(st.lists(st.sampled_from(likely) | st.sampled_from(SINGLE), max_size=3)):
        top[part] = value
    for key in data.draw(st.lists(st.sampled_from(sorted(MODEL)), max_size=2)):
        top["model"][key] = data.draw(st.sampled_from(MODEL[key]))
    for name in data.draw(st.lists(st.sampled_from(sorted(CHANGES)), unique=True, max_size=2)):
        with suppress(KeyError):  # of a token that the change before took away
            CHANGES[name](top)
    pieces = st.sampled_from(
        [" ", "\n", "the", "sky", "<|turn>", "x<|t", "x", "k", "\u4f60", "\u00e9", SPACE, "<0xE4>", "<unk>"]
    )
    refused_or_equal(folder, top, [*TEXTS, "".join(data.draw(st.lists(pieces, max_size=12)))])


# ---- tokenizer_config.json beside it ----

CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "lstrip": ({"added_tokens_decoder": {"7": {"content": "<|think|>", "lstrip": True}}}, "'<|think|>' has lstrip"),
    "of a special token": ({"eos_token": {"content": "<eos>", "rstrip": True}}, "'<eos>' has rstrip"),
    "another id": ({"added_tokens_decoder": {"9": {"content": "<|think|>"}}}, "added_tokens_decoder: 9 is '<|think|>'"),
    "no marks": ({"split_special_tokens": True}, "split_special_tokens"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_that_change_added_tokens_are_refused(name: str, folder: Path, plain: dict[str, Any]) -> None:
    settings, complaint = CONFIGS[name]
    with pytest.raises(dgemma.FormatError) as refusal:
        with_tokenizer(folder, plain, **settings)
    assert complaint in str(refusal.value) and "json: " in str(refusal.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["sky"]},
        {"extra_special_tokens": {"sky_token": "sky"}},
        {"sky_token": "sky"},
        {"added_tokens_decoder": {"375": {"content": "sky", "special": True, "normalized": False}}},
    ],
)
def test_tokens_that_settings_call_special_are_special(
    settings: dict[str, Any], folder: Path, plain: dict[str, Any]
) -> None:
    """As in transformers, see the oracle test below."""
    i = plain["model"]["vocab"]["sky"]
    settings = json.loads(json.dumps(settings).replace('"375"', f'"{i}"'))
    ours = with_tokenizer(folder, plain, **settings)
    assert ours.encode("the sky") == [*ours.encode("the "), i] != with_tokenizer(folder, plain).encode("the sky")
    assert ours.decode([i]) == ""


# ---- special_tokens_map.json and added_tokens.json, of older checkpoints ----

MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
NORMALIZED = {"content": "the", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
# tokenizer_config.json, the other file, its content, and which of "the" and "sky" is a token added by it. As
# transformers 5.24 does, which these were tried with.
OLDER: list[tuple[dict[str, Any], str, dict[str, Any], str]] = [
    ({}, MAP, {"additional_special_tokens": ["the"]}, "the"),
    ({}, MAP, {"extra_special_tokens": ["the"]}, "the"),
    ({}, MAP, {"extra_special_tokens": {"a_token": "the"}}, "the"),
    ({}, MAP, {"sep_token": "the"}, "the"),
    ({}, MAP, {"cls_token": NORMALIZED}, "the"),
    ({"sep_token": "sky"}, MAP, {"sep_token": "the"}, "the"),
    ({"extra_special_tokens": ["sky"]}, MAP, {"additional_special_tokens": ["the"]}, "sky"),
    ({"additional_special_tokens": ["sky"]}, MAP, {"additional_special_tokens": ["the"]}, "sky"),
    ({"extra_special_tokens": ["sky"]}, MAP, {"extra_special_tokens": ["the"]}, "the sky"),
    ({"extra_special_tokens": {"s_token": "sky"}}, MAP, {"additional_special_tokens": ["the"]}, "the sky"),
    ({"extra_special_tokens": ["sky"]}, MAP, {"extra_special_tokens": {"a_token": "the"}}, "the"),
    ({"added_tokens_decoder": {}}, MAP, {"additional_special_tokens": ["the"]}, ""),
    ({}, ADDED, {"the": 372}, "the"),
    ({}, ADDED, {"<|think|>": 7, "<bos>": 2, "sky": 375}, "sky"),
    ({"added_tokens_decoder": {}}, ADDED, {"the": 372}, ""),
]


@pytest.mark.parametrize(("settings", "name", "content", "added"), OLDER)
def test_older_files_add_tokens_as_in_transformers(
    settings: dict[str, Any], name: str, content: Any, added: str, folder: Path, plain: dict[str, Any]
) -> None:
    expected = copy.deepcopy(plain)
    for word in added.split():
        flag(word, special=name == MAP, normalized=name == ADDED)(expected)
    ours = with_tokenizer(folder, plain, {name: content}, **settings)
    equal(ours, expected)
    for word in ("the", "sky"):
        assert (ours.decode([plain["model"]["vocab"][word]]) == "") is (word in added and name == MAP)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        (MAP, {"pad_token": "<new>"}, "pad_token is '<new>', which is no token of the vocabulary"),
        (MAP, {"a_token": {"lstrip": True}}, "a special token without a text"),
        (ADDED, {"the": 373}, "'the' has id 373, and 372 in the vocabulary"),
        (ADDED, {"<new>": 512}, "'<new>' has id 512, and None in the vocabulary"),
        (ADDED, {"the": "372"}, "'the' has id '372', and 372 in the vocabulary"),
        (ADDED, [], "expected a JSON object, found a list"),
    ],
)
def test_older_files_that_would_need_other_ids_are_refused(
    name: str, content: Any, complaint: str, folder: Path, plain: dict[str, Any]
) -> None:
    with pytest.raises(dgemma.FormatError) as refusal:
        with_tokenizer(folder, plain, {name: content})
    assert f"/{name}: {complaint}" in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        (MAP, {"additional_special_tokens": ["<new>"]}, "extra_special_tokens"),
        (MAP, {"sep_token": "<new>"}, "sep_token"),
        ("tokenizer_config.json", {"sep_token": "<new>"}, "sep_token"),
        ("tokenizer_config.json", {"extra_special_tokens": {"a_token": "<new>"}}, "a_token"),
    ],
)
def test_a_special_token_that_is_no_token_is_told_and_refused_where_it_would_get_an_id(
    name: str, content: Any, key: str, tmp_path: Path, capsys: Any
) -> None:
    write_checkpoint(tmp_path / "in", layers=1)
    write_json(tmp_path / "in" / name, content)
    told = f"{name}: {key} is '<new>', which is no token of the vocabulary"
    _, out, _ = run(capsys, tmp_path / "in", "--dry-run")
    assert told in out
    edit_json(tmp_path / "in" / "tokenizer.json", lambda t: t["model"]["vocab"].pop("<unused0>"))
    assert told in refused(capsys, 1, tmp_path / "in", "--dry-run")


def test_another_beginning_token_in_an_older_file_is_refused(folder: Path, plain: dict[str, Any]) -> None:
    with pytest.raises(dgemma.FormatError, match=r"puts \['<bos>'\] around a text; the runtime puts '<eos>' before"):
        with_tokenizer(folder, plain, {MAP: {"bos_token": "<eos>"}})
    with_tokenizer(folder, plain, {MAP: {"bos_token": "<bos>"}}, bos_token="the")


# ---- whose program it is ----


@pytest.mark.parametrize("found", [None, "PreTrainedTokenizerFast", "TokenizersBackend", "GemmaTokenizer"])
def test_classes_that_do_what_tokenizer_json_says_are_taken(found: Any, folder: Path, plain: dict[str, Any]) -> None:
    equal(with_tokenizer(folder, plain, tokenizer_class=found), plain)


@pytest.mark.parametrize("found", ["LlamaTokenizerFast", "CodeLlamaTokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer"])
def test_classes_that_do_otherwise_are_refused_by_name(found: Any, folder: Path, plain: Any, tmp_path: Path) -> None:
    """transformers makes the steps of these anew, whatever tokenizer.json says."""
    with pytest.raises(dgemma.FormatError, match=f"tokenizer_config.json: tokenizer_class is {found!r}"):
        with_tokenizer(folder, plain, tokenizer_class=found)
    config = json.loads((folder / "config.json").read_text()) | {"tokenizer_class": found}
    with pytest.raises(dgemma.FormatError, match=f"/config.json: tokenizer_class is {found!r}"):
        with_tokenizer(folder, plain, {"config.json": config}, tokenizer_class=None)
    with_tokenizer(folder, plain, {"config.json": config}, tokenizer_class="GemmaTokenizerFast")


def test_the_unknown_token_is_the_models(folder: Path, plain: dict[str, Any]) -> None:
    top = copy.deepcopy(plain)
    lose_bytes(0)(top)
    with pytest.raises(dgemma.FormatError, match="unk_token is '<pad>', and the tokenizer's model has '<unk>'"):
        with_tokenizer(folder, top, unk_token="<pad>")
    top["model"]["unk_token"] = "<mask>"
    ours = with_tokenizer(folder, top, unk_token="<mask>")
    equal(ours, top)
    assert ours.encode("\u4f61") == [top["model"]["vocab"]["<mask>"]]


def test_added_tokens_with_two_ids_are_refused(folder: Path, plain: dict[str, Any]) -> None:
    top = copy.deepcopy(plain)
    top["added_tokens"][3]["id"] = 500
    with pytest.raises(dgemma.FormatError, match="added token '<unk>' has id 500, and in the vocabulary 3"):
        with_tokenizer(folder, top)


@pytest.mark.parametrize("place", ["tokenizer.json", "its model"])
def test_what_is_not_known_at_all_is_refused_by_name(place: str, folder: Path, plain: dict[str, Any]) -> None:
    top = copy.deepcopy(plain)
    (top if place == "tokenizer.json" else top["model"])["rewriter"] = {"type": "Odd"}
    with pytest.raises(dgemma.FormatError, match="rewriter: the converter does not know"):
        with_tokenizer(folder, top)


# ---- where <bos> comes first ----

CHANGED = (
    "the post_processor of tokenizer.json puts <bos> before texts, though add_bos_token of tokenizer_config.json is"
)
PUTS_NONE = "the post_processor of tokenizer.json puts no <bos> before texts: "
SAYS_NONE = "add_bos_token of tokenizer_config.json is false: "
BEGINS = [
    # post_processor, add_bos_token, whether the file asks for <bos>, what is noted
    (None, None, True, ""),
    (None, True, True, ""),
    (None, False, False, SAYS_NONE),
    (template(BOS, TEXT), None, True, ""),
    (template(BOS, TEXT), True, True, ""),
    (template(BOS, TEXT), False, True, CHANGED),
    (template(TEXT), None, False, PUTS_NONE),
    (template(TEXT), True, False, PUTS_NONE),
    (template(TEXT), False, False, PUTS_NONE),
]


@pytest.mark.parametrize(("post", "add", "asks", "note"), BEGINS)
def test_the_post_processor_says_whether_bos_comes_first(
    post: Any, add: bool | None, asks: bool, note: str, tmp_path: Path, capsys: Any
) -> None:
    write_checkpoint(tmp_path / "in", layers=1)
    edit_json(tmp_path / "in" / "tokenizer.json", lambda t: t.update(post_processor=post))
    if add is not None:
        edit_json(tmp_path / "in" / "tokenizer_config.json", lambda t: t.update(add_bos_token=add))
    _, out, _ = run(capsys, tmp_path / "in", "--dry-run")
    assert f"\nnote: {note}" in out if note else "note: " not in out, out
    status, _, err = run(capsys, tmp_path / "in", "-o", tmp_path / "out.gguf")
    assert status == 0 and (f"dg-convert: note: {note}" in err if note else "note: " not in err), err
    assert gguf.GGUFReader(tmp_path / "out.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is asks
    top = json.loads((tmp_path / "in" / "tokenizer.json").read_text())
    theirs = Reference.from_str(json.dumps(top)).encode(SPLIT_TEXT).ids
    assert dgemma.Tokenizer.from_gguf(tmp_path / "out.gguf").prompt(SPLIT_TEXT) == begun(theirs)
