"""What is too much is refused or served, in bounded time and memory. Files here are made to be slow if they can be."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import odd
import pytest
from fuzz.seeds import vocabulary
from hypothesis import given, settings
from hypothesis import strategies as st
from measure import claims

import dgemma
from dgemma.files.gguf_file import File
from dgemma.native.arrays import check_free
from dgemma.native.metadata import Limit, limits
from dgemma.units import size_text

MEGABYTE = 1 << 20


def tokens_file(path: Path, tokens: list[str], kinds: list[int], merges: list[str] | None = None) -> Path:
    """A file of a vocabulary alone; token 0 stands for what is not in it."""
    writer = gguf.GGUFWriter(path, "any")
    writer.add_string("tokenizer.ggml.model", "gemma4")
    writer.add_array("tokenizer.ggml.tokens", ["<unk>", *tokens])
    writer.add_array("tokenizer.ggml.token_type", [2, *kinds])
    writer.add_uint32("tokenizer.ggml.unknown_token_id", 0)
    if merges:
        writer.add_array("tokenizer.ggml.merges", merges)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# ---- Texts ----


def test_special_tokens_of_every_length_cost_no_more_than_their_length(tmp_path):
    """Each begins like the text and ends otherwise: a look-up per length and place would take minutes."""
    tokens = ["a" * n + "!" for n in range(1, 1000)]
    path = tokens_file(tmp_path / "v.gguf", ["a", *tokens], [1, *[3] * len(tokens)])
    tokenizer = dgemma.Tokenizer.from_gguf(path)
    assert tokenizer.encode("a" * 20_000) == [1] * 20_000
    assert tokenizer.encode("a" * 500 + "!" + "a") == [501, 1]
    assert tokenizer.encode("aaa!", special=False) == [1, 1, 1, 0]


def test_of_special_tokens_that_fit_the_longest_counts(tmp_path):
    tokens = ["<a", "<a>", "<a>b", "x", "<a>"]
    tokenizer = dgemma.Tokenizer.from_gguf(tokens_file(tmp_path / "v.gguf", tokens, [3, 4, 3, 1, 3]))
    assert tokenizer.encode("<a>b<a>x<a") == [3, 2, 4, 1]
    assert tokenizer.encode("<a>b<a>x<a", special=False) == [2, 0, 2, 4, 0]


def test_merges_into_ever_longer_tokens_take_the_longest_tokens_time(tmp_path):
    longest = 512
    tokens = ["a" * n for n in range(1, longest + 1)]
    merges = [f"{'a' * n} a" for n in range(1, longest)]
    tokenizer = dgemma.Tokenizer.from_gguf(tokens_file(tmp_path / "v.gguf", tokens, [1] * longest, merges))
    ids = tokenizer.encode("a" * 20_000)
    assert tokenizer.decode(ids) == "a" * 20_000


def test_a_token_without_end_is_refused(tmp_path):
    path = tokens_file(tmp_path / "v.gguf", ["a" * 1025], [1])
    with pytest.raises(dgemma.FormatError, match=r"v\.gguf: token 1 has 1025 bytes, more than the 1024"):
        dgemma.Tokenizer.from_gguf(path)


@pytest.fixture
def alarm():
    """What would take for ever fails after a minute."""

    def ring(*_):
        raise TimeoutError("this takes for ever")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def raw_vocabulary(path: Path, tokens: list[bytes], merges: list[bytes]) -> Path:
    made = odd.vocabulary(
        tokens=odd.array(odd.TOKENS, odd.STRING, [*odd.NAMES, *tokens]),
        types=odd.array(odd.TYPES, odd.U8, [*odd.KINDS, *[1] * len(tokens)]),
        merges=odd.array(odd.MERGES, odd.STRING, merges or [b"a b"]),
    )
    path.write_bytes(made)
    return path


@pytest.mark.parametrize("n", [257, 1000, 100_000])
@pytest.mark.parametrize("first", [0, 2**32 - 200])
def test_tokens_whose_hashes_follow_each_other_are_refused(tmp_path, alarm, n, first):
    """None of them is hard to find, but each character that is no token would be looked for among all of them."""
    tokens = [odd.text_with((first + i) % 2**32) for i in range(n)]
    path = raw_vocabulary(tmp_path / "v.gguf", tokens, [])
    with pytest.raises(dgemma.FormatError, match=r"v\.gguf: tokenizer\.ggml\.tokens is made so that .* for ever"):
        dgemma.Tokenizer.from_gguf(path)


@pytest.mark.parametrize("n", [257, 1500])
def test_merges_whose_hashes_follow_each_other_are_refused(tmp_path, alarm, n):
    path = raw_vocabulary(tmp_path / "v.gguf", [], odd.merges_in_a_row(n))
    with pytest.raises(dgemma.FormatError, match=r"v\.gguf: tokenizer\.ggml\.merges is made so that .* for ever"):
        dgemma.Tokenizer.from_gguf(path)


def test_the_worst_tokens_that_are_taken_cost_a_bounded_search(tmp_path, alarm):
    """Rows as long as a file may have, all through its table: a long text goes through them in no time to speak of."""
    tokens = [odd.text_with(640 * row + i) for row in range(400) for i in range(200)]
    tokenizer = dgemma.Tokenizer.from_gguf(raw_vocabulary(tmp_path / "v.gguf", tokens, []))
    text = "".join(map(chr, range(0x4E00, 0x9F00))) * 10
    assert len(tokenizer.encode(text)) == 1  # unknown characters in a row are one token


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 20_000), length=st.integers(1, 12), letters=st.integers(2, 256))
def test_a_vocabulary_that_nobody_crafted_is_taken(tmp_path_factory, seed, n, length, letters):
    draw = np.random.default_rng(seed)
    rows = draw.integers(256 - letters, 256, (n, length), np.uint8)
    tokens = [row.tobytes() for row in rows] + [str(i).encode() for i in range(n)]
    merges = [str(i).encode() + b" " + str(i + 1).encode() for i in range(n)]
    path = raw_vocabulary(tmp_path_factory.mktemp("any") / "v.gguf", tokens, merges)
    assert dgemma.Tokenizer.from_gguf(path).n_vocab == len(odd.NAMES) + 2 * n


@pytest.mark.parametrize("piece", ["\n", "\udc80", "<bos>", "12 "])
def test_texts_of_megabytes(bundled, piece):
    text = piece * (MEGABYTE // len(piece.encode("utf-8", "surrogatepass")))
    ids = bundled.tokenizer.encode(text)
    assert ids and len(ids) <= 3 * MEGABYTE
    if len(ids) > 1:  # unknown characters in a row are one token
        with pytest.raises(dgemma.UsageError, match="more than the model's context of 1024"):
            bundled.generate(text)


# ---- Numbers ----


@pytest.mark.parametrize("number", [2**31, 2**32, 2**63, 2**64, -(2**31) - 1, 10**30])
def test_tokens_beyond_int32(bundled, number):
    with bundled.session() as session:
        session.encode([2, 7])
        for call in (
            lambda: bundled.generate([2, number]),
            lambda: session.encode([number]),
            lambda: session.denoise([number]),
            lambda: bundled.tokenizer.decode([number]),
            lambda: bundled.generate([2], canvas=[number], pinned=[True]),
        ):
            with pytest.raises((dgemma.UsageError, TypeError)):
                call()
        with pytest.raises((dgemma.UsageError, OverflowError)):
            session.rewind(number)
        assert session.ids == [2, 7]


def test_counts_beyond_what_there_is(bundled):
    for tokens in (2**31 - 1, 2**30, 10**6):
        with pytest.raises(dgemma.UsageError, match="needs a context of"):
            bundled.generate([2, 7], max_tokens=tokens)
    for context in (0, -1, 1025, 2**31, 2**40):
        with pytest.raises(dgemma.UsageError, match="context must be 1 to"):
            bundled.session(context)


def test_a_full_context_serves_one_canvas_more_and_no_more(bundled):
    with bundled.session(context=100) as session:
        session.encode([2, *[7] * 99])
        with pytest.raises(dgemma.UsageError, match="more than the session's context of 100"):
            session.encode([7])
        assert session.denoise([5, 6]).shape == (2, 64)
        assert len(session.generate(max_tokens=96, steps=2).ids) <= 96
        with pytest.raises(dgemma.UsageError, match="does not fit"):
            session.generate(max_tokens=97, steps=2)
        assert session.length == 100


def test_pins_without_end(bundled):
    n = 2_000_000
    with pytest.raises(dgemma.UsageError, match="context"):
        bundled.generate([2], canvas=np.full(n, 7), pinned=np.ones(n, bool))
    whole = bundled.config.context_length - 1
    result = bundled.generate([2], canvas=np.full(whole, 7), pinned=np.ones(whole, bool))
    assert result.ids == [7] * whole and result.steps == 0


# ---- Files ----


def header(values: int, tensors: int) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values)


def test_a_file_of_very_many_keys_is_refused_before_they_are_read(tmp_path):
    path = tmp_path / "keys.gguf"
    one = struct.pack("<Q", 1) + b"k" + struct.pack("<IB", 0, 1)
    path.write_bytes(header(1 << 17, 0) + one * (1 << 17))
    with pytest.raises(dgemma.FormatError, match="more entries claimed"):
        File(path)


def test_a_model_of_very_many_tensors_is_refused(tmp_path):
    """Each of the names that a model has would be looked for among all that the file has."""
    from fuzz.seeds import model

    good = tmp_path / "good.gguf"
    model(good, gguf.GGMLQuantizationType.F32, layers=1)
    reader = gguf.GGUFReader(good)
    data, extra = good.read_bytes(), 5000
    tensors = reader.tensors[0].field.offset
    empty = b"".join(
        struct.pack("<Q", 6) + f"x{i:05}".encode() + struct.pack("<IQIQ", 1, 1, 0, 32 * i) for i in range(extra)
    )
    body = header(int.from_bytes(data[16:24], "little"), extra) + data[24:tensors] + empty
    path = tmp_path / "many.gguf"
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(32 * extra))
    with pytest.raises(dgemma.FormatError, match="5000 tensors, more than a model of 1 layers has"):
        dgemma.Model(path)
    with File(path) as file:
        assert len(file.tensors) == extra


def test_a_vocabulary_is_read_once(tmp_path):
    """Opening takes memory for what is there, whatever the counts claim."""
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "any")
    vocabulary(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "v.gguf").read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    for count in (17, 2**31, 2**32, 2**60, 2**64 - 1):
        bad = tmp_path / "bad.gguf"
        bad.write_bytes(data[:at] + struct.pack("<Q", count) + data[at + 8 :])
        with pytest.raises(dgemma.FormatError):
            dgemma.Tokenizer.from_gguf(bad)


# ---- Claims: sizes that no byte of the file backs ----

SIZES = [limit for limit in limits().values() if limit.field != "n_vocab"]  # whose tokens are bytes of the file
SLACK = 8 * MEGABYTE  # beside a session, whatever the claims: tables by layers and experts, and Python's own
GOES_WITH = {"n_expert_used": {"n_expert": 128}}  # else another rule refuses it first


def used(path: Path, context: int = 0) -> tuple[int, int, list[str]]:
    """What a session of the file takes by what the library says, what a step took of memory, and why it was refused."""
    command = [sys.executable, Path(claims.__file__).parent, "claims", path, str(context)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told, taken, *refusal = done.stdout.splitlines()
    return int(told), int(taken), refusal


@pytest.mark.parametrize("limit", SIZES, ids=lambda limit: limit.field)
def test_a_claim_beyond_its_limit_is_refused_with_its_key(limit: Limit, tmp_path):
    claimed = limit.most + 32
    path = claims.write(tmp_path / "m.gguf", **{**GOES_WITH.get(limit.field, {}), limit.field: claimed})
    assert os.stat(path).st_blocks * 512 < MEGABYTE
    told, taken, refusal = used(path)
    assert told == 0 and taken < SLACK
    said = f"{path}: metadata '{limit.key.key}' claims {claimed}; this runs {limit.least} to {limit.most}"
    assert refusal == ["FormatError", said]


def test_a_vocabulary_beyond_its_limit_is_refused_with_its_key(tmp_path):
    limit = limits()["n_vocab"]
    tokens = [*claims.TOKENS, *(f"{i:x}" for i in range(limit.most))]
    with pytest.raises(dgemma.FormatError, match=f"'{limit.key.key}' claims {len(tokens)} tokens; this runs 1 to"):
        dgemma.Model(claims.write(tmp_path / "m.gguf", tokens))


@pytest.mark.parametrize("limit", SIZES, ids=lambda limit: limit.field)
def test_at_its_limit_a_claim_takes_no_more_than_is_told(limit: Limit, tmp_path):
    path = claims.write(tmp_path / "m.gguf", **{**GOES_WITH.get(limit.field, {}), limit.field: limit.most})
    told, taken, refusal = used(path)
    assert not refusal
    assert taken <= told + SLACK, f"{size_text(taken)} of {size_text(told)}"


def test_heads_that_are_too_wide_together_are_refused(tmp_path):
    path = claims.write(tmp_path / "m.gguf", n_head=128, head_dim=1024)
    with pytest.raises(dgemma.FormatError, match=r"'diffusion-gemma\.attention\.head_count': expected at most 65536"):
        dgemma.Model(path)


def test_a_session_that_memory_does_not_hold_is_refused_before_it_is_taken(tmp_path):
    """With what was asked for, and the key that says so: a context of the caller's, or a canvas of the file's."""
    context = limits()["context_length"].most
    long = claims.write(tmp_path / "long.gguf", context_length=context, n_head=64, n_head_kv=64, head_dim=1024)
    told, taken, refusal = used(long, context)
    assert told == 0 and taken < SLACK and refusal[0] == "MemoryBudgetError"
    assert f"a session of {context} tokens takes" in refusal[1] and "GiB of memory are free" in refusal[1]
    assert f"its context of {context}" in refusal[1] and "'diffusion.canvas_length' 8" in refusal[1]


def test_a_session_without_a_context_is_one_that_memory_holds(tmp_path):
    path = claims.write(tmp_path / "m.gguf", context_length=8192, n_layer=256, n_head=64, n_head_kv=64, head_dim=1024)
    with dgemma.Model(path, threads=1) as model:
        assert model.session_bytes(8192) > 2**40
        with model.session() as session:
            assert 1 <= session.context < 8192
            assert model.session_bytes(session.context) < 2**40
        with pytest.raises(dgemma.MemoryBudgetError, match="a session of 8192 tokens takes"):
            model.session(8192)
        with pytest.raises(dgemma.MemoryBudgetError, match="a session of 8000 tokens takes"):
            model.generate([5] * 8000)


HALVES = """
import sys, dgemma
from dgemma._native import lib
with dgemma.Model(sys.argv[1], threads=1) as model:
    free, context = int(lib.dg_memory_free()), 1
    while model.session_bytes(context + 1) <= free // 5 * 2:
        context += 1
    for round in range(2):  # what is closed is free again
        held = [model.session(context), model.session(context)]
        try:
            model.session(context)
        except dgemma.MemoryBudgetError as refusal:
            print(refusal)
        assert len(held) * model.session_bytes(context) <= free
        small = model.session(1)  # others find room beside them
        for session in (*held, small):
            session.close()
