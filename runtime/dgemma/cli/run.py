"""dg-run: answers one prompt, runs a batch or a chat, fills or edits a text."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import click

from dgemma.chat.template import no_template
from dgemma.cli import WRONG_USAGE, Command, batch, version_option
from dgemma.cli.answer import Watch, as_object, reader_for, work
from dgemma.cli.display import display, figures
from dgemma.cli.files import STDIN, InputFile, ModelFile, OutputBeside, OutputFile, read_file, standard_input
from dgemma.cli.infill import Task, edit_options, fill_options
from dgemma.cli.interrupts import INTERRUPTED, StopOnCtrlC
from dgemma.cli.output import Speaker, say_json
from dgemma.cli.record.recorder import RECORDING, Recorder
from dgemma.cli.running import Size, open_model, ram_option, running_options, traffic_facts, traffic_line
from dgemma.errors import Stopped, UsageError
from dgemma.events import Result
from dgemma.files.output import check_target
from dgemma.files.routing import ROUTING, routing_path
from dgemma.hub.names import PREFIX
from dgemma.model import Model
from dgemma.native.metadata import keys
from dgemma.options import REFERENCE, SEED, Option, Setting, efforts, new_seed, options
from dgemma.session import Prompt

PUZZLE = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"

HELP = f"""Answers a prompt with a DiffusionGemma model.

MODEL is a GGUF file, or tidy or sudoku, which come with dgemma (a file of such a name is ./tidy), or
hf:owner/name[:TYPE]: a repository of the Hugging Face Hub, whose file of that type is downloaded once (pip install
'dgemma[hub]'). Without a TYPE it is the largest file that this machine can use (dg-info hf:owner/name --plan lists
them). Without a MODEL it is sudoku: its prompt is nine rows of nine characters, a dot for a blank, each row with a
newline behind it.

\b
  printf '%s\\n' {PUZZLE[:39]} \\
                {PUZZLE[40:]} | dg-run --visual
  dg-run model.gguf -p 'Why is the sky blue?'
  dg-run hf:unsloth/diffusiongemma-26B-A4B-it-GGUF:Q4_K_M -p 'Why is the sky blue?'
  dg-run model.gguf -f question.txt --think --max-tokens 1024 > answer.txt
  git diff | dg-run model.gguf --system 'Write a commit message.' --quiet
  dg-run model.gguf -p 'Once upon a time' --raw --seed 7 --json
  dg-run model.gguf --chat --system 'Be brief.'
  dg-run model.gguf --fill letter.txt                    # Dear [[...]], thank you for [[8]].
  dg-run model.gguf --edit notes.md --match 'teh cat' --instruct 'Correct the spelling.' --in-place

The prompt comes from -p, -f or standard input, and is used without any change. Where the file has a chat template, it
is one user message; with --raw, or without a template, the model continues its text.

Only the answer goes to standard output, each canvas as soon as it is finished. The model's thought before it is shown
dimmed on a terminal until it ends. Progress (on a terminal) and figures go to standard error. The exit status is 0 for
an answer, 1 for a failure, 2 for wrong usage, 130 after Ctrl-C.

With --chat the prompt, if there is one, is the first message; others are typed, or are the lines of standard input.
/help lists the commands. Each turn encodes only tokens that are not in the cache yet; the figures show how many.

{batch.HELP}"""

NOTHING_FINISHED = "stopped by Ctrl-C before a canvas was finished"

GUIDE = f"""dg-run needs a prompt. The model that comes with dgemma solves Sudoku: nine rows, a dot for a blank.

  printf '%s\\n' {PUZZLE} | dg-run --visual

With a model of yours: dg-run model.gguf -p 'Why is the sky blue?'     All about it: dg-run --help"""


def number(option: Option) -> Callable[[click.Context, click.Parameter, str | None], Setting | None]:
    """Return a callback of click that parses the value of a generation option and checks its range."""

    def read(ctx: click.Context, param: click.Parameter, value: str | None) -> Setting | None:
        try:
            return None if value is None else option.read(float(value) if option.real else int(value))
        except UsageError:
            raise click.BadParameter(f"{value} is not {option.range}", ctx, param) from None
        except ValueError:
            kind = "number" if option.real else "whole number"
            raise click.BadParameter(f"{value!r} is not a {kind}", ctx, param) from None

    return read


def one_effort(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Return the effort that --effort or --reference chose; a callback of click for both."""
    if value is not None and ctx.meta.setdefault("dgemma.effort", value) != value:
        raise click.UsageError("--effort and --reference both choose the settings; give one")
    chosen: str | None = ctx.meta.get("dgemma.effort")
    return chosen


