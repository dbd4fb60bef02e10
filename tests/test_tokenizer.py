"""The tokenizer: equal to the `tokenizers` package, on a tiny vocabulary always and on Gemma's own where it is at hand.

DGEMMA_TEST_DATA names the folder that holds gemma-4-vocab.gguf, .inp and .out.
"""

import json
import os
import random
import struct
import time
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Reference

import dgemma
from dgemma._native import ffi, lib

MODELS = Path(__file__).parent / "models"
TINY = MODELS / "tiny-bpe" / "tiny-bpe.gguf"
DATA = os.environ.get("DGEMMA_TEST_DATA")
HAVE_GEMMA = DATA is not None and Path(DATA, "gemma-4-vocab.gguf").exists()
BLANK = "\u2581"
CONTROL, USER_DEFINED, BYTE = (int(gguf.TokenType[kind]) for kind in ("CONTROL", "USER_DEFINED", "BYTE"))

ENDS = ("<eos>", "<turn|>", "<|tool_response>")  # are control tokens; the last is user-defined in published files


def gemma_file(ending):
    if not HAVE_GEMMA:
        pytest.skip("DGEMMA_TEST_DATA names no folder with gemma-4-vocab.gguf")
    return Path(DATA, f"gemma-4-vocab.{ending}")


def metadata(path):
    """A GGUF file's values. The gguf package's reader takes a minute for Gemma's vocabulary."""
    data, at = Path(path).read_bytes(), 24
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}

    def value(kind, n=1):
        nonlocal at
        if kind == 9:
            return value(*struct.unpack_from("<IQ", data, (at := at + 12) - 12))
        if kind in scalars:
            form = f"<{n}{scalars[kind]}"
            return list(struct.unpack_from(form, data, (at := at + struct.calcsize(form)) - struct.calcsize(form)))
        strings = []
        for _ in range(n):
            end = at + 8 + int.from_bytes(data[at : at + 8], "little")
            strings.append(data[at + 8 : end].decode())
            at = end
        return strings

    pairs = ((value(8)[0], value(value(4)[0])) for _ in range(int.from_bytes(data[16:24], "little")))
    return dict(pairs)


