"""Measures how close a file is to another file of the same model, the base.

It compares the distributions for the same canvases, and the answers that each model generates by itself.

The canvases come from the base's sampler, and the self-conditioning of each step from the base's distributions at the
step before. Both models get the same canvases and the same self-conditioning, so a divergence is caused in one step. If
each file were conditioned on its own distributions, the divergence would mostly show trajectories that differ: one hard
puzzle with another trajectory would outweigh all rounding. How errors accumulate when a model uses its own
distributions is shown by the ids of its answers, and by the number of steps.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dgemma.errors import UsageError
from dgemma.eval import distributions
from dgemma.eval.baseline import Answer, Base, Kept, Say, Trajectory, follow, opened, record, replay
from dgemma.eval.prompts import Given, choose
from dgemma.files.identity import identity
from dgemma.model import Model

NOISE = (0.0, 0.1, 0.5, 1.0)  # upper ends of the bins for the share of random ids in a canvas
STEPS = (1, 2, 4, 8, 16, 32)  # lower ends of the bins for steps, without the first bin
ENTROPY = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0)  # nats: lower ends of the bins for entropy, without the first bin


@dataclass(slots=True)
class Bin:
    """Figures of the positions of some steps."""

    label: str
    rows: int  # the number of positions
    temperature: float  # mean
    kl_mean: float  # nats
    kl_p99: float  # 99th percentile, in nats
    top1: float  # share of the positions with the same most likely id


@dataclass(slots=True)
class Reliability:
    """Figures of the positions whose entropy is in one range."""

    label: str  # the range, in nats
    rows: int  # the number of positions
    entropy: float  # mean
    stated: float  # the error rate by the distribution itself: mean of 1 - probability of the most likely id
    error: float  # share of the positions whose most likely id is not in the base's answer


@dataclass(slots=True)
class Layer:
    """Relative error of the hidden state: |file - base| / |base| over all kept positions."""

    layer: int  # -1: the input of the first layer
    first: float  # at the first step, which has no self-conditioning
    middle: float  # at the middle step


@dataclass(slots=True)
class Fidelity:
    """The figures of a comparison: KL in nats, of softmax(logits / temperature); shares are 0 .. 1."""

    file: dict[str, Any]
    base: dict[str, Any]
    prompts: int
    rows: int
    kl_mean: float
    kl_p99: float
    top1: float  # share of the positions with the same most likely id
    committed: float  # share of equal ids in the answers that each model generates by itself
    steps: float  # mean steps of a canvas
    base_steps: float
    converged: float  # share of the canvases that converged
    base_converged: float
    tokens_per_second: float  # of the file, when it generates by itself
    kept: float  # the smallest probability of a distribution that was compared id by id
    by_noise: list[Bin]
    by_step: list[Bin]
    calibration: list[Reliability]
    base_calibration: list[Reliability]
    calibration_error: float  # mean of |stated - error| over the bins, weighted by their rows
    base_calibration_error: float
    layers: list[Layer] = field(default_factory=list)
    worst_layer: int | None = None  # the layer in which the first step's error grows most

    def told(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self)


def fidelity(
    file: str | os.PathLike[str],
    base: str | os.PathLike[str] | Base,
    *,
    prompts: Sequence[Given] | None = None,
    count: int | None = None,
    seed: int = 0,
    layers: bool = False,
    options: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Fidelity:
    """Compare a file with a base: a GGUF file, or a Base from make_base() or Base.load().

    prompts: texts or messages; None: the first `count` of the first shipped set that the base can read. options:
    generation options for both. model: arguments of Model, such as exact=True. say: called with a line about the
    current work. A Base has its own prompts, seed and options. Raises UsageError where the two cannot be compared.
    """
    if not isinstance(base, Base):
        base = make_base(
            base, prompts=prompts, count=count, seed=seed, layers=layers, options=options, model=model, say=say
        )
    return compare(file, base, layers=layers, model=model, say=say)


def make_base(
    path: str | os.PathLike[str],
    *,
    prompts: Sequence[Given] | None = None,
    count: int | None = None,
    seed: int = 0,
    layers: bool = False,
    options: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Base:
    """Make a Base from a file; the arguments are those of fidelity()."""
    known = identity(path)
    with opened(path, model, layers) as its:
        name, chosen = ("given", prompts) if prompts is not None else choose(its)
        chosen = chosen[:count]
        if not chosen:
            raise UsageError("no prompts to compare on")
        about = {
            **known,
            "prompt_set": name,
            "seed": seed,
            "options": dict(options or {}),
            "exact": bool((model or {}).get("exact", False)),
            "backend": its.backend,
            **_shape(its),
        }
        ids = [its.prompt_ids(prompt) for prompt in chosen]
        return Base(about, Kept(record(its, ids, seed=seed, layers=layers, options=options, say=say)))


def compare(
    path: str | os.PathLike[str],
    base: Base,
    *,
    layers: bool = False,
    model: Mapping[str, Any] | None = None,
    say: Say = lambda line: None,
) -> Fidelity:
    """Compare a file with a Base."""
    name = os.fspath(path)
    known = identity(path)
    if layers and not all(t.hidden.size for t in base.trajectories):
        raise UsageError(f"{base.about['name']}: this saved base has no hidden states; make it again with --layers")
    with opened(path, model, layers) as its:
        shape = _shape(its)
        for what, found in {**shape, "vocabulary": known["vocabulary"]}.items():
            if found != base.about[what]:
                raise UsageError(f"{name}: {what} is another than in {base.about['name']}: they cannot be compared")
        exact = bool((model or {}).get("exact", False))
        about = {**known, "exact": exact, "backend": its.backend}
        seen = [_follow(its, base, i, layers, say) for i in range(len(base.trajectories))]
    return _summary(about, base, seen)


def _shape(model: Model) -> dict[str, Any]:
    c = model.config
    return {"n_vocab": c.n_vocab, "canvas_length": c.canvas_length, "n_layer": c.n_layer, "d_model": c.d_model}


@dataclass(slots=True)
class _Seen:
    """The results of a file for one trajectory."""

    of: Trajectory  # the base's trajectory, without ids, logits and hidden states
    kept: float  # the smallest probability that the kept ids of a row of the base have
    kl: npt.NDArray[np.float64]  # [S * n] nats
    state: distributions.State  # of the file's S * n distributions
    answer: Answer
    # The result of _apart for the first step and the middle one.
    layers: list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]


def _follow(model: Model, base: Base, i: int, layers: bool, say: Say) -> _Seen:
    t, of = base.trajectories[i], f"prompt {i + 1} of {len(base.trajectories)}"
    n, n_vocab = len(t.canvases[0]), int(model.config.n_vocab)
    kl: list[npt.NDArray[np.float64]] = []
    states: list[distributions.State] = []
    hidden: list[npt.NDArray[np.float32]] = []
    with model.session(len(t.prompt)) as session:
        session.encode(t.prompt)
        say(f"{of}, generating")
        *_, answer = follow(session, base.about["seed"] + i, base.about["options"])
        looked = set(t.looked) if layers else set()

        def before(step: int) -> npt.NDArray[np.float32]:
            return distributions.condition(t.rows, step * n, n, n_vocab)

        for step, logits in replay(session, list(t.canvases), before, looked, hidden):
            say(f"{of}, step {step + 1} of {len(t.canvases)}")
            kl.append(distributions.divergence(t.rows, step * n, logits))
            states.append(distributions.state(logits, float(t.temperature[step])))
    light = replace(t, rows=distributions.without_ids(t.rows), hidden=np.empty(0, np.float32))
    return _Seen(
        light,
        distributions.kept(t.rows),
        np.concatenate(kl),
        distributions.joined_states(states),
        answer,
        _apart(hidden, t) if layers else [],
    )


def _summary(about: dict[str, Any], base: Base, seen: list[_Seen]) -> Fidelity:
    trajectories = [s.of for s in seen]
    kl = np.concatenate([s.kl for s in seen])
    same = np.concatenate([s.state.argmax == t.rows.state.argmax for s, t in zip(seen, trajectories, strict=True)])
    n = len(trajectories[0].canvases[0])
    temperature = np.concatenate([t.rows.temperature for t in trajectories])
    noise = np.concatenate([np.repeat(t.noise, n) for t in trajectories])
    step = np.concatenate([np.repeat(np.arange(len(t.canvases)), n) for t in trajectories])
    theirs = np.concatenate([np.tile(t.answer.canvas, len(t.canvases)) for t in trajectories])
    mine = distributions.joined_states([s.state for s in seen])
    bases = distributions.joined_states([t.rows.state for t in trajectories])

    def bins(which: npt.NDArray[np.int64], labels: list[str]) -> list[Bin]:
        out = []
        for i, label in enumerate(labels):
            of = which == i
            if of.any():
                p99 = float(np.percentile(kl[of], 99))
                out.append(
                    Bin(
                        label,
                        int(of.sum()),
                        float(temperature[of].mean()),
                        float(kl[of].mean()),
                        p99,
                        float(same[of].mean()),
                    )
                )
        return out

    agreed, tokens = np.sum([_agreement(s.answer, t.answer) for s, t in zip(seen, trajectories, strict=True)], axis=0)
    calibration, base_calibration = (reliability(of, theirs) for of in (mine, bases))
    layers = _layers(seen)
    seconds = sum(s.answer.seconds for s in seen)
    return Fidelity(
        file=about,
        base=base.about,
        prompts=len(seen),
        rows=len(kl),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.percentile(kl, 99)),
        top1=float(same.mean()),
        committed=float(agreed / tokens) if tokens else 1.0,
        steps=float(np.mean([s.answer.steps for s in seen])),
        base_steps=float(np.mean([t.answer.steps for t in trajectories])),
        converged=float(np.mean([s.answer.converged for s in seen])),
        base_converged=float(np.mean([t.answer.converged for t in trajectories])),
        tokens_per_second=sum(s.answer.tokens for s in seen) / max(seconds, 1e-9),
        kept=min(s.kept for s in seen),
        by_noise=bins(np.searchsorted(NOISE, noise, side="left"), _noise_labels()),
        by_step=bins(np.searchsorted(STEPS, step, side="right"), _step_labels()),
        calibration=calibration,
        base_calibration=base_calibration,
        calibration_error=_calibration_error(calibration),
        base_calibration_error=_calibration_error(base_calibration),
        layers=layers,
        worst_layer=_worst(layers),
    )


def _noise_labels() -> list[str]:
    return ["none", *(f"{begin:.0%} to {end:.0%}" for begin, end in pairwise(NOISE))]


def _step_labels() -> list[str]:
    ends = [*(begin - 1 for begin in STEPS[1:]), None]
    after = [
        f"{b + 1}" if e == b else f"{b + 1} on" if e is None else f"{b + 1} to {e + 1}"
        for b, e in zip(STEPS, ends, strict=True)
    ]
    return ["1", *after]


def _agreement(one: Answer, other: Answer) -> tuple[int, int]:
    """Return the number of positions at which both answers have the same id, and the length of the longer answer.

    The end of an answer counts as one position.
    """
    most = min(max(one.tokens, other.tokens) + 1, len(one.canvas))
    return int((one.canvas[:most] == other.canvas[:most]).sum()), most


def reliability(state: distributions.State, committed: npt.NDArray[np.int32]) -> list[Reliability]:
    """Return the bins by entropy. committed: the ids of the base's answer at the same positions."""
    entropy = state.entropy
    which = np.searchsorted(ENTROPY, entropy, side="right")
    ends = [0.0, *ENTROPY, None]
    out = []
    for i, (begin, end) in enumerate(pairwise(ends)):
        of = which == i
        if of.any():
            label = f"{begin:g} on" if end is None else f"{begin:g} to {end:g}"
            wrong = float((state.argmax[of] != committed[of]).mean())
            out.append(
                Reliability(label, int(of.sum()), float(entropy[of].mean()), float(1 - state.peak[of].mean()), wrong)
            )
    return out


