"""How often a file gets the tasks of tests/models/tidy right.

python tests/measure success_rate [MODEL.gguf] --seeds 3
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click
from measure.solve_rate import settings_of
from models.tidy import tasks

import dgemma
from dgemma.model import bundled

FORMS = ("prompt", *tasks.FORMS)


@dataclass(frozen=True)
class Rate:
    right: int
    tries: int
    mean_steps: float
    first_wrong: str  # what was asked, wanted and said, for a failure that explains itself


def names(form: str) -> Sequence[str]:
    """The tasks that a form has."""
    return tasks.TASKS if form == "prompt" else tasks.FORMS[form][1]


def success_rate(
    model: dgemma.Model, task: str, form: str = "prompt", count: int = 100, seeds: int = 1, **options: Any
) -> Rate:
    """The first `count` held-out cases of a task in one of FORMS, once per seed 0 .. seeds - 1."""
    steps, right, first_wrong = [], 0, ""
    for item in tasks.cases(task, count) if form == "prompt" else tasks.holes(form, task, count):
        case = item if isinstance(item, tasks.Case) else item.case
        prompt, given, wanted = prompt_of(model, case), {}, case.output
        if isinstance(item, tasks.Holes):
            prompt = prompt if item.prompted else model.prompt_ids("<bos>")
            given, wanted = canvas_of(model, item), item.text
        for seed in range(seeds):
            result = model.generate(prompt, seed=seed, **given, **options)
            steps.append(result.steps)
            if result.text == wanted:
                right += 1
            else:
                first_wrong = first_wrong or f"{case.messages}: wanted {wanted!r}, found {result.text!r} (seed {seed})"
    return Rate(right, len(steps), sum(steps) / len(steps), first_wrong)


def cell(rates: list[Rate]) -> str:
    """Percent right, and mean steps in brackets, of all tries together."""
    tries = sum(r.tries for r in rates)
    return f"{100 * sum(r.right for r in rates) / tries:.1f} ({sum(r.mean_steps * r.tries for r in rates) / tries:.1f})"


def prompt_of(model: dgemma.Model, case: tasks.Case) -> list[int]:
    return model.tokenizer.chat(case.messages, case.tools or None, case.thinking)


def canvas_of(model: dgemma.Model, holes: tasks.Holes) -> dict[str, Any]:
    """`canvas` and `pinned` of generate(), as Holes says."""
    ids: list[int] = []
    pinned: list[bool] = []
    behind = 0  # the last hole
    for text, hole in holes.pieces:
        more = model.tokenizer.encode(text)
        ids, pinned = ids + more, pinned + [not hole] * len(more)
        behind = len(ids) if hole else behind
    pad = model.tokenizer.pad_id
    ids[behind:behind], pinned[behind:behind] = [pad] * holes.slack, [False] * holes.slack
    room = model.config.canvas_length - len(ids)
    ids += [*model.tokenizer.encode(holes.end), *[pad] * room][:room]
    return {"canvas": ids, "pinned": pinned + [True] * room}


@click.command()
@click.argument("model", required=False)
@click.option("--seeds", default=3, show_default=True)
@click.option("--count", default=100, show_default=True, help="held-out cases per task")
@click.option("--form", "forms", multiple=True, type=click.Choice(FORMS), help="these alone; may be repeated")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="an option of generate(): effort=low")
@click.option("--wrong", is_flag=True, help="show the first failure of each task on standard error")
def main(
    model: str | None, seeds: int, count: int, forms: tuple[str, ...], settings: tuple[str, ...], wrong: bool
) -> None:
    """Prints a Markdown table for MODEL, or for the bundled tidy: percent right, and mean steps in brackets."""
    forms, options = forms or FORMS, settings_of(settings)
    every: dict[str, list[Rate]] = {form: [] for form in forms}
    with dgemma.Model(model or bundled("tidy"), threads=1) as m:
        print(f"| task | {' | '.join(forms)} |\n|---{'|--:' * len(forms)}|")
        for task in tasks.TASKS:
            cells = []
            for form in forms:
                if task in names(form):
                    r = success_rate(m, task, form, count, seeds, **options)
                    every[form].append(r)
                    cells.append(cell([r]))
                    if wrong and r.first_wrong:
                        click.echo(f"{form} {task}: {r.first_wrong}", err=True)
                else:
                    cells.append("")
            print(f"| {task} | {' | '.join(cells)} |", flush=True)
        print(f"| all | {' | '.join(cell(every[form]) for form in forms)} |")


if __name__ == "__main__":
    main()
