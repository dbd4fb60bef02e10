"""GGUF files that each take another way through the readers: seeds.py names them in the corpora after what is odd."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
PART = b"\n[part]\n"  # between the parts of a split file: files.h
Q4_0, Q8_0, Q4_K, MXFP4 = 2, 8, 12, 39


def text(of: str | bytes) -> bytes:
    data = of.encode() if isinstance(of, str) else of
    return struct.pack("<Q", len(data)) + data


def plain(kind: int, of: object) -> bytes:
    if kind == STRING:
        assert isinstance(of, (str, bytes))
        return text(of)
    return struct.pack("<" + CODES[kind], of)


def value(key: str | bytes, kind: int, of: object) -> bytes:
    return text(key) + struct.pack("<I", kind) + plain(kind, of)


def array(key: str, kind: int, of: Iterable[object], claimed: int | None = None) -> bytes:
    items = [plain(kind, item) for item in of]
    count = len(items) if claimed is None else claimed
    return text(key) + struct.pack("<IIQ", ARRAY, kind, count) + b"".join(items)


def tensor(name: str, dims: Iterable[int], kind: int, offset: int = 0) -> bytes:
    shape = list(dims)
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file(values: Iterable[bytes] = (), tensors: Iterable[bytes] = (), body: int = 0, version: int = 3) -> bytes:
    """With so many bytes behind the header, where tensors begin."""
    first, second = list(values), list(tensors)
    head = b"GGUF" + struct.pack("<IQQ", version, len(second), len(first)) + b"".join(first + second)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(body)


def split(*parts: bytes) -> bytes:
    return PART.join(parts)


def numbers(no: int, count: int, tensors: int) -> list[bytes]:
    return [value("split.no", U16, no), value("split.count", U16, count), value("split.tensors.count", I32, tensors)]


def gguf() -> Iterator[tuple[str, bytes]]:
    yield "no-gguf", b"GGML" + bytes(40)
    yield "short", b"GGUF\3\0\0\0"
    yield "version-1", file(version=1)
    yield "more-claimed", b"GGUF" + struct.pack("<IQQ", 3, 1 << 40, 1 << 60) + bytes(64)
    for name, data in {
        "key-ends": struct.pack("<Q", 1 << 62),
        "kind-13": text("a") + struct.pack("<I", 13) + bytes(8),
        "array-of-kind-13": text("a") + struct.pack("<IIQ", ARRAY, 13, 1) + bytes(8),
        "array-of-arrays": text("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(16),
        "array-ends": array("a", F32, [1.0], claimed=1 << 61),
        "strings-end": array("a", STRING, ["b"], claimed=1 << 40),
    }.items():
        yield name, file([data])
    yield "kinds", file([value(f"k{kind}", kind, 1) for kind in CODES] + [value("s", STRING, "text")])
    yield "arrays", file([array(f"k{kind}", kind, [0, 1, 1]) for kind in CODES] + [array("s", STRING, ["", "b"])])
    yield "u64-beyond", file([value("a", U64, 2**64 - 1)])
    for name, (dims, kind, offset) in {
        "no-dims": ([], F32, 0),
        "five-dims": ([1] * 5, 0, 0),
        "dim-0": ([0], 0, 0),
        "dims-overflow": ([1 << 40, 1 << 40], 0, 0),
        "bytes-overflow": ([1 << 31, 1 << 31], 0, 0),
        "type-99": ([32], 99, 0),
        "type-mxfp4": ([32], MXFP4, 0),
        "type-99-behind-the-end": ([32], 99, 1 << 40),
        "half-a-block": ([33], Q8_0, 0),
        "askew": ([8], 0, 8),
        "behind-the-end": ([8], 0, 1 << 40),
        "more-than-there-is": ([1 << 20], 0, 0),
    }.items():
        yield name, file([], [tensor("t0", dims, kind, offset)], 64)
    yield "name-twice", file([], [tensor("t0", [8], 0), tensor("t0", [8], 0, 32)], 64)
    yield "overlap", file([], [tensor("t0", [16], 0), tensor("t1", [8], 0, 32)], 64)
    yield "alignment-24", file([value("general.alignment", U32, 24)], [tensor("t0", [8], 0)], 64)
    yield "alignment-8", file([value("general.alignment", U32, 8)], [tensor("t0", [8], 0, 8)], 64)

    first, second = tensor("t0", [8], 0), tensor("t1", [8], 0)
    yield "split", split(file(numbers(0, 2, 2), [first], 32), file(numbers(1, 2, 2), [second], 32))
    yield "split-of-3", split(*(file(numbers(i, 3, 3), [tensor(f"t{i}", [8], 0)], 32) for i in range(3)))
    yield "split-name-twice", split(file(numbers(0, 2, 2), [first], 32), file(numbers(1, 2, 2), [first], 32))
    yield "split-other-number", split(file(numbers(0, 2, 2), [first], 32), file(numbers(0, 2, 2), [second], 32))
    yield "split-other-file", split(file(numbers(0, 2, 2), [first], 32), file(numbers(1, 2, 9), [second], 32))
    yield "split-fewer", split(file(numbers(0, 2, 3), [first], 32), file(numbers(1, 2, 3), [second], 32))
    yield "split-wrong-number", split(file(numbers(0, 2, 2), [first], 32), file([value("split.no", I32, -1)]))
    yield "split-missing", split(file(numbers(0, 2, 2), [first], 32), b"")
    yield "split-alone", file(numbers(0, 2, 2), [first], 32)


# ---- Vocabularies ----

TOKENS = "tokenizer.ggml.tokens"
TYPES = "tokenizer.ggml.token_type"
MERGES = "tokenizer.ggml.merges"
UNKNOWN = "tokenizer.ggml.unknown_token_id"
NAMES = ["<pad>", "<unk>", "a", "b", "ab", "\u2581", "\n", "<x>"]
KINDS = [3, 2, 1, 1, 1, 1, 1, 4]


# What the tokenizer's hashes are made of (see runtime/tokenizer.c, tests/c/tokenizer.c), to make keys that collide.
ODD = 0x9E3779B97F4A7C15
INVERSE = pow(ODD, -1, 1 << 64)
WORD = (1 << 64) - 1


def _mixed(x: int) -> int:
    x = x * ODD & WORD
    return x ^ x >> 32


def _unmixed(x: int) -> int:
    return (x ^ x >> 32) * INVERSE & WORD


def text_with(hash: int, other: int = 0) -> bytes:
    """A text of 8 bytes with this hash of 32 bits."""
    return struct.pack("<Q", _unmixed(_unmixed(other << 48 | hash << 16 | 12345)) ^ 9)


def alike(n: int) -> list[bytes]:
    """Texts of 8 bytes, without a space, that all have one hash."""
    made = (text_with(0, i) for i in range(2 * n))
    return [one for one in made if b" " not in one][:n]


def in_a_row(n: int, first: int = 0) -> list[bytes]:
    """Texts of 8 bytes whose hashes follow each other. Each goes into a table at once; what is absent and has the first
    one's hash is looked for among all of them."""
    return [text_with(first + i) for i in range(n)]


