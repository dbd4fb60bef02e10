"""How often a rule for holes of unknown length finds the right text: `python tests/measure lengths [MODEL.gguf]`.

Holes of the held-out cases of tests/models/tidy, as `dg-run --fill` ([[...]]) and --edit meet them: each length is
tried once, and of these trials every rule below chooses one. `possible`: the right text is among them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass

import click
import numpy as np
from measure.success_rate import names
from models.tidy import tasks

import dgemma
from dgemma.infill.edit import lengths_for
from dgemma.infill.fill import LENGTHS, Hole, Layout
from dgemma.infill.scoring import log_likelihood
from dgemma.model import bundled


@dataclass(frozen=True)
class Trial:
    """One length tried. Entropies: nats, of the hole's tokens [steps, length]."""

    right: bool
    entropy: np.ndarray
    accepted: np.ndarray  # bool, of the same shape
    converged: bool
    text: np.ndarray  # bool [length]: no filler
    likelihood: float  # log, nats: of the text behind what stands before it, by the encoder's next-token logits


def at_acceptance(trial: Trial) -> np.ndarray:
    """Entropy of each token at the step since which it is accepted."""
    refused = np.where(trial.accepted, -1, np.arange(len(trial.accepted))[:, None]).max(0)
    at = np.minimum(refused + 1, len(trial.accepted) - 1)
    return trial.entropy[at, np.arange(trial.entropy.shape[1])]


def last_mean(trial: Trial) -> float:
    return float(trial.entropy[-1].mean())


RULES: dict[str, Callable[[Trial], object]] = {  # the least wins, of equal ones the first
    "mean entropy, last step": last_mean,
    "sum of entropies, last step": lambda t: t.entropy[-1].sum(),
    "greatest entropy, last step": lambda t: t.entropy[-1].max(),
    "mean entropy, first step": lambda t: t.entropy[0].mean(),
    "sum of entropies, first step": lambda t: t.entropy[0].sum(),
    "mean entropy, all steps": lambda t: t.entropy.mean(),
    "mean entropy when accepted": lambda t: at_acceptance(t).mean(),
    "steps, then mean entropy": lambda t: (len(t.entropy), last_mean(t)),
    "converged, then mean entropy": lambda t: (not t.converged, last_mean(t)),
    "converged, then least filler": lambda t: (not t.converged, (~t.text).sum(), last_mean(t)),
    "summed over all steps": lambda t: t.entropy.sum(),
    "likelihood of the text": lambda t: -t.likelihood,
    "likelihood per token": lambda t: -t.likelihood / (t.text.sum() + 1),
    "converged, then likelihood": lambda t: (not t.converged, -t.likelihood),
    "likelihood, entropy when accepted": lambda t: -t.likelihood - at_acceptance(t).sum(),
    "the same, of text alone": lambda t: -t.likelihood - at_acceptance(t)[t.text].sum(),
    "likelihood, entropy of last step": lambda t: -t.likelihood - t.entropy[-1].sum(),
}


def trials(model: dgemma.Model, form: str, holes: tasks.Holes, seed: int, **options: object) -> list[Trial]:
    """Every length that is tried for the one hole, as fill() and edit() try it."""
    case, encode = holes.case, model.tokenizer.encode
    lengths: tuple[int, ...] = LENGTHS
    if form in ("rewrite", "inline"):  # a passage that is edited
        lengths = lengths_for(len(encode(case.messages[-1]["content"].partition("\n")[2])))
    prompt = model.tokenizer.chat(case.messages, case.tools or None, case.thinking) if holes.prompted else None
    return [trial(model, holes, prompt, length, seed, options) for length in lengths]