def _calibration_error(bins: list[Reliability]) -> float:
    return sum(b.rows * abs(b.stated - b.error) for b in bins) / sum(b.rows for b in bins)


def _apart(
    hidden: Sequence[npt.NDArray[np.float32]], of: Trajectory
) -> list[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """Return |file - base|^2 and |base|^2 of each layer, at the first step and the middle one.

    Both are [n_layer + 1].
    """
    out = []
    for which in (0, -1):
        own, other = hidden[which].astype(np.float64), of.hidden[which].astype(np.float64)
        out.append((((own - other) ** 2).sum(axis=(1, 2)), (other**2).sum(axis=(1, 2))))
    return out


def _layers(seen: list[_Seen]) -> list[Layer]:
    if not seen[0].layers:
        return []
    errors = []
    for which in (0, -1):
        apart, size = np.sum([s.layers[which] for s in seen], axis=0)
        errors.append(np.sqrt(apart / size))
    return [Layer(i - 1, float(a), float(b)) for i, (a, b) in enumerate(zip(*errors, strict=True))]


def _worst(layers: list[Layer]) -> int | None:
    """Return the layer in which the error of the first step grows most; None without any error."""
    if not layers or layers[-1].first == 0:
        return None
    grown = np.diff([0.0, *(layer.first for layer in layers)])
    return layers[int(grown.argmax())].layer
