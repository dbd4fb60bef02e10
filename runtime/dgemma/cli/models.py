"""dg-models: what is kept of models on this machine."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import Any

import click

from dgemma.bench.synthetic import cache_folder
from dgemma.cli import Command, version_option
from dgemma.cli.files import standard_input
from dgemma.cli.output import say_json, write
from dgemma.errors import Error
from dgemma.hub.inventory import Kept, find, kept_models, removal, remove
from dgemma.ui.terminal import is_terminal, tell
from dgemma.units import size_text

HELP = """Lists the models that are kept on this machine, tells where one is, or removes it.

\b
  dg-models list                                       names, sizes, when each was last used
  dg-models path hf:owner/name:Q4_K_M                  its file
  dg-models rm hf:owner/name:Q4_K_M                    what goes is told first, and asked about

These are the models that come with dgemma (tidy, sudoku), GGUF files and checkpoints of DiffusionGemma in the cache of
the Hugging Face Hub (HF_HOME), which other programs share, downloads that were not finished there, and files that
dg-bench --shape made. ACTION is list, path or rm, and NAME as list tells it. rm never touches what is not listed; a
file that another commit in the cache has too stays on the disk. Without a terminal rm needs --yes. The exit status is
0, 1 for a failure or a no, 2 for wrong usage.
"""
ACTIONS = ("list", "path", "rm")


@click.command(cls=Command, name="dg-models", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("action", type=click.Choice(ACTIONS), metavar="ACTION")
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: of list all, of path and rm the one model.")
@click.option("--yes", is_flag=True, envvar="DGEMMA_YES", help="Of rm: ask nothing.")
@version_option("dg-models")
def main(action: str, name: str | None, as_json: bool, yes: bool) -> None:
    if action == "list":
        if name is not None:
            raise click.UsageError(f"list takes no NAME: {name}")
        list_models(as_json)
        return
    if name is None:
        raise click.UsageError(f"{action} needs a NAME, as list tells it")
    model = find(name, cache_folder())
    if action == "path":
        if as_json:
            say_json(told(model), indent=1)
        else:
            write(f"{model.path}\n")
        return
    remove_model(model, as_json, yes)


def list_models(as_json: bool) -> None:
    there = kept_models(cache_folder())
    if as_json:
        say_json([told(each) for each in there], indent=1)
        return
    rows = [(each.name, size_text(each.bytes), _day(each.used), each.kind, str(each.path)) for each in there]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, size, used, kind, path in rows:
        write(f"{name:<{widths[0]}}  {size:>{widths[1]}}  {used}  {kind:<{widths[3]}}  {path}\n")


def remove_model(model: Kept, as_json: bool, yes: bool) -> None:
    what = removal(model)
    size = size_text(what.bytes)
    tell(f"{model.name}: {len(what.files)} files go, {size}:")
    for file in what.files:
        tell(f"  {file}")
    for blob in what.shared:
        tell(f"  stays, as another commit has it too: {blob}")
    if not yes:
        if not (is_terminal(standard_input()) and is_terminal(sys.stderr)):
            raise Error(f"{model.name}: nothing was removed: --yes removes it where no terminal can be asked")
        if not click.confirm("Remove them?", default=False, err=True):
            raise Error(f"{model.name}: nothing was removed")
    remove(what)
    if as_json:
        say_json({**told(model), "removed": [str(file) for file in what.files], "freed": what.bytes}, indent=1)
    else:
        tell(f"{model.name}: removed, {size} are free again")


def told(model: Kept) -> dict[str, Any]:
    """Return a model for JSON."""
    used = datetime.fromtimestamp(model.used).astimezone().isoformat(timespec="seconds")
    values = {"name": model.name, "kind": model.kind, "path": str(model.path), "bytes": model.bytes, "used": used}
    return values | {"removable": bool(model.files)}


def _day(when: float) -> str:
    return datetime.fromtimestamp(when).strftime("%Y-%m-%d")


if __name__ == "__main__":
    main()