def merges_in_a_row(n: int) -> list[bytes]:
    """Merges of such texts that take the first n places of their table, of at least 2 n: a power of two."""
    size = 16
    while size < 2 * n:
        size *= 2
    hashes = range(2 * size)
    texts = {h: text for h in hashes if b" " not in (text := text_with(h))}
    places: dict[int, bytes] = {}
    for left, left_text in texts.items():
        for right in texts:
            place = _mixed(_mixed(left << 32 | right)) >> 16 & size - 1
            if place < n and place not in places:
                places[place] = left_text + b" " + texts[right]
        if len(places) == n:
            break
    assert len(places) == n
    return list(places.values())


def vocabulary(**other: bytes | None) -> bytes:
    """A small one, with some values in others' place, or without them (None)."""
    values: dict[str, bytes | None] = {
        "model": value("tokenizer.ggml.model", STRING, "gemma4"),
        "tokens": array(TOKENS, STRING, NAMES),
        "types": array(TYPES, I32, KINDS),
        "merges": array(MERGES, STRING, ["a b", "b a"]),
        "unknown": value(UNKNOWN, U32, 1),
    }
    return file([data for data in (values | other).values() if data is not None])


def tokenizer() -> Iterator[tuple[str, bytes]]:
    yield "plain", vocabulary() + PART + "abab \n\n<x>\u00e9\u00e9".encode() + b"\xff"
    yield "no-model", vocabulary(model=None)
    yield "model-llama", vocabulary(model=value("tokenizer.ggml.model", STRING, "llama"))
    yield "model-of-lines", vocabulary(model=value("tokenizer.ggml.model", STRING, "a\nb"))
    yield "no-tokens", vocabulary(tokens=None)
    yield "tokens-of-numbers", vocabulary(tokens=array(TOKENS, I32, [1, 2]))
    yield "tokens-none", vocabulary(tokens=array(TOKENS, STRING, []))
    yield "types-fewer", vocabulary(types=array(TYPES, I32, KINDS[:-1]))
    yield "types-9", vocabulary(types=array(TYPES, U8, [9] * len(KINDS)))
    yield "scores-of-text", vocabulary(scores=array("tokenizer.ggml.scores", STRING, NAMES))
    yield "token-too-long", vocabulary(tokens=array(TOKENS, STRING, ["x" * 1025, *NAMES[1:]]))
    marks = ["<unk>", "<|turn>", "<turn|>", "</s>", "<|tool_response>", "<|channel>", "<|a b>", "<x>"]
    yield "marks", vocabulary(tokens=array(TOKENS, STRING, marks), types=array(TYPES, I32, [2, 1, 5, 1, 4, 6, 1, 1]))
    yield "merge-of-one", vocabulary(merges=array(MERGES, STRING, ["ab"]))
    yield "merges-of-numbers", vocabulary(merges=array(MERGES, U8, [1]))
    yield "no-merges", vocabulary(merges=None)
    yield "template", vocabulary(template=value("tokenizer.chat_template", STRING, "{{ messages }}"))
    yield "template-of-zeros", vocabulary(template=value("tokenizer.chat_template", STRING, "a\0b"))
    yield "id-of-text", vocabulary(unknown=value(UNKNOWN, STRING, "1"))
    yield "id-beyond", vocabulary(unknown=value(UNKNOWN, U32, 99))
    yield "no-unknown", vocabulary(unknown=None)
    bytes_ = [f"<0x{byte:02x}>" for byte in range(256)]
    every = [name.upper().replace("X", "x") for name in bytes_]
    yield (
        "all-bytes",
        vocabulary(tokens=array(TOKENS, STRING, every), types=array(TYPES, U8, [6] * 256), merges=None, unknown=None)
        + PART + b"ab\xc3\xa9",
    )  # fmt: skip
    ones = alike(1100)
    yield "alike-tokens", vocabulary(tokens=array(TOKENS, STRING, ones), types=array(TYPES, U8, [1] * len(ones)))
    pairs = (left + b" " + right for left in ones[:34] for right in ones[:34])
    yield "alike-merges", vocabulary(merges=array(MERGES, STRING, pairs))
    row = in_a_row(600)
    text_of_it = PART + b"\xe9ab" * 40
    yield "row-tokens", vocabulary(tokens=array(TOKENS, STRING, row), types=array(TYPES, U8, [1] * 600)) + text_of_it
    yield "row-merges", vocabulary(merges=array(MERGES, STRING, merges_in_a_row(600))) + text_of_it
    short = in_a_row(200)
    yield "row-short", vocabulary(tokens=array(TOKENS, STRING, short), types=array(TYPES, U8, [1] * 200)) + text_of_it