def generation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add a flag for each line of options.def, and --effort and --reference for efforts.def."""
    levels = {name: effort for name, effort in efforts().items() if name != REFERENCE}
    sets = {name: f" ({effort})" if effort.settings else "" for name, effort in levels.items()}
    texts = "; ".join(f"{name}: {effort.help}{sets[name]}" for name, effort in levels.items())
    published = efforts()[REFERENCE]
    exactly = f"{sentence(published.help)}: the file’s settings, {published}; refuses other values of these."
    chosen: dict[str, Any] = dict(flag_value=REFERENCE, expose_value=False, callback=one_effort)
    command = click.option("--reference", "reference", **chosen, help=exactly)(command)
    chosen = dict(type=click.Choice(list(levels)), callback=one_effort)
    command = click.option("--effort", **chosen, help=f"{sentence(texts)}. Other flags win.")(command)
    defaults = {"max_tokens": "0", "seed": f"{SEED}, or a new one each time"}
    for name, option in reversed(options().items()):
        flag, metavar = "--" + name.replace("_", "-"), "F" if option.real else "N"
        if option.flag:
            command = click.option(flag, name, is_flag=True, default=None, help=sentence(option.help) + ".")(command)
            continue
        if option.choices:
            each = "; ".join(f"{choice}: {text}" for choice, text in option.choices.items())
            text = f"{sentence(option.help)}. {each}. Default: {next(iter(option.choices))}."
            command = click.option(flag, name, type=click.Choice(list(option.choices)), help=text)(command)
            continue
        default = defaults.get(name, "the file’s" if name in keys() else "0")
        text = f"{option.help}. {option.range.capitalize()}; default: {default}."
        command = click.option(flag, name, callback=number(option), metavar=metavar, help=sentence(text))(command)
    return command


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


@click.command(cls=Command, name="dg-run", help=HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("model", required=False, type=ModelFile())
@click.option("-p", "--prompt", "text", metavar="TEXT", help="The prompt.")
@click.option(
    "-f",
    "--file",
    "file",
    type=InputFile(),
    metavar="FILE",
    help="A file with the prompt; - is standard input.",
)
@click.option("--system", metavar="TEXT", help="A system message before the prompt. Needs a chat template.")
@click.option("--think", is_flag=True, help="Let the model think before it answers. Needs a chat template.")
@click.option("--raw", is_flag=True, help="Use no chat template: the model continues the text.")
@click.option("--chat", is_flag=True, help="Start a chat; /help in it lists the commands.")
@batch.batch_options
@fill_options
@edit_options
@generation_options
@running_options
@click.option(
    "--repack",
    type=Size(),
    metavar="SIZE",
    help="Memory (such as 4G or 500M) for copies of experts that are faster to read. The tokens stay the same.",
)
@ram_option
@click.option(
    "--save-routing",
    cls=OutputBeside,
    of="model",
    beside=routing_path,
    kind=ROUTING,
    help="Add to MODEL.routing.json how often each expert was chosen: with --ram the most chosen ones stay in memory.",
)
@click.option(
    "--visual",
    is_flag=True,
    help="Draw the canvas after each step, for at least 80 ms; on a terminal only. Accepted tokens are bright, the"
    " colour of the others shows their entropy.",
)
@click.option(
    "--record",
    "records",
    type=OutputFile(RECORDING),
    multiple=True,
    metavar="FILE",
    help="Record the canvas of all steps: .cast for asciinema, .svg, or .gif (needs Pillow). Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: answer, figures and settings.")
@click.option("--quiet", is_flag=True, help="Print neither progress nor figures.")
@click.option("--yes", is_flag=True, envvar="DGEMMA_YES", help="Ask nothing before a large download.")
@version_option("dg-run")
def main(
    model: str | None,
    text: str | None,
    file: str | None,
    system: str | None,
    think: bool,
    raw: bool,
    chat: bool,
    backend: str,
    threads: int | None,
    vram: int | None,
    exact: bool,
    repack: int | None,
    ram: int | str | None,
    save_routing: bool,
    visual: bool,
    records: tuple[Path, ...],
    as_json: bool,
    quiet: bool,
    yes: bool,
    **settings: Any,
) -> int | None:
    task = Task.take(settings)
    lines, output, restart = settings.pop("batch"), settings.pop("output"), settings.pop("restart")
    opening: dict[str, Any] = dict(backend=backend, threads=threads, exact=exact, repack=repack, ram=ram, vram=vram)
    if output is not None and lines is None:
        raise click.UsageError("-o belongs to --batch FILE")
    if restart and lines is None:
        raise click.UsageError("--restart belongs to --batch FILE")
    if lines is not None:
        if output is None:
            raise click.UsageError("--batch needs -o OUT, a file for the answers")
        others = dict(prompt=text is not None, file=file is not None, chat=chat, json=as_json, record=bool(records))
        refuse_beside("batch", task, **others, visual=visual)
        template_fields = {"system": system, "thinking": think or None, "raw": raw or None}
        path = chosen(model, ram, yes)
        with open_model(path, quiet=quiet, **opening) as opened, saving_routing(opened, save_routing):
            refuse_without_template(opened, system, think)
            return batch.run(opened, lines, output, quiet, restart, exact, **template_fields, **settings)
    if chat:
        refuse_beside("chat", task, raw=raw, record=bool(records), json=as_json)
        if file == "-":
            raise click.UsageError("-f - and --chat both read standard input")
        first = read_prompt(text, file) if text is not None or file is not None else None
        path = chosen(model, ram, yes)
        with open_model(path, quiet=quiet, **opening) as opened, saving_routing(opened, save_routing):
            refuse_without_template(opened, system, think)
            from dgemma.cli.chat import Chat

            return Chat(opened, settings, system=system, thinking=think, visual=visual, quiet=quiet).run(first)
    if task is None and text is None and file is None and standard_input().isatty():
        if model is None:
            click.echo(GUIDE, err=True)
            return WRONG_USAGE
        raise click.UsageError("no prompt: give -p TEXT, -f FILE or standard input")
    if raw and (system is not None or think):
        raise click.UsageError(f"{'--think' if think else '--system'} needs the chat template that --raw goes without")
    settings["seed"] = new_seed() if settings["seed"] is None else settings["seed"]
    recorders = [Recorder(path) for path in records]
    prompted = text is not None or file is not None
    if task is not None:
        task.check(prompted, stdin=file == "-", templated=system is not None or think)
    message = read_prompt(text, file) if task is None or prompted else None
    path = chosen(model, ram, yes)
    shown, stopped = display(visual, quiet), None
    with shown, StopOnCtrlC(acknowledge=shown.stopping), ExitStack() as stack:
        shown.doing(f"opening {path or 'sudoku'}")
        opened = stack.enter_context(open_model(path, quiet=quiet, aside=shown.aside, **opening))
        stack.enter_context(saving_routing(opened, save_routing))
        prompt = to_prompt(opened, message, system, think, raw) if message is not None else None
        used = opened.settings(**settings)
        watch = Watch(opened, int(used["steps"]), shown, recorders)
        if task is not None:
            done = task.run(opened, prompt, settings, on_step=watch.step, on_encode=shown.encoded)
            fields = {**done.facts(), "settings": used, "model": opened.path, **traffic_facts(opened)}
            try:
                with shown.aside():
                    if as_json:
                        say_json(fields)
                    else:
                        done.say()
            finally:
                done.write()
            lines = done.figures()
        else:
            assert prompt is not None
            reader = reader_for(opened, prompt, raw)
            try:
                with Speaker(shown, late=quiet) if not as_json else nullcontext() as speaker:
                    result: Result | None = work(opened, prompt, settings, reader, shown, watch, speaker)
            except Stopped as stop:
                stopped, result = stop, stop.result if stop.result and stop.result.blocks else None
            if as_json and result is not None:
                with shown.aside():
                    say_json(as_object(opened, result, reader, used))
            lines = figures(result) if result is not None else [NOTHING_FINISHED]
        lines += filter(None, [traffic_line(opened)])
    for recorder in recorders:
        recorder.write()
    if not quiet:
        for line in lines:
            click.echo(line, err=True)
    return None if stopped is None else INTERRUPTED


def chosen(model: str | None, ram: int | str | None, yes: bool) -> str | None:
    """Return the MODEL, or of a repository of the Hub without a type the file that fits this machine."""
    if model is None or not model.startswith(PREFIX):
        return model
    from dgemma.cli.which import choose  # which imports much, the converter among it

    return choose(model, "dg-run", ram, yes)


@contextmanager
def saving_routing(model: Model, wanted: bool) -> Iterator[None]:
    """Add the experts' counts of the block to MODEL.routing.json; whether that can be written is checked before."""
    if wanted:
        check_target(routing_path(model.path), ROUTING)
    yield
    if wanted:
        model.save_routing()


