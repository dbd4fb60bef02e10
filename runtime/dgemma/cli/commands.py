"""The commands of a chat, such as /save, in one table. The list of /help and Tab completion are made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from dgemma.cli.files import MOST, open_streams
from dgemma.errors import UsageError
from dgemma.files.json_lines import as_bytes, value
from dgemma.files.output import check_distinct, check_target, json_kind, write_whole
from dgemma.files.regular import read_regular
from dgemma.options import Option, efforts, options

if TYPE_CHECKING:
    from dgemma.cli.chat import Chat

Action: TypeAlias = Callable[["Chat", str], bool | None]  # str: the text behind the command; False ends the chat

FILES = "FILE"

KEPT = ("messages", "thinking", "settings")
CHAT = json_kind("a saved chat", *KEPT)
PLAIN_ROLES = ("user", "assistant", "model")  # roles whose messages need no chat template


@dataclass(frozen=True, slots=True)
class Entry:
    """A command of a chat."""

    name: str  # with its slash
    argument: str  # the kind of text that may follow, in capitals for /help; "" for none
    help: str
    action: Action


TABLE: dict[str, Entry] = {}


def command(name: str, argument: str, text: str) -> Callable[[Action], Action]:
    def add(action: Action) -> Action:
        TABLE[name] = Entry(name, argument, text, action)
        return action

    return add


def run(chat: Chat, line: str) -> bool:
    """Run the command in a line that begins with a slash. Returns whether the chat goes on."""
    name, _, argument = line.partition(" ")
    entry = TABLE.get(name.strip())
    if entry is None:
        raise UsageError(f"there is no {name.strip()}; /help lists what there is")
    argument = argument.strip()
    if argument and not entry.argument:
        raise UsageError(f"{entry.name} takes nothing behind it, not {argument!r}")
    return entry.action(chat, argument) is not False


@command("/help", "", "this list")
def _help(chat: Chat, _: str) -> None:
    width = max(len(f"{entry.name} {entry.argument}") for entry in TABLE.values())
    for entry in TABLE.values():
        chat.tell(f"{f'{entry.name} {entry.argument}':<{width}}  {entry.help}")
    chat.tell(
        "A message that begins with / is sent with a space before it. A backslash at the end of a line goes on with"
    )
    chat.tell("another, as Alt-Enter does. Ctrl-C stops an answer within a step and keeps its finished canvases.")


@command("/edit", "TEXT", "replace the last message; without TEXT it is put on the input line, to be edited")
def _edit(chat: Chat, text: str) -> None:
    last = next((m for m in reversed(chat.conversation.messages) if m["role"] == "user"), None)
    if last is None:
        raise UsageError("/edit: nothing was said yet")
    if not text:
        if not chat.lines.interactive:
            raise UsageError("/edit needs the new text behind it here")
        text = chat.lines.read(default=str(last["content"]))
    if text.strip():
        chat.conversation.unanswer()
        chat.say(text)


@command(
    "/regenerate",
    "",
    "another answer to the last message, with the next seed, or after a change of settings with the same seed",
)
def _regenerate(chat: Chat, _: str) -> None:
    if not chat.conversation.unanswer():
        raise UsageError("/regenerate: nothing was said yet")
    chat.answer(redraw=True)


@command("/system", "TEXT", "the system message from now on; without TEXT there is none")
def _system(chat: Chat, text: str) -> None:
    chat.need_template("/system")
    chat.conversation.system = text or None


@command("/think", "", "turn thinking before answers on or off")
def _think(chat: Chat, _: str) -> None:
    chat.need_template("/think")
    chat.conversation.thinking = not chat.conversation.thinking
    chat.tell(f"thinking is {'on' if chat.conversation.thinking else 'off'}")


@command("/thought", "", "show the last answer's thought in full")
def _thought(chat: Chat, _: str) -> None:
    reply = chat.conversation.last
    chat.tell(reply.answer.thinking.strip() if reply and reply.answer.thinking.strip() else "there is no thought")


@command("/visual", "", "turn drawing of the canvas during generation on or off")
def _visual(chat: Chat, _: str) -> None:
    chat.visual = not chat.visual
    chat.tell(f"the canvas is {'drawn' if chat.visual else 'not drawn'}")


def _option(option: Option) -> Action:
    def change(chat: Chat, text: str) -> None:
        if not text:
            chat.tell(f"{option.name} is {chat.used()[option.name]}")
            return
        value: Any = {"on": True, "off": False}.get(text) if option.flag else text
        try:
            value = value if option.flag or option.choices else float(text) if option.real else int(text)
            chat.change({option.name: option.read(value)})
        except (TypeError, ValueError):
            kind = "on or off" if option.flag else "a number" if option.real else "a whole number"
            raise UsageError(f"/{option.name.replace('_', '-')} takes {kind}, not {text!r}") from None

    return change


for _each in options().values():
    _takes = "on|off" if _each.flag else "NAME" if _each.choices else "F" if _each.real else "N"
    command("/" + _each.name.replace("_", "-"), _takes, _each.help)(_option(_each))


@command("/effort", "NAME", f"settings by a name: {', '.join(efforts())}; others that are set win")
def _effort(chat: Chat, name: str) -> None:
    if not name:
        chat.tell(f"effort is {chat.settings.get('effort', 'not set')}")
        return
    chat.change({"effort": name})


@command("/stats", "", "figures of the last answer, of all answers, and of the cache")
def _stats(chat: Chat, _: str) -> None:
    for line in chat.stats():
        chat.tell(line)


@command("/save", FILES, "save messages and settings as JSON")
def _save(chat: Chat, name: str) -> None:
    path = path_of("/save", name)
    conversation = chat.conversation
    kept = dict(zip(KEPT, (conversation.messages, conversation.thinking, chat.settings), strict=True))
    check_distinct([("/save", path)], [("the model", chat.model.path), *open_streams()])
    check_target(path, CHAT)
    write_whole(path, as_bytes(kept, indent=1), CHAT)
    chat.tell(f"{len(conversation.messages)} messages in {path}")


@command("/load", FILES, "load messages and settings that /save wrote")
def _load(chat: Chat, name: str) -> None:
    path = path_of("/load", name)
    messages, thinking, settings = saved(path)
    try:
        if messages:
            chat.model.tokenizer.read(messages)
        if thinking or any(message["role"] not in PLAIN_ROLES for message in messages):
            chat.need_template("thinking, or what is said by neither user nor assistant,")
        chat.change(settings)
    except (TypeError, UsageError) as failure:
        raise UsageError(f"{path}: {failure}") from None
    chat.conversation.messages[:] = messages
    chat.conversation.thinking = thinking
    chat.conversation.last = None
    chat.tell(f"{len(messages)} messages from {path}")


@command("/clear", "", "forget the messages, but not the system message")
def _clear(chat: Chat, _: str) -> None:
    conversation = chat.conversation
    del conversation.messages[1 if conversation.system is not None else 0 :]
    conversation.last = None


@command("/quit", "", "leave; so does Ctrl-D")
def _quit(chat: Chat, _: str) -> bool:
    return False


def path_of(command: str, name: str) -> Path:
    """Return the path of the file that a command gets. Raises UsageError for a name that cannot be one."""
    if not name:
        raise UsageError(f"{command} needs a file's name")
    if "\0" in name:
        raise UsageError(f"{command}: a file's name cannot hold a null character")
    try:
        return Path(name).expanduser()
    except RuntimeError:
        raise UsageError(f"{command} {name}: there is no such user") from None


def saved(path: Path) -> tuple[list[dict[str, Any]], bool, dict[str, Any]]:
    """Read the messages, whether to think, and the settings of a file that /save wrote.

    Raises UsageError for another file.
    """
    data = read_regular(path, MOST + 1)
    try:
        kept = value(data, "it") if len(data) <= MOST else {}
        messages, thinking, settings = (kept.pop(name) for name in KEPT)
        good = not kept and isinstance(messages, list) and isinstance(thinking, bool) and isinstance(settings, dict)
        good = good and all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages)
    except (UsageError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise UsageError(f"{path} holds no chat that /save kept")
    return messages, thinking, settings
