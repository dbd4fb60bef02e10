"""dg-eval's fidelity: the measures are right, the same file is no different, and what is broken is found."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import dgemma
from dgemma.convert import convert
from dgemma.convert.recipe import RECIPES
from dgemma.errors import Error, FormatError, UsageError
from dgemma.eval import distributions
from dgemma.eval.baseline import Base, first_canvas
from dgemma.eval.fidelity import compare, fidelity, make_base, reliability
from dgemma.eval.prompts import choose, puzzles
from dgemma.model import bundled as bundled_path

SUDOKU = Path(__file__).parent / "models" / "sudoku"
GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))

from make_fidelity import measured  # noqa: E402

FEW = 8  # one Sudoku of each level


@pytest.fixture(scope="module")
def f32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fidelity") / "f32.gguf"
    convert(SUDOKU, path, type="f32")
    return path


@pytest.fixture(scope="module")
def base(f32: Path) -> Base:
    return make_base(f32, count=FEW, layers=True)


# ---- The measures ----


def plain(logits: np.ndarray, temperature: float) -> np.ndarray:
    """softmax(logits / temperature), the plain way."""
    e = np.exp(logits.astype(np.float64) / temperature)
    return e / e.sum(axis=1, keepdims=True)


@pytest.fixture
def two() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return tuple(random.normal(0, 4, (7, 50)).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


def test_divergence_entropy_and_peak_are_numpys(two):
    p, q = (plain(logits, 0.7) for logits in two)
    kept = distributions.keep(two[0], 0.7)
    np.testing.assert_allclose(distributions.divergence(kept, 0, two[1]), (p * np.log(p / q)).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(kept.state.entropy, -(p * np.log(p)).sum(axis=1), rtol=1e-9)
    np.testing.assert_allclose(kept.state.peak, p.max(axis=1), rtol=1e-12)
    assert (kept.state.argmax == p.argmax(axis=1)).all()


def test_of_a_large_vocabulary_the_likely_ids_are_kept_and_the_others_are_one(two, monkeypatch):
    """The divergence is then that of the coarser distributions, computed here the plain way, and never more."""
    monkeypatch.setattr(distributions, "WHOLE", 10)
    monkeypatch.setattr(distributions, "MOST", 12)
    monkeypatch.setattr(distributions, "CHUNK", 110)  # two rows at a time
    kept = distributions.keep(two[0], 0.7)
    p, q = (plain(logits, 0.7) for logits in two)
    got = distributions.divergence(kept, 0, two[1])
    for i in range(7):
        ids = kept.ids[kept.row(i)]
        assert len(ids) <= 12 and p[i, ids].min() >= np.delete(p[i], ids).max()
        assert len(ids) == 12 or 1 - p[i, ids].sum() <= distributions.TAIL < 1 - np.sort(p[i, ids])[1:].sum()
        coarse = [np.append(d[i, ids], 1 - d[i, ids].sum()) for d in (p, q)]
        assert got[i] == pytest.approx((coarse[0] * np.log(coarse[0] / coarse[1])).sum(), rel=1e-6)
        assert got[i] <= (p[i] * np.log(p[i] / q[i])).sum() + 1e-12
    assert (distributions.divergence(kept, 0, two[0]) == 0).all()
    assert distributions.kept(kept) == pytest.approx(min(p[i, kept.ids[kept.row(i)]].sum() for i in range(7)))


def test_what_was_kept_conditions_as_the_logits_did(two, monkeypatch):
    """Of a small vocabulary to the bit; of a large one the likely ids do, and the others share what is left."""
    assert (distributions.condition(distributions.keep(two[0], 0.7), 2, 3, 50) == two[0][2:5] / np.float32(0.7)).all()
    monkeypatch.setattr(distributions, "WHOLE", 10)
    monkeypatch.setattr(distributions, "MOST", 12)
    kept, p = distributions.keep(two[0], 0.7), plain(two[0], 0.7)
    got = plain(distributions.condition(kept, 0, 7, 50), 1)
    for i in range(7):
        ids = kept.ids[kept.row(i)]
        np.testing.assert_allclose(got[i, ids], p[i, ids], rtol=1e-4)
        others = np.full(50 - len(ids), (1 - p[i, ids].sum()) / (50 - len(ids)))
        np.testing.assert_allclose(np.delete(got[i], ids), others, rtol=1e-2, atol=1e-9)


def test_reliability_counts_errors_by_stated_entropy():
    entropy, peak = np.array([0.0, 0.0, 0.3, 3.0]), np.array([1.0, 1.0, 0.9, 0.25])
    state = distributions.State(entropy, entropy, peak, np.array([1, 2, 3, 4]))
    bins = reliability(state, np.array([1, 0, 3, 0]))
    assert [(b.label, b.rows, b.error) for b in bins] == [("0 to 0.001", 2, 0.5), ("0.1 to 0.5", 1, 0), ("2 on", 1, 1)]
    assert [b.stated for b in bins] == pytest.approx([0, 0.1, 0.75])


# ---- Files ----


def test_a_file_against_itself_is_no_different(f32, base):
    same = compare(f32, base, layers=True)
    assert (same.kl_mean, same.kl_p99, same.top1, same.committed) == (0, 0, 1, 1)
    assert same.steps == same.base_steps and same.calibration == same.base_calibration
    assert len(same.layers) == 7 and all(layer.first == layer.middle == 0 for layer in same.layers)
    assert same.worst_layer is None
    assert same.prompts == FEW and sum(b.rows for b in same.by_noise) == sum(b.rows for b in same.by_step) == same.rows


def test_both_models_are_shown_the_same_words_though_they_were_kept_in_part(f32, monkeypatch):
    monkeypatch.setattr(distributions, "WHOLE", 10)
    monkeypatch.setattr(distributions, "MOST", 12)
    same = compare(f32, make_base(f32, count=1))
    assert (same.kl_mean, same.top1) == (0, 1) and same.kept < 1


def test_the_canvases_are_those_that_the_sampler_went_through(f32, base):
    """A trajectory replayed by hand ends in the answer that the model gives."""
    with dgemma.Model(f32) as model:
        for i, t in enumerate(base.trajectories[:3]):
            result = model.generate(t.prompt, seed=i)
            assert (t.canvases[0] == first_canvas(model, i)).all()
            assert t.answer.steps == result.steps == len(t.canvases)
            assert t.answer.canvas[: len(result.ids)].tolist() == result.ids
            assert (t.rows.state.argmax[-96:] == t.answer.canvas).all()


def test_hidden_states_are_what_the_logits_are_made_of(f32):
    """The last layer's, normed and through the head, are denoise()'s logits; and looking changes nothing."""
    tensors = {t.name: t.data for t in GGUFReader(f32).tensors}
    with dgemma.Model(f32, exact=True) as model, model.session() as session:
        session.encode(model.prompt_ids(puzzles()[0].prompt))
        canvas = first_canvas(model, 0)
        before = session.denoise(canvas)
        hidden = session.hidden(canvas)
        assert hidden.shape == (7, 96, 128)
        x = hidden[-1] / np.sqrt((hidden[-1] ** 2).mean(axis=1, keepdims=True) + 1e-6)
        z = (x * tensors["output_norm.weight"]) @ tensors["token_embd.weight"].T
        cap = model.config.softcap
        np.testing.assert_allclose(cap * np.tanh(z / cap), before, rtol=1e-3, atol=1e-3)
        assert (session.denoise(canvas) == before).all()
        with pytest.raises(UsageError, match="a canvas has 1 to 96 ids"):
            session.hidden([])


@pytest.mark.parametrize("name, layer", [("blk.3.ffn_down_exps.weight", 3), ("blk.1.attn_output.weight", 1)])
def test_one_corrupted_tensor_is_caught_and_its_layer_named(name, layer, f32, base, tmp_path):
    path = tmp_path / "corrupted.gguf"
    shutil.copy(f32, path)
    tensor = next(t for t in GGUFReader(path, "r+").tensors if t.name == name)
    tensor.data[:] = np.random.default_rng(0).permutation(tensor.data.ravel()).reshape(tensor.data.shape)
    tensor.data.flush()
    broken = compare(path, Base(base.about, base.trajectories[2:5]), layers=True)
    assert broken.kl_mean > 0.001 and broken.top1 < 1
    assert broken.worst_layer == layer
    assert all(at.first == 0 for at in broken.layers if at.layer < layer)


def test_a_file_that_computes_nonsense_is_told(f32, base, tmp_path):
    path = tmp_path / "nan.gguf"
    shutil.copy(f32, path)
    tensor = next(t for t in GGUFReader(path, "r+").tensors if t.name == "output_norm.weight")
    tensor.data[:] = np.nan
    tensor.data.flush()
    for backend in ("reference", "auto"):
        with pytest.raises(Error, match=r"nan\.gguf: NaN or infinity in the last norm"):
            compare(path, base, model={"backend": backend})


def test_a_saved_base_is_the_base(f32, base, tmp_path):
    base.save(tmp_path / "base.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["base.npz"]
    convert(SUDOKU, tmp_path / "q4.gguf", type="q4_0")
    direct = compare(tmp_path / "q4.gguf", base, layers=True).told()
    again = fidelity(tmp_path / "q4.gguf", Base.load(tmp_path / "base.npz"), layers=True).told()
    for told in (direct, again):
        del told["tokens_per_second"]
    assert direct == again
    assert direct["kl_mean"] > 0


def test_what_cannot_be_compared_is_refused(base, tmp_path, monkeypatch, f32):
    (tmp_path / "no.npz").write_bytes(b"nothing")
    with pytest.raises(FormatError, match="not a saved base"):
        Base.load(tmp_path / "no.npz")
    with pytest.raises(UsageError, match="n_vocab"):
        compare(f32, Base({**base.about, "n_vocab": 65}, base.trajectories))
    without = make_base(f32, count=1)
    with pytest.raises(UsageError, match="hidden states"):
        compare(f32, without, layers=True)
    with pytest.raises(UsageError, match="no prompts"):
        make_base(f32, prompts=[])


def test_a_model_gets_prompts_that_it_can_read(bundled):
    name, prompts = choose(bundled)
    assert name == "sudoku" and len(set(map(str, prompts))) == 16
    for prompt in prompts:
        assert bundled.tokenizer.unk_id not in bundled.prompt_ids(prompt)
    assert {p.blanks for p in puzzles() if p.prompt in prompts[:8]} == {20, 30, 36, 40, 44, 48, 51, 54}
    with dgemma.Model(bundled_path("tidy")) as tidy:
        name, prompts = choose(tidy)
        assert name == "tidy" and len(set(map(str, prompts))) == 16
        same = compare(tidy.path, make_base(tidy.path, count=2))
        assert (same.kl_mean, same.top1, same.committed) == (0, 1, 1)


# ---- What types may cost ----

RECORDED = json.loads((GOLDEN / "fidelity.json").read_text())


def test_every_type_has_a_recorded_value():
    assert set(RECORDED) == set(RECIPES)


@pytest.mark.parametrize("kind", RECORDED)
def test_no_type_costs_more_than_it_did(kind, tmp_path):
    """Against the recorded pass over the float32 checkpoint, in float32: see golden/make_fidelity.py.

    Processors sum in different orders, which moves a divergence by a millionth, seldom one position of a thousand.
    """
    found = measured(kind, Base.load(GOLDEN / "fidelity.npz"), tmp_path)
    before = RECORDED[kind]
    for name in ("kl_mean", "kl_p99"):
        assert found[name] <= 1.01 * before[name] + 1e-9, f"{kind}: {name} was {before[name]:.3g}, is {found[name]:.3g}"
    for name in ("top1", "committed"):
        assert found[name] >= before[name] - 0.001, f"{kind}: {name} was {before[name]:.4f}, is {found[name]:.4f}"
