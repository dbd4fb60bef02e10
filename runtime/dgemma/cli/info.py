"""dg-info: shows the contents of a GGUF file, as tables or as JSON."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from dgemma.bench.plan import Plan, told
from dgemma.cli import Command, version_option, which
from dgemma.cli.files import ModelFile
from dgemma.cli.inspect import BOS, TURN_END, facts
from dgemma.cli.output import say_json
from dgemma.cli.plan import HELP as PLAN_HELP
from dgemma.cli.plan import make_plan, notes, plan_options, planned_file, refuse_alone, sections, summary, title
from dgemma.cli.routing import routing_columns, routing_facts, routing_rows
from dgemma.cli.which import Verdict, verdicts
from dgemma.hub.choice import Choices, choices
from dgemma.hub.models import Header
from dgemma.native.metadata import keys
from dgemma.ui.terminal import is_terminal, shown
from dgemma.units import size_text

if TYPE_CHECKING:
    from rich.console import Console

HELP = f"""Shows what a GGUF file holds: its model, types and sizes, parameters by part, tokenizer and chat template.

MODEL is a GGUF file (of a split file the first part), or tidy or sudoku, which come with dgemma, or
hf:owner/name[:TYPE]: only the header is downloaded, unless the file is in the cache. Without a TYPE, the files are
listed if several fit. Of a file that dgemma cannot run, such as a vocabulary without weights, everything that can be
read is shown.

\b
  dg-info model.gguf
  dg-info model.gguf --tensors
  dg-info model.gguf --json | jq .parameters
  dg-info model.gguf --plan --machine rtx4060-laptop
  dg-info model.gguf --plan --ram 8G
  dg-info hf:owner/name --plan                     # which of its files this machine can use
  dg-info --plan --shape 26b-a4b --type q4_k_m     # without any file
  dg-info model.gguf --routing

--routing shows how often each expert was chosen, as counted by dg-run --save-routing; under dg-run --ram, the experts
that were chosen most often stay in memory. --json prints everything, including tensors; of arrays with more than 1000
elements only the length. The exit status is 0 when the file could be read, 1 for a failure, 2 for wrong usage.

