"""dg-serve: an OpenAI-compatible server for one model."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

import click

from dgemma.cli import Command, version_option
from dgemma.cli.files import ModelFile
from dgemma.cli.running import Size, open_model, ram_option, running_options
from dgemma.errors import MemoryBudgetError, UsageError
from dgemma.model import Model
from dgemma.session import USUAL_CONTEXT
from dgemma.ui.terminal import one_line, tell
from dgemma.units import size_text

try:
    from dgemma.serve.app import Limits, Server
    from dgemma.serve.auth import Guard, is_loopback
    from dgemma.serve.edits import EditDiffusion
    from dgemma.serve.lifecycle import Running, listen, log_to_stderr, return_large_blocks
    from dgemma.serve.parameters import PARAMETERS
    from dgemma.serve.requests import Diffusion
except ImportError as missing:  # the command names the package when it runs
    MISSING: ImportError | None = missing
else:
    MISSING = None

WIDTH = 78  # of the tables in --help
DEFAULT_CACHE = 4 << 30  # bytes at most
SHORT = 1024  # tokens of a conversation that is kept even where the model leaves little


def table(rows: Iterable[tuple[str, str | None]], indent: int) -> str:
    """Return rows of a name and a text in two columns, the texts filled to the width of a page of --help."""
    return "\n".join(
        textwrap.fill(
            f"{text}", WIDTH, initial_indent=f"{' ' * indent}{name:<24}", subsequent_indent=" " * (indent + 24)
        )
        for name, text in rows
    )


def help_of_requests() -> str:
    """Return what --help says about the JSON of requests."""
    lines = ["\b", "Parameters of requests:"]
    for what in ("used", "ignored", "refused"):
        lines += [f"  {what}:", table(((p.name, p.why) for p in PARAMETERS if p.what == what), indent=4)]
    fields = {**Diffusion.model_fields, **EditDiffusion.model_fields}
    lines += ["", "\b", 'Fields of "diffusion" in requests:']
    return "\n".join([*lines, table(((name, field.description) for name, field in fields.items()), indent=2)])


def help_text() -> str:
    return f"""Serves a DiffusionGemma model: a web page at / to chat, watch the canvas and edit texts; OpenAI's API:
/v1/chat/completions, /v1/completions and /v1/edits (rewrites a passage of a text), streaming or not, and /v1/models;
/health; and /metrics for Prometheus.

MODEL is a GGUF file, or tidy or sudoku, which come with dgemma, or hf:owner/name[:TYPE]. Without one, sudoku is served.

\b
  dg-serve model.gguf                                  # then open http://127.0.0.1:8080
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{{"model": "model", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'

It listens on this machine only. With --host for another address it needs --api-key (or DGEMMA_API_KEY) or --no-auth.
Requests are worked on in turn, one step at a time; when the queue is full, a request gets status 429. If the prompt of
a request begins like an earlier one, only the rest is encoded. After Ctrl-C, running requests have --grace to finish.

{"" if MISSING else help_of_requests()}"""


@click.command(cls=Command, name="dg-serve", help=help_text(), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False, type=ModelFile())
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8080,
    show_default=True,
    metavar="N",
    help="The port; 0: any free one.",
)
@click.option(
    "--api-key", metavar="KEY", envvar="DGEMMA_API_KEY", help="The key that clients must send; also DGEMMA_API_KEY."
)
@click.option("--no-auth", is_flag=True, help="Serve other machines without a key.")
@click.option("--name", metavar="NAME", help="The model's id. Default: the file's name.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"The most tokens of a prompt and its answer. Default: the model's context, at most {USUAL_CONTEXT} and what"
    " fits into memory.",
)
@click.option(
    "--cache",
    type=Size(),
    metavar="SIZE",
    help="Memory for encoded prompts: of running requests, and of earlier ones whose beginning a later request may"
    " share. A single request may use more. Default: half of what the model leaves, at most 4G.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    metavar="N",
    help="The most requests that wait.",
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="The most requests that run at the same time.",
)
@click.option(
    "--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="The most time for a request."
)
@click.option(
    "--max-body", type=Size(), default="4M", show_default=True, metavar="SIZE", help="The most bytes of a request."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="The time for running requests to finish at the end.",
)
@running_options
@ram_option
@version_option("dg-serve")
def main(
    model: str | None,
    host: str,
    port: int,
    api_key: str | None,
    no_auth: bool,
    name: str | None,
    context: int | None,
    cache: int | None,
    queue: int,
    together: int,
    deadline: float | None,
    max_body: int,
    grace: float,
    **opening: Any,
) -> None:
    if MISSING:
        raise UsageError(f"dg-serve needs {MISSING.name}: pip install 'dgemma[serve]'")
    if api_key is not None and no_auth:
        raise click.UsageError("--api-key and --no-auth do not go together")
    if api_key is not None and (not api_key.strip() or api_key != api_key.strip()):
        raise click.UsageError("--api-key must not be empty, nor begin or end with a space")
    if api_key is None and not no_auth and not is_loopback(host):
        raise click.UsageError(f"--host {host} is beyond this machine: give --api-key KEY, or --no-auth")
    return_large_blocks()
    sockets = listen(host, port)
    with open_model(model, **opening) as opened:
        longest = context_of(opened, context)
        kept = cache_of(opened, longest, cache)
        limits = Limits(longest, kept, queue, together, max_body, deadline)
        server = Server(opened, limits, Guard(api_key, host, max_body), name)
        log_to_stderr()
        for at in sockets:
            address, number = at.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            url = f"http://{shown}:{number}"
            tell(
                f"dg-serve: {one_line(server.name)} at {url}, its API at {url}/v1, context {limits.context},"
                f" cache {size_text(kept)}"
            )
        Running(server, sockets, grace).serve_here()


def context_of(model: Model, wanted: int | None) -> int:
    most: int = model.config.context_length
    if wanted is not None and wanted > most:
        raise click.UsageError(f"--context {wanted} is more than the model's {most}")
    if wanted is not None:
        return wanted
    with model.session() as session:  # its context is what fits into the budget
        return session.context


def cache_of(model: Model, context: int, wanted: int | None) -> int:
    """Return the bytes for encoded prompts. Raises MemoryBudgetError for more than there is room for."""
    room = model.session_room()
    if room is None:
        return wanted or DEFAULT_CACHE
    if wanted is not None:
        if wanted > room:
            asked, most = size_text(wanted), size_text(room)
            raise MemoryBudgetError(
                f"--cache: {asked} is more than the {most} of memory that encoded prompts can take; give less, or leave"
                " it away"
            )
        return wanted
    mapped = model.memory.needs if model.ram is None else 0  # what the system keeps in memory where there is room
    short = model.session_bytes(min(context, SHORT))
    return min(DEFAULT_CACHE, max((room - mapped) // 2, min(short, room)))


if __name__ == "__main__":
    main()
