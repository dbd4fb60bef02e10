"""The formats: the same table, the same values and the same bytes as the `gguf` package, and small enough errors."""

from __future__ import annotations

from functools import cache

import gguf
import numpy as np
import pytest
from gguf import quants
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dgemma.convert.encode import HELD
from dgemma.native import formats

ALL = [f.name for f in formats.all_formats()]
WRITTEN = [f.name for f in formats.all_formats() if f.encodes]
BLOCKS = [name for name in WRITTEN if formats.by_name(name).block > 1]
EXACT = ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_0"]

# What llama.cpp's encoders reach: relative RMSE on normal, Laplace and Student t (4 degrees of freedom) values.
ERRORS = {
    "Q8_0": (0.00536, 0.00673, 0.00732),
    "Q6_K": (0.01776, 0.02165, 0.02288),
    "Q5_K": (0.03614, 0.04277, 0.04383),
    "Q5_1": (0.03789, 0.04441, 0.04530),
    "Q5_0": (0.04272, 0.05351, 0.05804),
    "Q4_K": (0.07142, 0.08467, 0.08665),
    "Q4_0": (0.08597, 0.10687, 0.11565),
    "IQ4_NL": (0.07620, 0.08790, 0.09332),
}
# The largest distance of a value from what comes back, as a part of the block's largest magnitude.
FARTHEST = {
    "Q8_0": 0.005,
    "Q6_K": 0.2,
    "Q5_K": 0.2,
    "Q5_1": 0.07,
    "Q5_0": 0.07,
    "Q4_K": 0.4,
    "Q4_0": 0.14,
    "IQ4_NL": 0.25,
}
# Blocks whose values are all smaller than this may become 0: their scale is too small for half precision.
SMALLEST = 2e-4


def kind(name: str) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[name]


@cache
def samples() -> dict[str, np.ndarray]:
    rng, shape = np.random.default_rng(2024), (512, 2816)
    drawn = (rng.standard_normal(shape), rng.laplace(size=shape), rng.standard_t(4, size=shape))
    return dict(zip(("normal", "laplace", "student"), (d.astype(np.float32) for d in drawn), strict=True))


def random_blocks(name: str, seed: int, rows: int = 64, columns: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns * formats.by_name(name).bytes), dtype=np.uint8)


