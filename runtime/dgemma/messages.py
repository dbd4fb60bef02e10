"""Messages and tools of any origin in the form that chat templates know. What is not understood is refused by name.

Origins: OpenAI's chats (parts of content, arguments of calls as JSON text, the role developer, null where nothing is),
also as the objects of its Python client; and the templates' own form (arguments as dicts, tool_responses, thinking).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn, TypeAlias

from dgemma import json_lines
from dgemma.errors import UsageError

Plain: TypeAlias = dict[str, Any]
_Refuse: TypeAlias = Callable[[str, str], NoReturn]  # of a field, with what is wrong

# What becomes of a role.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "model",  # an assistant, as Gemma's templates write it
    "tool": "tool",
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing; templates read the first two
TEXTS = ("name", "tool_call_id", *REASONING)
GIVEN_ON = (*TEXTS, "tool_responses")
READ = ("role", "content", "refusal", "tool_calls")
OURS = ("diffusion",)  # figures in the answers of dg-serve


def is_message(value: Any) -> bool:
    """Whether it may be a message, an object of a client included."""
    return isinstance(value, Mapping) or callable(getattr(value, "model_dump", None)) or _is_record(value)


def read(
    messages: Any, known: str | None = None, *, reads_parts: Callable[[str], bool] = lambda role: False
) -> list[Plain]:
    """The messages as a template is given them. Raises UsageError, whose place is that of a message.

    known: the text of the template: fields that it speaks of may be given beside those of every chat.
    reads_parts: whether it writes content that is a list of parts, by role; else the parts are joined.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of {{role, content}}, not {_kind(messages)}")
    if not messages:
        raise UsageError("no messages: a chat template needs a user message to answer")
    names: dict[str, str] = {}  # of the tools, by the ids of their calls
    return [_message(message, at, names, known or "", reads_parts) for at, message in enumerate(messages)]


