"""dg-run --chat: a conversation, one message and one answer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

from dgemma.chat.answer_parser import Delta
from dgemma.chat.conversation import Conversation, ConversationEvent, Reply
from dgemma.chat.template import no_template
from dgemma.cli import FAILURE
from dgemma.cli.answer import Watch
from dgemma.cli.commands import FILES, TABLE, run
from dgemma.cli.display import Silent, count, display, figures
from dgemma.cli.interrupts import StopOnCtrlC
from dgemma.cli.output import Speaker
from dgemma.cli.prompt_input import Lines, lines, unechoed
from dgemma.errors import Error, Stopped, UsageError
from dgemma.events import Block, Step
from dgemma.model import Model
from dgemma.options import Setting, new_seed
from dgemma.ui.terminal import one_line, tell


class Chat:
    """A chat whose messages are typed at a terminal, or are the lines of standard input."""

    def __init__(
        self,
        model: Model,
        settings: dict[str, Any],
        *,
        system: str | None = None,
        thinking: bool = False,
        visual: bool = False,
        quiet: bool = False,
    ) -> None:
        self.model = model
        self.settings: dict[str, Any] = {name: value for name, value in settings.items() if value is not None}
        self.visual = visual
        self.conversation = Conversation(model, system=system, thinking=thinking)
        self.lines: Lines = lines([(entry.name, entry.argument == FILES) for entry in TABLE.values()])
        self._quiet = quiet
        self._redraws = 0  # added to the seed that is set, for another answer to the same message
        self._seed = new_seed()
        self._changed = False  # whether settings were changed since the last answer
        self._answers: list[Reply] = []

    # ---- turns ----

    def run(self, first: str | None = None) -> int:
        """Read messages and answer them until the input ends; return an exit status."""
        failed = False
        if self.lines.interactive and not self._quiet:
            self.tell(f"{self.model.path} on {self.model.backend} · /help lists the commands, Ctrl-D leaves")
        if self.model.tokenizer.chat_template is None:
            self.tell("this file has no chat template: every message is a prompt of its own")
        with self.conversation:
            while True:
                try:
                    line, first = (first, None) if first is not None else (self.lines.read(), None)
                    if line.startswith("/"):
                        if not run(self, line):
                            break
                    elif line.strip():
                        self.say(line)
                except EOFError:
                    break
                except KeyboardInterrupt:
                    if not self.lines.interactive:
                        raise
                    self.tell("Ctrl-D or /quit leaves")
                except BrokenPipeError:
                    raise
                except (Error, OSError) as failure:
                    failed = True
                    self.tell(told(failure))
        return FAILURE if failed and not self.lines.interactive else 0

    def say(self, text: str) -> None:
        """Send a message, and show its answer."""
        self.conversation.say(text)
        self.answer()

    def answer(self, redraw: bool = False) -> None:
        """Answer the last message. redraw: use the next seed, or after a change of settings the same one."""
        if not redraw:
            self._redraws, self._seed = 0, new_seed()
        elif not self._changed:
            self._redraws += 1
        self._changed = False
        options = {**self.settings, "seed": self.seed}
        stopped = ""
        shown = display(self.visual, self._quiet)
        watch = Watch(self.model, int(self.used()["steps"]), shown)
        with unechoed(), shown, StopOnCtrlC(lambda: self.conversation.session.stop(), shown.stopping):
            try:
                with closing(self.conversation.stream(on_encode=shown.encoded, **options)) as events:
                    stopped = self._show(events, shown, watch)
            except Stopped:
                stopped = "Ctrl-C"
        if stopped == "Ctrl-C" and not self.lines.interactive:
            raise KeyboardInterrupt
        reply = self.conversation.last
        if reply is None:  # stopped before the answer began
            return
        if reply.result is not None:
            self._redraws += reply.result.seed - self.seed  # retries use further seeds
            self._answers.append(reply)
        if not self._quiet:
            self.tell(*self._figures(reply))
            if stopped == "loop":
                self.tell("it was a loop; /regenerate draws another, and with /max-tokens N it is let go on")

    def _show(self, events: Iterator[ConversationEvent], shown: Silent, watch: Watch) -> str:
        """Show an answer as it comes. Returns what ended it early: a "loop", or nothing."""
        looped = False
        with Speaker(shown, end_line=True) as speaker:
            for event in events:
                if isinstance(event, Step):
                    watch.step(event)
                elif isinstance(event, Block):
                    watch.block(event)
                    looped = event.fault == "loop" and "max_tokens" not in self.settings
                elif isinstance(event, Delta):
                    speaker.hear(event)
                if looped and isinstance(event, Step):  # the canvas with the loop is printed, the next one is not begun
                    return "loop"
        return ""

    # ---- settings ----

    @property
    def seed(self) -> int:
        """The seed of the last answer; before the first answer, of that one."""
        return (int(self.used()["seed"]) + self._redraws) % 2**64

    def used(self) -> dict[str, Setting]:
        """Return all generation options with their values."""
        return self.model.settings(**{"seed": self._seed, **self.settings})

    def change(self, settings: dict[str, Any]) -> None:
        """Change generation options. Raises UsageError or TypeError, and changes none, where a value is wrong."""
        changed = {**self.settings, **settings}
        self.model.settings(**changed)
        self.settings, self._changed = changed, True
        if "seed" in settings:
            self._redraws = 0

    def need_template(self, what: str) -> None:
        if self.model.tokenizer.chat_template is None:
            raise UsageError(no_template(f"{what} needs", f"{self.model.path} has none"))

    # ---- messages on standard error ----

    def tell(self, *lines: str) -> None:
        """Write lines on standard error; answers go to standard output."""
        for line in lines:
            tell(line, dim=True)

    def _figures(self, reply: Reply) -> list[str]:
        prompt = f"{reply.encoded} encoded, {reply.reused} reused"
        if reply.result is None:
            kept = (
                "what is above is kept" if reply.answer.text else "nothing was finished; /regenerate or /edit goes on"
            )
            return [f"stopped: {kept} · {prompt}"]
        line, *hints = figures(reply.result)
        if not reply.answer.text.strip() and not reply.answer.calls and not reply.result.fault:
            hints.append("an empty answer; /regenerate draws another")
        return [f"{line} · {prompt}", *(hint.replace("--", "/") for hint in hints)]  # in a chat the flags are commands

    def stats(self) -> list[str]:
        """Return the lines that /stats shows."""
        conversation, session = self.conversation, self.conversation.session
        lines = [
            f"{self.model.path} on {self.model.backend}, {count(self.model.threads, 'thread')}",
            f"{count(len(conversation.messages), 'message')}, thinking {'on' if conversation.thinking else 'off'}",
            f"cache: {session.length} tokens, room for {session.context} of the model's"
            f" {self.model.config.context_length}",
        ]
        if conversation.system is not None:
            lines.append(f"system: {conversation.system}")
        if conversation.last is not None:
            lines.append("last answer: " + self._figures(conversation.last)[0])
        results = [reply.result for reply in self._answers if reply.result is not None]
        if results:
            tokens, seconds = sum(len(r.ids) for r in results), sum(r.seconds for r in results)
            lines.append(
                f"{count(len(results), 'answer')}: {tokens} tokens, {count(sum(r.steps for r in results), 'step')},"
                f" {seconds:.2f} s; of their prompts {sum(r.encoded for r in self._answers)} tokens encoded and"
                f" {sum(r.reused for r in self._answers)} reused"
            )
        lines.append(" ".join(f"{name}={value}" for name, value in {**self.used(), "seed": self.seed}.items()))
        return lines


def told(failure: Error | OSError) -> str:
    """Return the message of an error in one line."""
    if isinstance(failure, Error):
        return one_line(str(failure))
    return one_line(f"{failure.filename or 'standard output'}: {failure.strerror or failure}")