{PLAN_HELP}"""
WIDE = 120  # columns of the tables where standard output is no terminal
SHOWN = 8  # the most elements of an array that are shown
LINES = 24  # the most lines of a chat template that are shown


@click.command(cls=Command, name="dg-info", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False, type=ModelFile())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a page.")
@click.option("--routing", is_flag=True, help="Show how often each expert was chosen.")
@plan_options
@version_option("dg-info")
def main(
    model: str | None,
    tensors: bool,
    as_json: bool,
    routing: bool,
    as_plan: bool,
    type_: str | None,
    layers: int | None,
    **flags: Any,
) -> None:
    shape = flags.pop("shape")
    refuse_alone(as_plan, shape=shape, **flags)
    if routing and as_plan:
        raise click.UsageError("--routing and --plan tell different things; give one")
    if model is not None and shape is None and not routing and (several := choices(model)):
        judged = verdicts(several, **flags) if as_plan else None
        if as_json:
            say_json(which.as_json(several, judged), indent=1)
        else:
            files_page(several, judged, new_console())
        return
    with planned_file(model, shape, type_, layers) as header:
        plan = make_plan(header.path, header.is_whole, **flags) if as_plan else None
        found = told(plan) if plan else routing_facts(header.path) if routing else facts(header.path)
    if "path" in found:
        found["path"] = header.name
    if as_json:
        say_json(found | to_fetch(header), indent=1)
        return
    console = new_console()
    if plan:
        plan_page(header.name, plan, console)
    elif routing:
        line(console, found["counts"], "bold")
        section(console, "Experts", routing_columns(found), routing_rows(found))
    else:
        page(found, console)
        if tensors:
            rows = [(t["name"], dims(t["dims"]), t["format"], f"{t['bytes']:,}") for t in found["tensors"]]
            section(console, "Tensors", ("name", "dims", "type", ">bytes"), rows)
    if header.to_come:
        line(console, fetch_note(header), "yellow")


def new_console() -> Console:
    from rich.console import Console

    return Console(highlight=False, width=None if is_terminal(sys.stdout) else WIDE)


def files_page(found: Choices, judged: Sequence[Verdict] | None, console: Console) -> None:
    section(console, f"{found.name}: {len(found.files)} GGUF files", *which.table(found, judged))
    console.print()
    if found.free:
        line(console, f"{found.free[0]} has {size_text(found.free[1])} free.", "")
    example = next((choice for choice in reversed(found.files) if not choice.unread), found.files[-1])
    more = f"dg-info or dg-run with a type, as {example.name}"
    line(console, more if judged else f"--plan tells which are usable here; {more}", "")


def to_fetch(header: Header) -> dict[str, Any]:
    """Return what would have to be fetched, for JSON; nothing where the file is here."""
    if not header.to_come:
        return {}
    free = None if header.free is None else {"folder": str(header.free[0]), "bytes": header.free[1]}
    return {"to_come": header.to_come, "free": free}


def fetch_note(header: Header) -> str:
    text = f"Its header alone was read. Still to be fetched to run it: {size_text(header.to_come)}"
    if header.free is None:
        return text + "."
    lacks = ": too little" if header.free[1] < header.to_come else ""
    return f"{text}; {header.free[0]} has {size_text(header.free[1])} free{lacks}."


def plan_page(name: str, plan: Plan, console: Console) -> None:
    line(console, title(name, plan), "bold")
    for heading, columns, rows in sections(plan):
        section(console, heading, columns, rows)
    console.print()
    for note in notes(plan):
        line(console, note, "yellow")
    line(console, summary(plan), "bold")


def page(found: dict[str, Any], console: Console) -> None:
    parts = f" in {found['parts']} files" if found["parts"] > 1 else ""
    line(console, f"{found['path']}: {size_text(found['bytes'])}{parts}, {len(found['tensors'])} tensors", "bold")
    if not found["runs"]:
        line(console, f"dgemma does not run this file: {found['refusal']}", "yellow")
    if found["config"]:
        section(console, "Model", ("", ""), model_rows(found["config"]))
    if found["tensors"]:
        section(console, "Parameters", ("part", ">parameters", ">size", ">bits each"), parameter_rows(found))
        rows = [
            (name, f"{f['tensors']:,}", human(f["parameters"]), size_text(f["bytes"]), bits(f))
            for name, f in found["formats"].items()
        ]
        section(console, "Types", ("type", ">tensors", ">parameters", ">size", ">bits each"), rows)
    if found["tokenizer"]:
        section(console, "Tokenizer", ("", ""), tokenizer_rows(found["tokenizer"]))
        for note in tokenizer_notes(found):
            line(console, note, "yellow")
    template = found["chat_template"]
    if template:
        lines = template.splitlines()
        more = f", of which the first {LINES}" if len(lines) > LINES else ""
        section(console, f"Chat template: {len(lines)} lines{more}", ("",), [(text,) for text in lines[:LINES]])
    metadata = [(key, v["kind"], value_text(v)) for key, v in found["metadata"].items()]
    section(console, "Metadata", ("key", "kind", "value"), metadata)


def model_rows(config: dict[str, Any]) -> list[tuple[str, str]]:
    sliding = sum(map(bool, config["sliding"]))
    full = config["n_layer"] - sliding
    heads = sorted(set(config["n_head_kv"]), reverse=True)
    return [
        ("layers", f"{config['n_layer']}: {sliding} sliding, {full} full"),
        ("width", f"{config['d_model']}; dense FFN {config['d_ffn']}; experts {config['d_expert']}"),
        ("experts", f"{config['n_expert']}, of which a token meets {config['n_expert_used']}"),
        ("attention", f"{config['n_head']} heads on {' or '.join(map(str, heads))} of keys and values"),
        ("window", f"{config['sliding_window']} tokens in sliding layers"),
        ("canvas", f"{config['canvas_length']} tokens"),
        ("context", f"{config['context_length']:,} tokens"),
        ("vocabulary", f"{config['n_vocab']:,} tokens; an answer ends at {', '.join(map(str, config['end_ids']))}"),
        ("sampling", ", ".join(f"{name} {config[name]}" for name in SAMPLING)),
    ]


SAMPLING = ("steps", "t_min", "t_max", "entropy_bound", "stability", "confidence")


def parameter_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    told = found["parameters"]
    rows: list[tuple[str, ...]] = [
        (part, human(p["parameters"]), size_text(p["bytes"]), bits(p)) for part, p in told["parts"].items()
    ]
    size = sum(p["bytes"] for p in told["parts"].values())
    rows.append(("all", human(told["total"]), size_text(size), bits({"parameters": told["total"], "bytes": size})))
    if told["active"]:
        rows.append(("of which a token meets", human(told["active"]), "", ""))
    return rows


def tokenizer_rows(told: dict[str, Any]) -> list[tuple[str, str]]:
    kinds = ", ".join(f"{count:,} {name}" for name, count in told["kinds"].items())
    special = ", ".join(f"{name} {i} {told['texts'][name]}" for name, i in told["ids"].items())
    return [
        ("model", str(told["model"])),
        ("tokens", f"{told['tokens']:,}: {kinds}"),
        ("merges", f"{told['merges']:,}"),
        ("special", special),
        ("prompts", "begin with bos" if told["add_bos"] else "begin as they are"),
    ]


def tokenizer_notes(found: dict[str, Any]) -> list[str]:
    """Return notes on tokens that the runtime treats differently than the file says."""
    told, key = found["tokenizer"], keys()["add_bos"].key
    notes = []
    if marks := list(told["marks"]):
        which = ", ".join(marks[:SHOWN]) + (", ..." if len(marks) > SHOWN else "")
        one = len(marks) == 1
        looks = "token that looks like a control mark is" if one else "tokens that look like control marks are"
        notes.append(f"{len(marks)} {looks} taken as such: {which}")
    asked = found["metadata"].get(key, {}).get("value")
    if told["add_bos"] and asked is not True:
        said = "the file does not have" if asked is None else "the file says no by"
        notes.append(f"prompts begin with {told['texts']['bos']}, though {said} {key}")
    return notes + bos_notes(found) + end_notes(found)


def bos_notes(found: dict[str, Any]) -> list[str]:
    told, key = found["tokenizer"], keys()["bos_id"].key
    named, by_text = told["ids"].get("bos"), told["bos_by_text"]
    if key not in found["metadata"]:
        return [f"bos is {by_text}, the id of {BOS}: the file has no {key}"] if by_text is not None else []
    if by_text in (None, named):
        return []
    return [f"bos is {named}, {told['texts']['bos']}, by {key}, though {BOS}, {by_text}, is in the vocabulary"]


def end_notes(found: dict[str, Any]) -> list[str]:
    """Return notes on marks that are missing in the file's list of ids that end an answer."""
    key, turn = keys()["end_token_ids"].key, found["tokenizer"]["turn_end"]
    listed = found["metadata"].get(key, {}).get("value")
    if not listed or found["config"] is None:
        return []
    ends = found["config"]["end_ids"]
    notes = []
    if more := [str(i) for i in ends if i not in listed]:
        notes.append(f"an answer ends at {', '.join(more)} too, by name: {key} lacks it")
    if turn is not None and turn not in ends:
        notes.append(f"an answer goes on behind {TURN_END}, {turn}: {key} lacks it")
    return notes


