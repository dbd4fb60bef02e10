"""The commands. They share this module's exit statuses, error messages and handling of signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import click

from dgemma.cli.files import check_files
from dgemma.cli.streams import fail_on_closed_stdout, show_any_text
from dgemma.errors import Error, UsageError
from dgemma.hub.download import remember_refusals
from dgemma.ui.terminal import one_line, tell

FAILURE, WRONG_USAGE, INTERRUPTED = 1, 2, 130


class Command(click.Command):
    """A command that exits with 0, 1 (failure), 2 (wrong usage) or 130 (Ctrl-C); an error is one line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        check_files(self, ctx.params)
        with remember_refusals():
            return super().invoke(ctx)

    def main(self, *args: Any, **extra: Any) -> NoReturn:
        extra["standalone_mode"] = False
        name = str(extra.setdefault("prog_name", self.name))
        try:
            fail_on_closed_stdout()
            show_any_text()
            handle_end_signals()
            code = super().main(*args, **extra)
            sys.stdout.flush()
            sys.exit(code if isinstance(code, int) else 0)
        except (click.Abort, KeyboardInterrupt):
            sys.exit(INTERRUPTED)
        except BrokenPipeError:  # the reader of standard output has gone; Python's flush at exit must not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILURE)
        except click.ClickException as failure:
            end(name, failure.format_message(), failure.exit_code)
        except UsageError as failure:
            end(name, str(failure), WRONG_USAGE)
        except Error as failure:
            end(name, str(failure), FAILURE)
        except OSError as failure:
            end(name, f"{failure.filename or 'standard output'}: {failure.strerror or failure}", FAILURE)
        except MemoryError:
            end(name, "out of memory", FAILURE)
        except Exception as failure:
            end(name, f"internal error, please report it: {type(failure).__name__}: {failure}", FAILURE)


def handle_end_signals() -> None:
    """Let SIGTERM and SIGHUP (a closed terminal) end the command as Ctrl-C does: by an exception.

    So half-written files are removed.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for each in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        if signal.getsignal(each) is signal.SIG_DFL:  # signals that nohup or a shell's trap ignores stay ignored
            signal.signal(each, lambda number, _: sys.exit(128 + number))
    sys.unraisablehook = resend_signal


def resend_signal(unraisable: Any) -> None:
    """Send a signal again whose exception Python dropped; a function for sys.unraisablehook.

    If a signal arrives while a finalizer runs, its exception is raised there, and Python drops it. The signal is then
    sent again a moment later.
    """
    exception = unraisable.exc_value
    if isinstance(exception, KeyboardInterrupt):
        number: int = signal.SIGINT
    elif isinstance(exception, SystemExit) and isinstance(exception.code, int) and exception.code > 128:
        number = exception.code - 128
    else:
        sys.__unraisablehook__(unraisable)
        return
    again = threading.Timer(0.01, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


def version_option(name: str) -> Callable[[Any], Any]:
    """Return the option --version for the command `name`."""

    def say(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
        if wanted:
            import dgemma

            click.echo(f"{name} {dgemma.__version__}")
            ctx.exit()

    more: dict[str, Any] = dict(is_flag=True, is_eager=True, expose_value=False, callback=say)
    return click.option("--version", **more, help="Print the version.")


def end(name: str, message: str, code: int) -> NoReturn:
    """Print an error in one line and exit."""
    tell(f"{name}: {one_line(message)}")
    sys.exit(code)