"""


def test_sessions_together_are_no_more_than_memory_holds(tmp_path):
    """Each takes two fifths of what is free, and touches none of it yet."""
    path = claims.write(tmp_path / "m.gguf", context_length=8192, n_layer=256, n_head=64, n_head_kv=64, head_dim=1024)
    done = subprocess.run([sys.executable, "-c", HALVES, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    told = done.stdout.splitlines()
    assert len(told) == 2 and all("GiB that other sessions may still take" in line for line in told), told


SOME = {limit.field: st.integers(limit.least, limit.most) for limit in SIZES}


@settings(max_examples=60, deadline=None)
@given(claimed=st.fixed_dictionaries({}, optional=SOME), context=st.integers(1, 1 << 24))
def test_whatever_is_claimed_together_sizes_stay_numbers(tmp_path_factory, claimed, context):
    """Opened or refused; what a session takes grows with its tokens, whatever is multiplied on the way."""
    for dim in ("d_model", "d_ffn", "d_expert", "head_dim", "head_dim_swa"):
        if dim in claimed:
            claimed[dim] = max(32, claimed[dim] // 32 * 32)
    claimed["n_layer"] = min(claimed.get("n_layer", 1), 2)
    heads = claimed.get("n_head", 1)
    path = tmp_path_factory.getbasetemp() / "claims.gguf"
    try:
        model = dgemma.Model(claims.write(path, **{**claimed, "n_head_kv": heads}), threads=1)
    except (dgemma.FormatError, OSError):  # OSError: longer than a file of this system can be
        return
    with model:
        most = model.config.context_length
        sizes = [model.session_bytes(tokens) for tokens in (1, min(context, most), most)]
        assert 0 < sizes[0] <= sizes[1] <= sizes[2] < 2**62
        assert sizes[0] > 4 * model.config.canvas_length * (model.config.d_model + heads)
        try:
            model.session(min(context, most)).close()
        except dgemma.MemoryBudgetError as refused:
            assert f"a session of {min(context, most)} tokens takes" in str(refused)


def test_logits_that_memory_does_not_hold_are_refused_before_they_are_made(bundled, monkeypatch):
    with bundled.session() as session:
        monkeypatch.setattr("dgemma.native.arrays.SMALL", 0)
        monkeypatch.setattr("dgemma.native.arrays.lib", Free(100_000))
        with pytest.raises(
            dgemma.MemoryBudgetError, match=r"logits 'all' of 1000 tokens take 250\.0 KiB, and 97\.7 KiB"
        ):
            session.encode([7] * 1000, logits="all")
        assert session.length == 0
        with pytest.raises(dgemma.MemoryBudgetError, match="logits of 5 canvases take"):
            other = [bundled.session(16) for _ in range(5)]
            bundled.denoise([(one, [5] * 90, None) for one in other])
        assert session.encode([7] * 1000, logits="last") is not None


class Free:
    """A library that tells of so much free memory."""

    def __init__(self, left: int) -> None:
        self.dg_memory_free = lambda: left


def test_free_memory_is_asked_for_large_arrays_alone(monkeypatch):
    monkeypatch.setattr("dgemma.native.arrays.lib", Free(10))
    check_free(MEGABYTE, "something small")
    with pytest.raises(dgemma.MemoryBudgetError, match=r"giants take 1\.0 GiB, and 10 bytes of memory are free"):
        check_free(1 << 30, "giants")
    monkeypatch.setattr("dgemma.native.arrays.lib", Free(0))  # the system does not tell
    check_free(1 << 30, "giants")


def test_the_published_model_is_far_within_the_limits():
    from dgemma.bench.synthetic import Synthetic, config_of

    values = config_of(Synthetic("26b-a4b")).values
    for limit in limits().values():
        if limit.field not in ("n_layer", "steps"):
            assert limit.least <= 4 * values[limit.field] <= limit.most or limit.field in ("head_dim", "head_dim_swa")
        assert limit.least <= values[limit.field] <= limit.most


def test_holes_longer_than_the_context_are_refused_before_they_are_made(bundled):
    for call in (
        lambda: bundled.fill("a [[...]] b", lengths=[4, 10**15]),
        lambda: bundled.edit("1 2 3", (2, 3), "longer", lengths=[10**15]),
    ):
        with pytest.raises(
            dgemma.UsageError, match=f"holes of {10**15} tokens do not fit: the model's context is 1024"
        ):
            call()


def test_a_budget_that_memory_does_not_hold_is_refused_before_it_is_spent(tmp_path):
    """Weights that are read into memory of the process's own; zeros of a sparse file here."""
    path = claims.write(tmp_path / "m.gguf", d_model=2048, d_expert=2048, n_expert=1024, n_layer=16)
    assert path.stat().st_size > 200 << 30 and os.stat(path).st_blocks * 512 < MEGABYTE
    with pytest.raises(
        dgemma.MemoryBudgetError, match=r"^ram: 200\.00 GiB is more than the .* at most .* GiB, or auto$"
    ):
        dgemma.Model(path, threads=1, ram="200G")
    with dgemma.Model(path, threads=1, ram="1G") as model:
        assert model.traffic.experts > 200 << 30


def test_filling_takes_a_session_of_its_text(bundled, monkeypatch):
    """Not of the model's whole context, which may be more than memory holds."""
    asked = []
    session = dgemma.Model.session
    monkeypatch.setattr(
        dgemma.Model, "session", lambda model, context: (asked.append(context), session(model, context))[1]
    )
    bundled.fill("12345678[[1]]\n", "12345678.\n" * 9, steps=1)
    assert asked == [1 + 90 + 10 + 256 + 4 * 96]  # <bos>, prompt, text, template, canvases