def trial(
    model: dgemma.Model, holes: tasks.Holes, prompt: list[int] | None, length: int, seed: int, options: dict
) -> Trial:
    pieces = [Hole(length) if hole else text for text, hole in holes.pieces]
    layout = Layout.of(model, pieces, [length], special=True)
    steps: list[dgemma.Step] = []
    filled = model.fill(pieces, prompt, on_step=steps.append, seed=seed, special=True, **options)
    free = [at for at, owner in enumerate(layout.owners[layout.first : layout.last]) if owner >= 0]
    entropy, accepted = (np.stack([getattr(step, name)[free] for step in steps]) for name in ("entropy", "accepted"))
    places = set(filled.best.result.places)
    encode, (text,) = model.tokenizer.encode, filled.holes
    place = [hole for _, hole in holes.pieces].index(True)
    before, after = (
        [i for given, _ in pieces for i in encode(given)]
        for pieces in (holes.pieces[:place], holes.pieces[place + 1 :])
    )
    with model.session() as session:
        start = [*(prompt or encode("<bos>")), *before]
        likely = returned(log_likelihood(session, start, [*encode(text), *after, *encode(holes.end)]))
    return Trial(
        filled.text == holes.text, entropy, accepted, filled.converged, np.array([at in places for at in free]), likely
    )


def returned(turns: Generator[None, None, float]) -> float:
    while True:
        try:
            next(turns)
        except StopIteration as end:
            return float(end.value)


def open_lines(count: int) -> list[tasks.Holes]:
    """Lines of words of which any would do: 1 to 6 of them are missing."""
    rng, found = random.Random(0), []
    case = tasks.cases("sort", 1)[0]
    for _ in range(count):
        words, missing = rng.sample(tasks.WORDS, 10), rng.randint(1, 6)
        first = rng.randint(1, 3)
        texts = [words[:first], words[first : first + missing], words[first + missing :]]
        before, hole, after = (" ".join(part) for part in texts)
        found.append(tasks.Holes(case, False, ((before + " ", False), (hole, True), (" " + after, False))))
    return found


@click.command()
@click.argument("model", required=False)
@click.option("--count", default=25, show_default=True, help="held-out cases per task")
@click.option("--seeds", default=1, show_default=True)
@click.option("--form", "forms", multiple=True, type=click.Choice(list(tasks.FORMS)), help="these alone")
@click.option("--conditioned", is_flag=True, help="with pins_conditioned")
def main(model: str | None, count: int, seeds: int, forms: tuple[str, ...], conditioned: bool) -> None:
    """Prints a Markdown table: of each form's holes, in percent, those that a rule gets right; and of holes in lines
    where any words would do, how many tokens are written for one that was there."""
    found: dict[str, list[list[Trial]]] = {}
    with dgemma.Model(model or bundled("tidy"), threads=1) as m:
        for form in forms or tasks.FORMS:
            cases = [holes for task in names(form) for holes in tasks.holes(form, task, count)]
            options = {"pins_conditioned": conditioned}
            found[form] = [trials(m, form, holes, seed, **options) for holes in cases for seed in range(seeds)]
        lines = open_lines(2 * count)
        free = [trials(m, "document", line, seed) for line in lines for seed in range(seeds)]
        gone = [len(m.tokenizer.encode(line.pieces[1][0])) for line in lines for _ in range(seeds)]
    print(f"| rule | {' | '.join(found)} | length of open holes |\n|---{'|--:' * (len(found) + 1)}|")
    print(f"| holes | {' | '.join(str(len(tried)) for tried in found.values())} | {len(free)} |")
    possible = [100 * np.mean([any(t.right for t in each) for each in tried]) for tried in found.values()]
    print(f"| possible | {' | '.join(f'{share:.1f}' for share in possible)} | |")
    for name, rule in RULES.items():
        rates = [100 * np.mean([min(each, key=rule).right for each in tried]) for tried in found.values()]
        longer = sum(min(each, key=rule).text.sum() for each in free) / sum(gone)
        print(f"| {name} | {' | '.join(f'{rate:.1f}' for rate in rates)} | {longer:.2f} |")


if __name__ == "__main__":
    main()
