"""dg-serve: an OpenAI-compatible server for one model."""

from __future__ import annotations

from typing import Any

import click

from dgemma.cli import Command, version_option
from dgemma.cli.files import ModelFile
from dgemma.cli.running import Size, ram_option, running_options
from dgemma.errors import UsageError
from dgemma.model import Model
from dgemma.ui.terminal import one_line, tell
from dgemma.units import size_text

try:
    from dgemma.serve.app import Limits, Server
    from dgemma.serve.auth import Guard, is_loopback
    from dgemma.serve.edits import EditDiffusion
    from dgemma.serve.lifecycle import Running, listen, log_to_stderr, return_large_blocks
    from dgemma.serve.parameters import told
    from dgemma.serve.requests import Diffusion
except ImportError as missing:  # the command names the package when it runs
    MISSING: ImportError | None = missing
else:
    MISSING = None

DEFAULT_CONTEXT = 8192


def indented(text: str) -> str:
    return "\b\n" + "\n".join("  " + line for line in text.splitlines())


def own_fields() -> str:
    """Return our own fields of requests, a line each."""
    fields = {**Diffusion.model_fields, **EditDiffusion.model_fields}
    return "\n".join(f"{name:<18}{field.description}" for name, field in fields.items())


def help_text() -> str:
    parameters = (
        ""
        if MISSING
        else f"""\b
Parameters of requests:
{indented(told())[2:]}

\b
Fields of "diffusion" in requests:
{indented(own_fields())[2:]}
"""
    )
    return f"""Serves a DiffusionGemma model: a page at /, to chat, watch the canvas settle and have texts edited;
and OpenAI's API: /v1/chat/completions, /v1/completions and /v1/edits (a passage of a text, rewritten in place),
streaming or not, /v1/models, /health and /metrics (for Prometheus).

MODEL is a GGUF file, or tidy or sudoku, which come with dgemma, or hf:owner/name[:TYPE]. Without one, sudoku is served.

\b
  dg-serve model.gguf                                  # then open http://127.0.0.1:8080
  curl http://127.0.0.1:8080/v1/chat/completions -H 'Content-Type: application/json' \\
       -d '{{"model": "model", "messages": [{{"role": "user", "content": "Why is the sky blue?"}}]}}'

It listens on this machine alone unless --host says otherwise, and then needs --api-key (or DGEMMA_API_KEY) or
--no-auth. Requests take turns, step by step; those that find the queue full get 429. A request that begins as an
earlier one did encodes only what is new. Ctrl-C finishes what is at work, within --grace.

{parameters}"""


@click.command(cls=Command, name="dg-serve", help=help_text(), context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False, type=ModelFile())
@click.option("--host", default="127.0.0.1", metavar="ADDRESS", help="Where to listen.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, metavar="N", help="0: any free one."
)
@click.option("--api-key", metavar="KEY", envvar="DGEMMA_API_KEY", help="What clients must bring; also DGEMMA_API_KEY.")
@click.option("--no-auth", is_flag=True, help="Serve beyond this machine without a key.")
@click.option("--name", metavar="NAME", help="The model's id. Default: the file's name.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Most tokens of a prompt and its answer. Default: the model's, at most {DEFAULT_CONTEXT}.",
)
@click.option(
    "--cache",
    type=Size(),
    metavar="SIZE",
    default="4G",
    show_default=True,
    help="Memory for what was encoded: requests at work, and beginnings that later ones may share. A request that is"
    " alone is served whatever it takes.",
)
@click.option(
    "--queue", type=click.IntRange(min=1), default=64, show_default=True, metavar="N", help="Most requests that wait."
)
@click.option(
    "--together",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    metavar="N",
    help="Most requests that take turns.",
)
@click.option(
    "--deadline", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS", help="Most that a request may take."
)
@click.option(
    "--max-body", type=Size(), default="4M", show_default=True, metavar="SIZE", help="Most bytes of a request."
)
@click.option(
    "--grace",
    type=click.FloatRange(min=0),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="For what is at work at the end.",
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
    cache: int,
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
    with Model(model, **opening) as opened:
        limits = Limits(context_of(opened, context), cache, queue, together, max_body, deadline)
        server = Server(opened, limits, Guard(api_key, host, max_body), name)
        log_to_stderr()
        for at in sockets:
            address, number = at.getsockname()[:2]
            shown = f"[{address}]" if ":" in address else address
            url = f"http://{shown}:{number}"
            tell(
                f"dg-serve: {one_line(server.name)} at {url}, its API at {url}/v1, context {limits.context},"
                f" cache {size_text(cache)}"
            )
        Running(server, sockets, grace).serve_here()


def context_of(model: Model, wanted: int | None) -> int:
    most: int = model.config.context_length
    if wanted is not None and wanted > most:
        raise click.UsageError(f"--context {wanted} is more than the model's {most}")
    if wanted is not None or (model.ram is None and model.vram is None):
        return wanted or min(most, DEFAULT_CONTEXT)
    with model.session() as session:  # the context that a budget leaves room for
        return session.context


if __name__ == "__main__":
    main()