def read_tools(tools: Any) -> list[Plain] | None:
    """The tools, each as {"type": "function", "function": {...}}. Raises UsageError."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise UsageError(f"tools must be a list of functions, not {_kind(tools)}")
    return [_tool(plain(tool), at) for at, tool in enumerate(tools)]


def text_of(message: Mapping[str, Any]) -> str:
    """The text of a message that was read."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def plain(value: Any) -> Any:
    """Dicts and lists instead of what is like them: other mappings and sequences, records, the objects of clients.
    Raises UsageError for what is nested too deeply.
    """
    try:
        return _plain(value)
    except RecursionError:
        raise UsageError("nested too deeply to be messages or tools") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return [_plain(item) for item in value]
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    if _is_record(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    return value


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _message(given: Any, at: int, names: dict[str, str], known: str, reads_parts: Callable[[str], bool]) -> Plain:
    def refuse(field: str, problem: str) -> NoReturn:
        raise UsageError(f"messages[{at}]: {problem}", ".".join(filter(None, ("messages", str(at), field))))

    try:
        message = plain(given)
    except UsageError as problem:
        refuse("", str(problem))
    if not isinstance(message, dict):
        refuse("", f"expected {{role, content}}, found {_kind(given)}")
    role = _role(message.get("role"), refuse)
    made = _given_on(message, known, refuse)
    calls = [_call(call, i, refuse) for i, call in enumerate(_list(message, "tool_calls", refuse))]
    assistant = role in ("assistant", "model")
    if calls and not assistant:
        refuse("tool_calls", f"only an assistant calls tools, not the role {role}")
    texts = _texts(message.get("content"), role, refuse) + _refusal(message.get("refusal"), refuse)
    instead = ("tool_responses", *REASONING) if assistant else ("tool_responses",)
    if not texts and not calls and not any(key in made for key in instead):
        refuse("content", f"the {role} message has no content")
    joined = len(texts) <= 1 or not reads_parts(role)
    made["content"] = "".join(texts) if joined else [{"type": "text", "text": text} for text in texts]
    if calls:
        made["tool_calls"] = calls
        names.update({call["id"]: call["function"]["name"] for call in calls if "id" in call})
    if role == "tool" and "tool_call_id" in made:
        if made["tool_call_id"] not in names:
            refuse("tool_call_id", f"no call before has this tool_call_id, {made['tool_call_id']!r}")
        made.setdefault("name", names[made["tool_call_id"]])
    return _with_reasoning({"role": role, **made})


def _given_on(message: Plain, known: str, refuse: _Refuse) -> Plain:
    """The fields that templates are given as they are; what is null or empty says nothing."""
    made: Plain = {}
    for key, value in message.items():
        if key in READ or key in OURS or _empty(value):
            continue
        if key not in GIVEN_ON and not re.search(rf"\b{re.escape(str(key))}\b", known):
            refuse(str(key), f"unknown field {key!r}; a message has {', '.join((*READ, *GIVEN_ON))}")
        if key in TEXTS and not isinstance(value, str):
            refuse(key, f"{key} must be text, not {_kind(value)}")
        made[key] = value
    for response in _list(made, "tool_responses", refuse):
        if not isinstance(response, dict) or "response" not in response:
            refuse("tool_responses", "a tool's response is {name, response}")
    return made


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _with_reasoning(message: Plain) -> Plain:
    """Reasoning under the names that templates read, as transformers gives it."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _role(role: Any, refuse: _Refuse) -> str:
    if role is None:
        refuse("role", "it has no role")
    if not isinstance(role, str) or role not in ROLES:
        refuse("role", f"unknown role {str(role)[:40]}; the roles are {', '.join(ROLES)}")
    return ROLES[role]


def _list(message: Plain, field: str, refuse: _Refuse) -> list[Any]:
    found = message.get(field)
    if found is not None and not isinstance(found, list):
        refuse(field, f"{field} must be a list, not {_kind(found)}")
    return found or []


def _texts(content: Any, role: str, refuse: _Refuse) -> list[str]:
    """The text of each part; none where there is no content."""
    if content is None:
        return []
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        refuse("content", f"the content of the {role} message must be text or a list of parts, not {_kind(content)}")
    return [_part(part, f"part {i} of the {role} message", i, refuse) for i, part in enumerate(content)]


def _part(part: Any, name: str, at: int, refuse: _Refuse) -> str:
    field = f"content.{at}"
    if not isinstance(part, dict):
        refuse(field, f"{name} must be {{type, text}}, not {_kind(part)}")
    kind = part.get("type", "text")
    if kind not in ("text", "refusal"):
        refuse(field, f"{name} is of type {kind}; this model is given text alone")
    for key, value in part.items():
        if key not in ("type", kind) and not _empty(value):
            refuse(field, f"{name} has the unknown field {key!r}")
    if not isinstance(part.get(kind), str):
        refuse(field, f"{name} has no text")
    return str(part[kind])


def _refusal(refusal: Any, refuse: _Refuse) -> list[str]:
    """What an assistant said instead of an answer is what it said."""
    if refusal is not None and not isinstance(refusal, str):
        refuse("refusal", f"refusal must be text, not {_kind(refusal)}")
    return [refusal] if refusal else []


def _call(call: Any, at: int, refuse: _Refuse) -> Plain:
    field = f"tool_calls.{at}"
    if not isinstance(call, dict):
        refuse(field, f"call {at} must be {{type, function}}, not {_kind(call)}")
    if call.get("type") not in (None, "function"):
        refuse(field, f"call {at} is of type {call['type']}; only functions are called")
    function = call.get("function", call if "arguments" in call else None)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        refuse(field, f"call {at} names no function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json_lines.value(arguments, "the text") if arguments.strip() else {}
        except UsageError as problem:
            refuse(field, f"the arguments of call {at} are no JSON object: {problem}")
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        refuse(field, f"the arguments of call {at} are no JSON object")
    made: Plain = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _tool(tool: Any, at: int) -> Plain:
    def refuse(problem: str) -> NoReturn:
        raise UsageError(f"tools[{at}]: {problem}")

    if not isinstance(tool, dict):
        refuse(f"expected {{type, function}}, found {_kind(tool)}")
    if "function" not in tool and "name" in tool:  # a function by itself
        tool = {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}}
    if tool.get("type", "function") != "function":
        refuse(f"it is of type {tool['type']}; only functions are called")
    function = tool.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        refuse("it names no function")
    for name, kind, what in (("description", str, "text"), ("parameters", dict, "a JSON schema")):
        if function.get(name) is not None and not isinstance(function[name], kind):
            refuse(f"{name} must be {what}, not {_kind(function[name])}")
    if function.get("strict"):
        refuse("strict is true, and nothing enforces a schema")
    given = {key: value for key, value in function.items() if value is not None and key != "strict"}
    return {**tool, "type": "function", "function": given}