# ---- Models ----


def model(whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Made of a whole model's file by changing what stands behind a key, or a name, for as many bytes."""
    key = b"diffusion-gemma."

    def changed(name: str, old: bytes, new: bytes, behind: bytes = b"") -> tuple[str, bytes]:
        at = whole.index(behind + old) + len(behind)
        assert len(old) == len(new)
        return name, whole[:at] + new + whole[at + len(old) :]

    def number(name: str, field: bytes, kind: int, old: int, new: bytes) -> tuple[str, bytes]:
        return changed(name, struct.pack("<II", kind, old), struct.pack("<I", kind) + new, key + field)

    yield changed("no-architecture", b"general.architecture", b"general.architectura")
    behind = text("general.architecture") + struct.pack("<IQ", STRING, 15)
    yield changed("architecture", b"diffusion-gemma", b"diffusion-gamma", behind)
    yield changed("no-layers", key + b"block_count", key + b"block_coune")
    yield number("layers-0", b"block_count", U32, 2, bytes(4))
    yield number("layers-300", b"block_count", U32, 2, struct.pack("<I", 300))
    yield number("size-2-31", b"embedding_length", U32, 32, struct.pack("<I", 1 << 31))
    for name, field, old, claimed in (
        ("context", b"context_length", 64, 1 << 24),
        ("heads", b"attention.head_count", 1, 4096),
        ("experts", b"expert_count", 2, 1 << 20),
        ("experts-used", b"expert_used_count", 1, 2),
        ("window", b"attention.sliding_window", 8, 1 << 24),
        ("layers", b"block_count", 2, 256),
    ):
        yield number(f"claims-{name}", field, U32, old, struct.pack("<I", claimed))
    for claimed in 1024, 4096, 65536:
        canvas = struct.pack("<II", U32, 8), struct.pack("<II", U32, claimed), b"diffusion.canvas_length"
        yield changed(f"claims-canvas-{claimed}", *canvas)
    yield number("size-31", b"embedding_length", U32, 32, struct.pack("<I", 31))
    yield changed("base-of-int", struct.pack("<I", F32), struct.pack("<I", I32), key + b"rope.freq_base")
    yield number("used-2-of-1", b"expert_used_count", U32, 1, struct.pack("<I", 9))
    heads = key + b"attention.head_count_kv" + struct.pack("<IIQ", ARRAY, I32, 2)
    one = struct.pack("<i", 1)
    yield changed("heads-3", one, struct.pack("<i", 3), heads)
    yield changed("heads-negative", one, struct.pack("<i", -1), heads)
    yield changed("no-heads", key + b"attention.head_count_kv", key + b"attention.head_count_kx")
    ends = key + b"end_token_ids" + struct.pack("<IIQi", ARRAY, I32, 2, 1)
    yield changed("end-id-beyond", struct.pack("<i", 13), struct.pack("<i", 99), ends)
    yield changed("no-end-ids", key + b"end_token_ids", key + b"end_token_idz")
    yield changed("no-tensor", b"output_norm.weight", b"output_nxrm.weight")
    yield changed("no-layer-tensor", b"blk.1.attn_norm.weight", b"blk.1.attn_nxrm.weight")
    yield changed("type-of-norm", struct.pack("<IQI", 1, 32, 0), struct.pack("<IQI", 1, 32, 1), b"output_norm.weight")
    matrix = struct.pack("<IQQ", 2, 32, 32)
    for name, kind in ("mxfp4", MXFP4), ("99", 99):
        old, new = (matrix + struct.pack("<I", of) for of in (Q4_0, kind))
        yield changed(f"matrix-of-type-{name}", old, new, b"blk.1.ffn_gate.weight")
    yield changed("shape-of-norm", struct.pack("<IQI", 1, 32, 0), struct.pack("<IQI", 1, 16, 0), b"output_norm.weight")


def strange(whole: bytes) -> bytes:
    """A model with one tensor more, behind its last."""
    last = text("blk.1.enc_layer_output_scale.weight")
    end = whole.index(last) + len(last) + 4 + 8 + 4 + 8
    body = whole[-(-end // 32) * 32 :]
    body = body.ljust(-(-len(body) // 32) * 32, b"\0")
    version, tensors, values = struct.unpack_from("<IQQ", whole, 4)
    head = b"GGUF" + struct.pack("<IQQ", version, tensors + 1, values) + whole[24:end]
    head += tensor("strange", [1], 0, len(body))
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + body + bytes(32)


def too_many(whole: bytes) -> bytes:
    """A model with more tensors than its layers have."""
    tensors = [tensor(f"t{i}", [1], 0, 32 * i) for i in range(200)]
    n_values = struct.unpack_from("<Q", whole, 16)[0]
    end = whole.index(struct.pack("<Q", len("token_embd.weight")) + b"token_embd.weight")
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), n_values) + whole[24:end] + b"".join(tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(32 * len(tensors))