def value_text(told: dict[str, Any]) -> str:
    value, count = told.get("value"), told.get("count")
    if value is None:
        return f"{count or 1:,} elements"
    if count is not None:
        return ", ".join(map(str, value[:SHOWN])) + (f", ... ({count:,})" if count > SHOWN else "")
    text = str(value)
    first = text.split("\n", 1)[0]
    return first if first == text and len(text) <= WIDE else f"{first[:60]}... ({len(text):,} characters)"


def human(count: int) -> str:
    """Return a rounded count, such as "25.2 B"."""
    for scale, letter in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= scale:
            return f"{count / scale:.1f}{letter}"
    return str(count)


def bits(of: dict[str, int]) -> str:
    return f"{8 * of['bytes'] / of['parameters']:.2f}" if of["bytes"] else "?"


def dims(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def section(console: Console, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a heading and a table. A column whose name begins with > has numbers, aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=any(columns), header_style="dim", padding=(0, 2, 0, 2))
    for i, name in enumerate(columns):
        side: Literal["left", "right"] = "right" if name.startswith(">") else "left"
        table.add_column(name.removeprefix(">"), justify=side, no_wrap=i < len(columns) - 1, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print()
    line(console, title, "bold")
    console.print(table)


def line(console: Console, text: str, style: str) -> None:
    from rich.text import Text

    console.print(Text(printable(text), style), soft_wrap=True)


def printable(text: str) -> str:
    """Return a text in one line, with control characters made visible.

    This also applies where standard output is no terminal; --json has the exact text.
    """
    return shown(text.replace("\t", "    ")).replace("\n", "^J")


if __name__ == "__main__":
    main()