def with_modest_scales(name: str, blocks: np.ndarray) -> np.ndarray:
    """The same blocks with every half-precision scale between 1/16 and 2."""
    at = {"Q6_K": [208], "Q5_K": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q3_K": [108], "Q2_K": [80, 82]}
    size = formats.by_name(name).bytes
    blocks = blocks.reshape(-1, size).copy()
    for offset in at.get(name, [0]) if size > 4 else []:
        blocks[:, offset + 1] = blocks[:, offset + 1] & 0x8F | 0x30
    return blocks


# ---- The table --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_the_table_agrees_with_gguf(name):
    f = formats.by_name(name)
    assert f.id == kind(name)
    assert (f.block, f.bytes) == gguf.GGML_QUANT_SIZES[kind(name)]
    assert formats.by_id(f.id) is f
    assert formats.by_name(name.lower()) is f


def test_the_table_has_what_published_files_and_recipes_need():
    needed = {"F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_0", "IQ4_NL"}
    assert needed <= set(WRITTEN)
    assert {"IQ4_XS", "Q3_K", "Q2_K"} <= set(ALL)
    assert len(set(ALL)) == len({f.id for f in formats.all_formats()}) == len(ALL)


def test_an_unknown_format_is_a_key_error():
    with pytest.raises(KeyError):
        formats.by_name("Q9_Z")
    with pytest.raises(KeyError):
        formats.by_id(999)


# ---- Decoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_decoding_modest_blocks_gives_the_same_bits_as_gguf(name):
    blocks = with_modest_scales(name, random_blocks(name, 1))
    ours, theirs = formats.by_name(name).decode(blocks), quants.dequantize(blocks, kind(name))
    finite = np.isfinite(theirs)
    assert finite.all() or name in ("F32", "F16", "BF16")
    assert np.array_equal(ours[finite].view(np.uint32), theirs[finite].view(np.uint32))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")
def test_decoding_any_bytes_gives_the_same_values_as_gguf(name):
    blocks = random_blocks(name, 2, rows=256)
    ours, theirs = formats.by_name(name).decode(blocks), quants.dequantize(blocks, kind(name))
    assert np.array_equal(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("name", ALL)
def test_arrays_keep_their_leading_axes_and_buffers_become_flat(name):
    f = formats.by_name(name)
    blocks = random_blocks(name, 3, rows=6, columns=2)
    values = f.decode(blocks.reshape(2, 3, -1))
    assert values.shape == (2, 3, 2 * f.block)
    flat = f.decode(blocks.tobytes())
    assert flat.shape == (12 * f.block,)
    assert np.array_equal(values.ravel(), flat, equal_nan=True)
    assert np.array_equal(f.decode(blocks[::2]), values.reshape(6, -1)[::2], equal_nan=True)
    assert f.decode(b"").shape == (0,)


# ---- Encoding ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("sample", ["normal", "laplace", "student"])
def test_simple_formats_are_written_byte_for_byte_as_gguf_writes_them(name, sample):
    values = samples()[sample]
    assert np.array_equal(formats.by_name(name).encode(values), quants.quantize(values, kind(name)).view(np.uint8))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_that_holds_for_blocks_of_any_size(name):
    rng = np.random.default_rng(4)
    scales = 2.0 ** np.arange(-110, 100, dtype=np.float64)
    values = (scales[:, None] * rng.standard_normal((scales.size, 64))).astype(np.float32)
    values[::3] = np.abs(values[::3])
    values[1::7, :32] = 0.0
    values[2::7, 32:] = -0.0
    values[3::7, 5:9] = [-1.0, 1.0, 1.0, -1.0] * np.abs(values[3::7]).max(axis=1, keepdims=True)
    values[4::7] = values[4::7, :1]
    assert np.array_equal(formats.by_name(name).encode(values), quants.quantize(values, kind(name)).view(np.uint8))


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q5_0", "Q4_0"])
def test_that_holds_for_values_halfway_between_codes(name):
    rng = np.random.default_rng(5)
    values = rng.integers(-254, 255, (512, 32)).astype(np.float32) / 2
    values[:, 0] = np.where(values[:, 1] < 0, -127, 127)
    assert np.array_equal(formats.by_name(name).encode(values), quants.quantize(values, kind(name)))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_sixteen_bit_floats_round_as_gguf_rounds_them(name):
    bits = np.random.default_rng(6).integers(0, 2**32, 1 << 20, dtype=np.uint32)
    halves = np.arange(1 << 16, dtype=np.uint32)
    ties = halves << 16
    if name == "F16":
        ties = halves.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    bits = np.concatenate([bits, ties, ties + 0x1000, ties + 0x8000, ties + 0x7FFF, ties + 0x8001, ties + 1, ties - 1])
    values = bits.astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    with np.errstate(over="ignore"):
        theirs = quants.quantize(values, kind(name)).view(np.uint8)
    assert np.array_equal(formats.by_name(name).encode(values), theirs)
    assert np.isnan(formats.by_name(name).decode(formats.by_name(name).encode(np.full(4, np.nan, np.float32)))).all()


@pytest.mark.parametrize("name", ERRORS)
@pytest.mark.parametrize(("sample", "column"), [("normal", 0), ("laplace", 1), ("student", 2)])
def test_errors_are_at_most_two_percent_above_llama_cpp(name, sample, column):
    values, f = samples()[sample], formats.by_name(name)
    exact = values.astype(np.float64)
    error = np.sqrt(np.mean((f.decode(f.encode(values)) - exact) ** 2) / np.mean(exact**2))
    assert error <= 1.02 * ERRORS[name][column]


@pytest.mark.parametrize("name", sorted(set(BLOCKS) - {"Q8_0"}))
@pytest.mark.parametrize("sample", ["normal", "laplace", "student"])
def test_importance_moves_errors_to_where_they_matter_less(name, sample):
    values, f = samples()[sample][:64], formats.by_name(name)
    importance = np.exp(np.random.default_rng(9).standard_normal(values.shape[1])).astype(np.float32)

    def error(blocks):
        return (np.square(f.decode(blocks) - values.astype(np.float64)) * importance).sum()

    assert error(f.encode(values, importance)) < 0.93 * error(f.encode(values))


@pytest.mark.parametrize("name", WRITTEN)
def test_even_importance_changes_nothing_or_lowers_the_error(name):
    values, f = samples()["normal"][:64], formats.by_name(name)
    plain, even = f.encode(values), f.encode(values, np.ones(values.shape[1], np.float32))
    error = [np.square(f.decode(blocks) - values).sum() for blocks in (plain, even)]
    assert np.array_equal(plain, even) or (name in ("Q5_1", "Q5_0", "Q4_0", "IQ4_NL") and error[1] < error[0])


@pytest.mark.parametrize("name", BLOCKS)
@given(values=arrays(np.float32, 512, elements=st.floats(width=32)), scale=st.floats(2**-13, 2**13))
@settings(max_examples=40, deadline=None)
def test_importance_takes_any_values_and_each_row_alone(name, values, scale):
    f, rows = formats.by_name(name), values.reshape(2, 256)
    importance = np.geomspace(1, scale, 256).astype(np.float32)
    blocks = f.encode(rows, importance)
    assert np.array_equal(blocks, np.stack([f.encode(row, importance) for row in rows]))
    assert np.array_equal(blocks, f.encode(rows[:, None], importance).reshape(2, -1))


def columns(n, spread=1.0):
    """Importance, means and pulls of n columns."""
    random = np.random.default_rng(11)
    mean, variance = random.standard_normal(n), np.exp(spread * random.standard_normal(n))
    return [each.astype(np.float32) for each in (np.sqrt(variance + mean**2), mean, mean / variance)]


def rows_by_hand(f, rows, importance, mean, pull):
    """What encode_rows() does, block by block: values move by what minimises sum(v e^2) + (off + sum(mean e))^2."""
    off, blocks = np.zeros(len(rows)), []
    for at in range(0, rows.shape[1], f.block):
        here = slice(at, at + f.block)
        move = (off / (1 + np.sum(mean[at:].astype(np.float64) * pull[at:]))).astype(np.float32)
        blocks.append(f.encode(rows[:, here] - move[:, None] * pull[here], importance[here]))
        errors = f.decode(blocks[-1]).astype(np.float64) - rows[:, here]
        off += errors @ mean[here].astype(np.float64)
    return np.concatenate(blocks, axis=1)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("n", [256, 768])
def test_errors_of_a_row_cancel_where_the_inputs_have_means(name, n):
    f, rows = formats.by_name(name), samples()["normal"].ravel()[: 101 * n].reshape(101, n)
    importance, mean, pull = columns(n)
    got = f.encode_rows(rows, importance, mean, pull)
    by_hand = rows_by_hand(f, rows, importance, mean, pull)
    assert (got != by_hand).mean() < 1e-3, "sums in another order may round a value the other way"
    error, plain = (f.decode(blocks).astype(np.float64) - rows for blocks in (got, f.encode(rows, importance)))
    if n > f.block:
        assert np.square(error @ mean).mean() < 0.5 * np.square(plain @ mean).mean()
    assert np.square(error).sum() < 1.03 * np.square(plain).sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_rows_are_encoded_each_alone_and_without_means_as_by_importance(name):
    f, rows = formats.by_name(name), samples()["laplace"].ravel()[: 9 * 512].reshape(9, 512)
    importance, mean, pull = columns(512, spread=3.0)
    together = f.encode_rows(rows, importance, mean, pull)
    for first, last in ((0, 1), (1, 9), (3, 8)):
        assert np.array_equal(f.encode_rows(rows[first:last], importance, mean, pull), together[first:last])
    nothing = np.zeros(512, np.float32)
    assert np.array_equal(f.encode_rows(rows, importance, nothing, nothing), f.encode(rows, importance))
    with pytest.raises(ValueError, match="columns of shape"):
        f.encode_rows(rows, importance[:256], mean, pull)


tiny = st.floats(2.0**-149, 2.0**-11, width=32).flatmap(
    lambda most: arrays(np.float32, 512, elements=st.floats(-most, most, width=32) | st.just(np.float32(most)))
)


@pytest.mark.parametrize("name", BLOCKS)
@settings(max_examples=60, deadline=None)
@given(values=tiny, scale=st.floats(0, 4), seed=st.integers(0, 3))
def test_tiny_values_never_come_back_worse_than_zeros(name, values, scale, seed):
    """Their scales are near the least that half precision holds, or below it."""
    of, rng = formats.by_name(name), np.random.default_rng(seed)
    weights = (10 ** rng.uniform(-scale, scale, values.size)).astype(np.float32)
    mean = rng.standard_normal(values.size).astype(np.float32)
    rows = of.encode_rows(values[None], weights, mean, mean / weights)[0]
    errors = weights * (of.decode(of.encode(values, weights)).astype(np.float64) - values) ** 2
    zeros = weights * values.astype(np.float64) ** 2
    assert (errors.reshape(-1, of.block).sum(1) <= zeros.reshape(-1, of.block).sum(1) * (1 + 1e-6)).all()
    for blocks in (of.encode(values, weights), rows):
        assert np.abs(of.decode(blocks)).max() <= 2 * np.abs(values).max()


@pytest.mark.parametrize(("name", "value"), [("Q5_K", 1e-12), ("Q4_K", 1e-7), ("Q4_K", 1e-6), ("Q6_K", 1e-6)])
def test_a_tiny_constant_with_importance_stays_tiny(name, value):
    of, rng = formats.by_name(name), np.random.default_rng(1)
    values = np.full((4, 1024), value, np.float32)
    weights = rng.uniform(1e-4, 1e4, 1024).astype(np.float32)
    mean = rng.standard_normal(1024).astype(np.float32)
    for blocks in (of.encode(values, weights), of.encode_rows(values, weights, mean, mean / weights)):
        assert np.abs(of.decode(blocks)).max() <= 2 * np.float32(value)


def test_importance_is_one_number_per_column():
    with pytest.raises(ValueError, match="Q4_K: importance of shape"):
        formats.by_name("q4_k").encode(np.zeros((2, 256), np.float32), np.ones(512, np.float32))


@pytest.mark.parametrize("name", WRITTEN)
def test_only_whole_blocks_are_taken(name):
    f = formats.by_name(name)
    if f.block > 1:
        with pytest.raises(ValueError, match=f"{f.name}: .*{f.block} values"):
            f.encode(np.zeros((2, f.block + 1), np.float32))
        with pytest.raises(ValueError, match="whole blocks"):
            f.encode(np.zeros((f.block, 1), np.float32))
    if f.bytes > 1:
        with pytest.raises(ValueError, match=f"{f.name}: .*{f.bytes} bytes"):
            f.decode(bytes(f.bytes + 1))


@pytest.mark.parametrize("name", sorted(set(ALL) - set(WRITTEN)))
def test_formats_that_are_only_read_say_so(name):
    with pytest.raises(ValueError, match="not written"):
        formats.by_name(name).encode(np.zeros(256, np.float32))


# ---- What holds for all values ----------------------------------------------------------------------------------

finite = st.floats(-1000, 1000, width=32)
rows = arrays(np.float32, st.integers(1, 5).map(lambda n: 256 * n), elements=finite, fill=finite)


@pytest.mark.parametrize("name", WRITTEN)
@given(values=rows)
@settings(max_examples=60, deadline=None)
def test_modest_values_come_back_finite_and_near(name, values):
    f = formats.by_name(name)
    back = f.decode(f.encode(values))
    assert np.isfinite(back).all()
    if name in FARTHEST:
        peak = np.abs(values).reshape(-1, f.block).max(axis=1, keepdims=True)
        assert (np.abs(back - values).reshape(-1, f.block) <= FARTHEST[name] * peak + SMALLEST).all()


@pytest.mark.parametrize("name", BLOCKS)
@given(values=arrays(np.float32, 1280, elements=st.floats(width=32)))
@settings(max_examples=60, deadline=None)
def test_any_values_at_all_can_be_written_and_always_give_the_same_bytes(name, values):
    f = formats.by_name(name)
    blocks = f.encode(values)
    assert np.array_equal(blocks, f.encode(values))
    assert f.decode(blocks).shape == values.shape


all_finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
edges = st.sampled_from([65504.0, 65519.0, 65520.0, 5e5, 8.3e6, 8.4e6, 2e8, 1e9, 3.39e38, 3.4e38]) | st.floats(
    1e4, 1e10
)
large = edges.flatmap(lambda v: st.sampled_from([np.float32(v).item(), -np.float32(v).item()]))
weights = st.none() | st.floats(2**-13, 2**13).map(lambda scale: np.geomspace(1, scale, 256).astype(np.float32))


@pytest.mark.parametrize("name", WRITTEN)
@given(values=arrays(np.float32, 512, elements=all_finite | large | finite, fill=finite), importance=weights)
@settings(max_examples=60, deadline=None)
def test_finite_values_come_back_near_or_the_first_that_does_not_is_told(name, values, importance):
    """Nothing is cut off in silence: a block with a value that a format cannot hold has one that is not finite."""
    f, rows = formats.by_name(name), values.reshape(2, 256)
    blocks = f.encode(rows, importance)
    back = f.decode(blocks).ravel()
    wrong = np.flatnonzero(~np.isfinite(back))
    assert f.first_not_finite(blocks) == (wrong[0] if wrong.size else None)
    if name in FARTHEST and importance is None:
        peak = np.abs(values).reshape(-1, f.block).max(axis=1, keepdims=True).astype(np.float64)
        errors = np.abs(back.astype(np.float64) - values).reshape(-1, f.block)
        held = np.isfinite(back).reshape(-1, f.block).all(axis=1)
        assert (errors <= FARTHEST[name] * peak + SMALLEST)[held].all()


modest = st.sampled_from([HELD, -HELD, HELD / 2, -1.0, 0.0, 1e-30]) | st.floats(-HELD, HELD, width=32)


@pytest.mark.parametrize("name", WRITTEN)
@given(values=arrays(np.float32, 256, elements=modest, fill=modest))
@settings(max_examples=60, deadline=None)
def test_every_format_holds_values_up_to_what_the_converter_does_not_look_at(name, values):
    assert formats.by_name(name).first_not_finite(formats.by_name(name).encode(values)) is None


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_value_of_a_format_is_where_its_scales_end(name, sign):
    f, most = formats.by_name(name), formats.by_name(name).most(sign)
    block = np.zeros(f.block, np.float32)
    block[-1] = most
    assert np.isfinite(f.decode(f.encode(block))).all() and most * sign > HELD
    with np.errstate(over="ignore"):
        block[-1] = np.nextafter(np.float32(most), np.float32(sign * np.inf))
    assert f.first_not_finite(f.encode(block)) is not None


@pytest.mark.parametrize("name", BLOCKS)
@given(values=rows)
@settings(max_examples=60, deadline=None)
def test_a_block_is_written_the_same_whatever_is_beside_it(name, values):
    f = formats.by_name(name)
    blocks = f.encode(values).reshape(-1, f.bytes)
    alone = [f.encode(block) for block in values.reshape(-1, f.block)]
    assert np.array_equal(blocks, np.stack(alone))


@pytest.mark.parametrize("name", BLOCKS)
def test_writing_again_what_was_read_changes_less_than_writing_it_first_did(name):
    f, values = formats.by_name(name), samples()["normal"]
    once = f.decode(f.encode(values))
    twice = f.decode(f.encode(once))
    assert np.square(twice - once).mean() < np.square(once - values).mean()


@pytest.mark.parametrize("name", WRITTEN)
def test_zeros_come_back_as_zeros(name):
    f = formats.by_name(name)
    assert not f.decode(f.encode(np.zeros((3, 256), np.float32))).any()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("value", [1.0, -1.0, 0.37, -250.0, 3e-3])
def test_a_constant_comes_back_almost_exactly(name, value):
    f = formats.by_name(name)
    assert f.decode(f.encode(np.full(512, value, np.float32))) == pytest.approx(value, rel=0.01)
