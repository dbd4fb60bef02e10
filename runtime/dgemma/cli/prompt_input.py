"""Sources of a chat's messages: an editable line at a terminal, or the lines of standard input."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from dgemma.cli.files import standard_input
from dgemma.ui.terminal import is_terminal

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completion

PROMPT, MORE = "> ", ". "


class CtrlC:
    """A context in which Ctrl-C sets `heard` instead of an exception.

    then: called at each Ctrl-C. Without it, a second Ctrl-C raises KeyboardInterrupt.
    """

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        self.heard = False
        self._then = then
        self._before: Any = None

    def __enter__(self) -> CtrlC:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        before, self.heard = self.heard, True
        if self._then is not None:
            self._then()
        elif before:
            raise KeyboardInterrupt


class Lines(Protocol):
    """The source of a chat's messages."""

    interactive: bool  # whether messages are typed at a terminal

    def read(self, default: str = "") -> str:
        """Return the next message, which may have several lines. Raises EOFError after the last."""


class Piped:
    """Reads messages from lines of standard input; a backslash at the end of a line continues it on the next."""

    interactive = False

    def read(self, default: str = "") -> str:
        parts: list[str] = []
        while True:
            data = standard_input().buffer.readline()
            if not data and not parts:
                raise EOFError
            line = data.decode("utf-8", "replace").rstrip("\r\n")
            if not data or not line.endswith("\\"):
                return "\n".join([*parts, line])
            parts.append(line[:-1])


class Typed:
    """Reads lines that can be edited, by prompt_toolkit.

    Enter sends a message; Alt-Enter, or a backslash before Enter, begins a new line in it; the arrow keys go through
    earlier messages; Tab completes commands and file names.
    """

    interactive = True

    def __init__(self, commands: Sequence[tuple[str, bool]]) -> None:
        """Prepare the input line. commands: (name, whether it takes a file) of each command."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
        from prompt_toolkit.output import create_output

        keys = KeyBindings()

        @keys.add("enter")
        @keys.add("c-j")  # what Enter sends if it is pressed while an answer is generated
        def send(event: Any) -> None:
            buffer = event.current_buffer
            if buffer.document.char_before_cursor == "\\":
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter")
        @keys.add("escape", "c-j")
        def begin_another(event: Any) -> None:
            event.current_buffer.insert_text("\n")

        self._session: PromptSession[str] = PromptSession(
            history=InMemoryHistory(),
            key_bindings=keys,
            multiline=True,
            prompt_continuation=MORE,
            completer=_completer(commands),
            complete_while_typing=False,
            output=create_output(sys.stderr if sys.stderr.isatty() else sys.stdout),
        )

    def read(self, default: str = "") -> str:
        application = self._session.app

        def interrupt() -> None:
            if application.loop is not None:
                application.loop.call_soon_threadsafe(application.key_processor.send_sigint)

        def started() -> None:
            if ctrl_c.heard:  # Ctrl-C was pressed before the event loop ran
                application.exit(exception=KeyboardInterrupt())

        with CtrlC(interrupt) as ctrl_c:  # a KeyboardInterrupt while asyncio starts would leave its objects half made
            line = self._session.prompt(PROMPT, default=default, pre_run=started, handle_sigint=False)
        if ctrl_c.heard:
            raise KeyboardInterrupt
        return line


def _completer(commands: Sequence[tuple[str, bool]]) -> Any:
    from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    files = {name for name, takes_file in commands if takes_file}
    paths = PathCompleter(expanduser=True)

    class Commands(Completer):
        def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if not space:
                for known, _ in commands:
                    if text and known.startswith(text):
                        yield Completion(known, -len(text))
            elif name in files:
                yield from paths.get_completions(Document(rest), event)

    return Commands()


@contextmanager
def unechoed() -> Iterator[None]:
    """Hide what is typed during the block; the next input line gets it. Ctrl-C works as usual."""
    try:
        import termios
    except ImportError:  # another kind of system
        yield
        return
    if sys.stdin is None or not sys.stdin.isatty():
        yield
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    silent = list(before)
    silent[3] &= ~termios.ECHO
    try:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, silent)
        yield
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def lines(commands: Sequence[tuple[str, bool]]) -> Lines:
    """Return Typed where standard input is a terminal, otherwise Piped."""
    if standard_input().isatty() and (is_terminal(sys.stderr) or is_terminal(sys.stdout)):
        return Typed(commands)
    return Piped()