def read_prompt(text: str | None, file: str | None) -> str:
    """Return the prompt's text; bytes that are not UTF-8 become U+FFFD."""
    if text is not None and file is not None:
        raise click.UsageError("-p and -f both give a prompt; give one")
    data = os.fsencode(text) if text is not None else read_file(file or STDIN)
    if not data:
        source = "-p" if text is not None else file if file not in (None, "-") else "standard input"
        raise click.UsageError(f"empty prompt: {source} holds nothing")
    return data.decode("utf-8", "replace")


def to_prompt(model: Model, message: str, system: str | None, think: bool, raw: bool) -> Prompt:
    """Return the prompt for a message: its text, or with a chat template the ids of a chat."""
    refuse_without_template(model, system, think)
    if raw or model.tokenizer.chat_template is None:
        return message
    messages = [{"role": "user", "content": message}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return model.tokenizer.chat(messages, thinking=think)


def refuse_without_template(model: Model, system: str | None, think: bool) -> None:
    if model.tokenizer.chat_template is None:
        for flag, given in (("--system", system is not None), ("--think", think)):
            if given:
                raise click.UsageError(no_template(f"{flag} needs", f"{model.path} has none"))


def refuse_beside(what: str, task: Task | None, **flags: bool) -> None:
    given = {name: getattr(task, name, None) is not None for name in ("fill", "canvas", "edit")}
    for flag, wrong in {**flags, **given}.items():
        if wrong:
            raise click.UsageError(f"--{flag} and --{what} do not go together")


if __name__ == "__main__":
    main()