class Vocabulary:
    """One file's tokenizer, and the same vocabulary in `tokenizers`."""

    def __init__(self, path):
        fields = metadata(path)
        self.ours = dgemma.Tokenizer.from_gguf(path)
        self.tokens = fields["tokenizer.ggml.tokens"]
        types = fields["tokenizer.ggml.token_type"]
        self.kinds = [CONTROL if t in ENDS else kind for t, kind in zip(self.tokens, types, strict=True)]
        merges = fields.get("tokenizer.ggml.merges", [])
        cuts = [(merge, merge.index(" ", 1)) for merge in merges]
        vocab = {token: i for i, token in enumerate(self.tokens)}
        model = models.BPE(
            vocab,
            [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=BYTE in self.kinds,
        )
        self.reference = Reference(model)
        self.reference.normalizer = normalizers.Replace(" ", BLANK)
        self.reference.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        self.reference.decoder = decoders.Sequence(
            [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
        self.control = self.of_kind(CONTROL)
        self.specials = self.control + self.of_kind(USER_DEFINED)
        self.reference.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in self.control])
        self.reference.add_tokens([AddedToken(t, normalized=False) for t in self.of_kind(USER_DEFINED)])

    def of_kind(self, kind):
        return [token for token, k in zip(self.tokens, self.kinds, strict=True) if k == kind]

    def reference_ids(self, texts, special=True):
        self.reference.encode_special_tokens = not special
        encoded = self.reference.encode_batch(texts, add_special_tokens=False)
        self.reference.encode_special_tokens = False
        return [e.ids for e in encoded]


@pytest.fixture(scope="module")
def tiny():
    return Vocabulary(TINY)


@pytest.fixture(scope="module", params=["tiny", "gemma"])
def vocabulary(request, tiny):
    return tiny if request.param == "tiny" else request.getfixturevalue("gemma")


@pytest.fixture(scope="module")
def gemma():
    return Vocabulary(gemma_file("gguf"))


def vocabulary_file(path, tokenizer_json, **more):
    """Writes a vocabulary GGUF from a tokenizer.json."""
    source = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    vocab = source["model"]["vocab"]
    added = {t["id"]: t for t in source["added_tokens"]}
    tokens = [added[i]["content"] if i in added else None for i in range(max([*vocab.values(), *added]) + 1)]
    for token, i in vocab.items():
        tokens[i] = token
    kinds = [1] * len(tokens)
    for i, token in added.items():
        kinds[i] = CONTROL if token["special"] else USER_DEFINED
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    writer.add_tokenizer_model(more.pop("model", "gemma4"))
    writer.add_token_list(tokens)
    writer.add_token_scores([-1000.0] * len(tokens))
    writer.add_token_types(kinds)
    if merges := source["model"]["merges"]:
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(tokens.index("<bos>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(True)
    if "template" in more:
        writer.add_chat_template(more["template"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sudoku(tmp_path_factory):
    source = MODELS / "sudoku" / "tokenizer.json"
    return Vocabulary(vocabulary_file(tmp_path_factory.mktemp("vocabulary") / "sudoku.gguf", source))


RANGES = [(0, 0x20), (0x20, 0x7F), (0x20, 0x7F), (0xA0, 0x250), (0x370, 0x530), (0x600, 0x700), (0x900, 0x980)]
RANGES += [(0x2000, 0x2070), (0x2580, 0x25A0), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xE010)]
RANGES += [(0xFE00, 0xFE10), (0xFFF0, 0xFFFE), (0x1F300, 0x1F700), (0x1D400, 0x1D500), (0x10FFF0, 0x110000)]


def random_texts(vocabulary, n, seed):
    """Texts out of all that could go wrong: scripts, controls, emoji, runs, tokens, special tokens and their parts."""
    draw = random.Random(seed)

    def piece():
        kind = draw.randrange(9)
        if kind == 0:
            return draw.choice([" ", "\n", "\n", "\t", "\r\n", " \n", "a", "=", "🙂"]) * draw.randrange(1, 70)
        if kind == 1:
            return draw.choice(vocabulary.specials)
        if kind == 2:
            special = draw.choice(vocabulary.specials)
            return special[draw.randrange(len(special)) :][: draw.randrange(1, 12)]
        if kind < 6:
            return "".join(draw.choice(vocabulary.tokens) for _ in range(draw.randrange(1, 6))).replace(BLANK, " ")
        low, high = draw.choice(RANGES)
        return "".join(chr(draw.randrange(low, high)) for _ in range(draw.randrange(1, 10)))

    return ["".join(piece() for _ in range(draw.randrange(1, 8))) for _ in range(n)]


def test_equals_tokenizers(vocabulary):
    texts = random_texts(vocabulary, 10_000, seed=1)
    for special in (True, False):
        expected = vocabulary.reference_ids(texts, special)
        for text, ids in zip(texts, expected, strict=True):
            assert vocabulary.ours.encode(text, special=special) == ids, (text, special)


def test_decode_equals_tokenizers(vocabulary):
    draw = random.Random(2)
    some = [i for i, kind in enumerate(vocabulary.kinds) if kind != 1]
    for _ in range(3000):
        n = draw.randrange(12)
        ids = [draw.choice(some) if draw.random() < 0.6 else draw.randrange(len(vocabulary.tokens)) for _ in range(n)]
        for special in (True, False):
            expected = vocabulary.reference.decode(ids, skip_special_tokens=not special)
            assert vocabulary.ours.decode(ids, special=special) == expected, ids


@pytest.mark.parametrize("n", [1, 2, 16, 31, 32, 33, 61, 62, 63, 64, 93, 200])
def test_runs(vocabulary, n):
    texts = [around.replace("_", "\n" * n) for around in ("_", "a_", "_a", "a _ a", "a\r_a_")]
    texts += [around.replace("_", " " * n) for around in ("_", "a_", "_a", "\n_\n")]
    assert [vocabulary.ours.encode(text) for text in texts] == vocabulary.reference_ids(texts)


def test_file_and_json_are_one_tokenizer(tiny):
    saved = Reference.from_file(str(TINY.parent / "tokenizer.json"))
    for text in random_texts(tiny, 500, seed=3):
        assert tiny.ours.encode(text) == saved.encode(text, add_special_tokens=False).ids


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=[BLANK]), max_size=200)
PIECES = st.lists(st.sampled_from(["\n", " ", "<bos>", '<|"|>', "<|turn>", "[[", "<0x41>", "é", "the"]))


@settings(max_examples=500, deadline=None)
@given(text=TEXTS, pieces=PIECES)
def test_round_trip(tiny, text, pieces):
    mixed = "".join(pieces) + text + "".join(reversed(pieces))
    assert tiny.ours.decode(tiny.ours.encode(mixed), special=True) == mixed
    assert tiny.ours.decode(tiny.ours.encode(mixed, special=False)) == mixed


BROKEN = st.text("aé€🙂\ud800", max_size=8).map(lambda text: text.encode("utf-8", "surrogatepass")[1:])


@settings(max_examples=500, deadline=None)
@given(data=st.binary(max_size=40) | BROKEN)
def test_invalid_utf8(tiny, data):
    ids, n = ffi.new("int32_t[]", 200), ffi.new("size_t *")
    assert lib.dg_tokenize(tiny.ours._pointer, data, len(data), True, ids, 200, n, ffi.NULL) == lib.DG_OK
    assert list(ids[0 : n[0]]) == tiny.ours.encode(data.decode("utf-8", "replace"))


def test_small_room(tiny):
    text, n = 'the <|"|>water\n\n 5é'.encode(), ffi.new("size_t *")
    whole = tiny.ours.encode(text.decode())
    for room in range(len(whole) + 2):
        ids = ffi.new("int32_t[]", [-7] * (room + 1))
        assert lib.dg_tokenize(tiny.ours._pointer, text, len(text), True, ids, room, n, ffi.NULL) == lib.DG_OK
        assert n[0] == len(whole)
        assert list(ids) == whole[:room] + [-7] * (room + 1 - len(whole[:room]))
    for room in range(len(text) + 2):
        out = ffi.new("char[]", b"#" * (room + 1))
        assert lib.dg_detokenize(tiny.ours._pointer, whole, len(whole), True, out, room, n, ffi.NULL) == lib.DG_OK
        assert n[0] == len(text)
        assert bytes(ffi.buffer(out, room + 1)) == text[:room] + b"#" * (room + 1 - len(text[:room]))


def test_empty_and_odd_arguments(tiny):
    assert tiny.ours.encode("") == []
    assert tiny.ours.decode([]) == ""
    assert tiny.ours.decode(iter([2, 0])) == ""
    assert "\ufffd" in tiny.ours.decode(tiny.ours.encode("a\ud800b"))
    for bad in ([len(tiny.tokens)], [-1], [2**40]):
        with pytest.raises(dgemma.UsageError, match="outside the vocabulary"):
            tiny.ours.decode(bad)


def test_vocabulary(tiny):
    ours = tiny.ours
    assert (ours.n_vocab, ours.bos_id, ours.eos_id, ours.unk_id, ours.pad_id, ours.mask_id) == (1235, 2, 1, 3, 0, 4)
    assert ours.add_bos
    assert ours.prompt("the") == [2, *ours.encode("the")] == ours.prompt("<bos>the")


def test_long_texts(vocabulary, capsys):
    """Merging is not quadratic: these would take hours."""
    draw = random.Random(5)
    texts = {"words": " ".join(draw.choices(["water", "Straße", "=", "不了", "\n"], k=200_000)), "a": "a" * 1_000_000}
    texts |= {"newlines": "\n" * 1_000_000, "no spaces": "".join(draw.choices("etaoinshrdlu<|", k=1_000_000))}
    for name, text in texts.items():
        began = time.perf_counter()
        ids = vocabulary.ours.encode(text)
        seconds = time.perf_counter() - began
        assert vocabulary.ours.decode(ids) == text
        with capsys.disabled():
            print(f"\n{name}: {len(text.encode()) / seconds / 1e6:.1f} MB/s", end="")


def test_gemma_vectors(gemma):
    texts = gemma_file("inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = gemma_file("out").read_text().split("\n")
    for text, line in zip(texts[:46], lines[:46], strict=True):
        assert gemma.ours.encode(text) == [int(i) for i in line.split()], text


def test_gemma_chat(gemma):
    ids = [2, 105, 2364, 107, 11355, 563, 506, 7217, 3730, 236881, 106, 107, 105, 4368, 107, 100, 45518, 107, 101]
    messages = [{"role": "user", "content": "Why is the sky blue?"}]
    assert gemma.ours.chat(messages) == ids
    assert gemma.ours.render(messages, thinking=True).startswith("<bos><|turn>system\n<|think|>")
    call = {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages.append({"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]})
    text = gemma.ours.render(messages)
    assert '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>}<tool_call|>' in text
    assert gemma.ours.decode(gemma.ours.encode(text)).count('<|"|>') == 2


def test_gemma_opens_fast(capsys):
    path = gemma_file("gguf")
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        dgemma.Tokenizer.from_gguf(path)
        seconds.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"\nopening {path.name}: {min(seconds):.3f} s", end="")


# ---- Types that a file has wrong, and <bos> ----


def changed_file(path, source=TINY, kinds=None, without=(), **values):
    """A copy of a file, vocabulary alone, with other types for some tokens and other values for some keys."""
    fields = metadata(source) | {f"tokenizer.ggml.{name}": [value] for name, value in values.items()}
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    types = [(kinds or {}).get(token, kind) for token, kind in zip(tokens, types, strict=True)]
    writer = gguf.GGUFWriter(path, "diffusion-gemma")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(fields["tokenizer.ggml.merges"])
    for name in {"bos", "eos", "unknown", "padding", "mask"} - set(without):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", fields[f"tokenizer.ggml.{name}_token_id"][0])
    if "add_bos_token" not in without:
        writer.add_add_bos_token(bool(fields["tokenizer.ggml.add_bos_token"][0]))
    writer.add_chat_template(fields["tokenizer.chat_template"][0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return dgemma.Tokenizer.from_gguf(path)


NORMAL, UNUSED = 1, 5
RIGHT = ["<|tool>", "<tool|>", "<|think|>", "<|turn>", "<turn|>", "<|image>", "<|image|>", "<|tool_call>"]
RIGHT += ["<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>"]
RIGHT += ["<eos>", "<bos>", "<pad>"]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_marks_are_marks_whatever_type_a_file_gives_them(tiny, tmp_path_factory, data):
    wrong = {t: data.draw(st.sampled_from([NORMAL, UNUSED, BYTE])) for t in data.draw(st.sets(st.sampled_from(RIGHT)))}
    if data.draw(st.booleans()):
        wrong |= dict.fromkeys(ENDS, USER_DEFINED)
    ours = changed_file(tmp_path_factory.mktemp("wrong") / "v.gguf", kinds=wrong)
    assert list(ours.kinds) == list(tiny.ours.kinds)
    text = "".join(data.draw(st.lists(st.sampled_from([*RIGHT, "the ", "\n", "<|", "|>", "</s>", "<b>"]))))
    for special in (True, False):
        ids = tiny.ours.encode(text, special=special)
        assert ours.encode(text, special=special) == ids
        assert ours.decode(ids, special=special) == tiny.ours.decode(ids, special=special)


@settings(max_examples=200, deadline=None)
@given(text=st.text('<>|/sab_"', min_size=2, max_size=8))
def test_what_merely_looks_like_a_mark_keeps_its_meaning(tmp_path_factory, text):
    """A token that is no <|name>, <name|> or <|name|>, and none of marks.def, is what its file says."""
    name = text[1:-1].removeprefix("|").removesuffix("|")
    mark = len(text) > 3 and text[0] == "<" and text[-1] == ">" and "|" in (text[1], text[-2])
    mark = (mark and name != "" and all(c.isalnum() or c == "_" for c in name)) or text == "</s>"
    path = tmp_path_factory.mktemp("alike") / "v.gguf"
    writer = gguf.GGUFWriter(path, "any")
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(["<unk>", *'<>|/sab_"', text])
    writer.add_token_types([2, *[NORMAL] * 9, NORMAL])
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    kind = USER_DEFINED if text == '<|"|>' else CONTROL if mark else NORMAL
    assert dgemma.Tokenizer.from_gguf(path).kinds[-1] == kind


def test_gemma_has_no_text_that_looks_like_a_mark(gemma):
    """Its own types are right but for one, and </s> is HTML: it stays text beside <|tool_response>."""
    declared = metadata(gemma_file("gguf"))["tokenizer.ggml.token_type"]
    taken = list(gemma.ours.kinds)
    assert [gemma.tokens[i] for i in range(len(taken)) if taken[i] != declared[i]] == ["<|tool_response>"]
    assert taken[gemma.tokens.index("</s>")] == NORMAL


@pytest.mark.parametrize("value", [True, False, None])
def test_gemma_prompts_begin_with_bos_whatever_the_file_asks(tmp_path, value):
    without = ("add_bos_token",) if value is None else ()
    ours = changed_file(tmp_path / "v.gguf", without=without, **({} if value is None else {"add_bos_token": value}))
    assert ours.add_bos
    assert ours.prompt("the") == [2, *ours.encode("the")] == ours.prompt("<bos>the")
    assert ours.chat([{"role": "user", "content": "w?"}]).count(2) == 1


IDS = {"bos": 2, "eos": 1, "unknown": 3, "padding": 0, "mask": 4}


@pytest.mark.parametrize("name", IDS)
def test_a_special_id_that_no_key_names_is_that_of_gemmas_text(tmp_path, name):
    ours = changed_file(tmp_path / "v.gguf", without=(name,))
    found = {"bos": ours.bos_id, "eos": ours.eos_id, "unknown": ours.unk_id, "padding": ours.pad_id}
    assert found | {"mask": ours.mask_id} == IDS


@pytest.mark.parametrize("value", [True, False, None])
def test_prompts_begin_with_bos_where_no_key_names_its_id(tmp_path, value):
    without = ("bos", *(("add_bos_token",) if value is None else ()))
    ours = changed_file(tmp_path / "v.gguf", without=without, **({} if value is None else {"add_bos_token": value}))
    assert ours.add_bos and ours.prompt("the") == [2, *ours.encode("the")]
    assert ours.render([{"role": "user", "content": "w?"}]).startswith("<bos>")


def test_a_vocabulary_without_gemmas_bos_does_as_the_file_asks(tmp_path):
    for value in (True, False):
        ours = changed_file(tmp_path / "v.gguf", add_bos_token=value, bos_token_id=5)  # <|tool>
        assert ours.add_bos is value
        assert ours.prompt("the") == [5] * value + ours.encode("the")


def test_unknown_characters_fuse(sudoku):
    assert sudoku.ours.encode("é") == sudoku.ours.encode("éß🙂") == [sudoku.ours.unk_id]
    assert sudoku.ours.encode("é<bos>ß") == [3, 2, 3]
    texts = ["12.\nÄÖ\nÜ 3", "AB C", "\n\n\n", "é\né", "<unk>É", "▁ ", "A<|turn>", *random_texts(sudoku, 2000, seed=6)]
    for special in (True, False):
        assert [sudoku.ours.encode(text, special=special) for text in texts] == sudoku.reference_ids(texts, special)


def test_chat(tiny):
    messages = [{"role": "system", "content": "s "}, {"role": "user", "content": "w?"}]
    answer = "<|turn>model\n<|channel>thought\n<channel|>"
    assert tiny.ours.render(messages) == f"<bos><|turn>system\ns<turn|>\n<|turn>user\nw?<turn|>\n{answer}"
    assert tiny.ours.chat(messages) == tiny.ours.encode(tiny.ours.render(messages))
    tools = [{"name": "é<b>", "x": [1]}]
    system = (
        '<|turn>system\n<|think|>\n<|tool>{"type": "function", "function": {"name": "é<b>", "x": [1]}}<tool|><turn|>\n'
    )
    thought = tiny.ours.render(messages[1:], tools=tools, thinking=True)
    assert thought == f"<bos>{system}<|turn>user\nw?<turn|>\n<|turn>model\n"
    with pytest.raises(dgemma.UsageError, match="unknown role nobody"):
        tiny.ours.render([{"role": "nobody", "content": ""}])
    with pytest.raises(dgemma.UsageError, match="chat template"):
        tiny.ours.render([])


def test_chat_without_template(sudoku):
    messages = [{"role": "user", "content": "1"}, {"role": "user", "content": " 2.\n"}]
    messages.append({"role": "assistant", "content": "3"})
    assert sudoku.ours.chat_template is None
    assert sudoku.ours.render(messages) == " 2.\n"
    assert sudoku.ours.chat(messages) == [2, *sudoku.ours.encode(" 2.\n")]
    assert sudoku.ours.render([{"role": "user", "content": [{"type": "text", "text": "1"}, {"text": "2"}]}]) == "12"
    for refused in ([], [{"role": "system", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{}]}]):
        with pytest.raises(dgemma.UsageError, match="user message"):
            sudoku.ours.render(refused)


@pytest.mark.parametrize("template", ["{% if %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}"])
def test_hostile_template(tmp_path, template):
    path = vocabulary_file(tmp_path / "v.gguf", TINY.parent / "tokenizer.json", template=template)
    with pytest.raises(dgemma.Error, match="chat template"):
        dgemma.Tokenizer.from_gguf(path).render([{"role": "user", "content": "x"}])


def test_refused_files(tmp_path):
    with pytest.raises(dgemma.Error, match=r"no-such\.gguf"):
        dgemma.Tokenizer.from_gguf(tmp_path / "no-such.gguf")
    other = vocabulary_file(tmp_path / "other.gguf", TINY.parent / "tokenizer.json", model="gpt2")
    with pytest.raises(dgemma.FormatError, match=r"other\.gguf: tokenizer\.ggml\.model is 'gpt2', expected 'gemma4'"):
        dgemma.Tokenizer.from_gguf(other)
    data = TINY.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [0, 3, 20, *range(100, len(data), 7919)]:
        cut.write_bytes(data[:length])
        with pytest.raises(dgemma.FormatError, match=r"cut\.gguf"):
            dgemma.Tokenizer.from_gguf(cut)


def test_damaged_bytes(tmp_path):
    """Whatever a file's bytes are, it is refused or it works."""
    data, draw, path = TINY.read_bytes(), random.Random(7), tmp_path / "damaged.gguf"
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            damaged[draw.randrange(len(data))] = draw.choice([0, 1, 7, 0x20, 0x80, 0xFF])
        path.write_bytes(damaged)
        try:
            ours = dgemma.Tokenizer.from_gguf(path)
        except dgemma.Error:
            continue
        ours.decode(ours.encode("the water <|turn>\n\n\n in Straße 🙂 <bos>"), special=True)
