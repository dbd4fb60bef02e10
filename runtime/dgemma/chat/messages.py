"""Converts messages and tools into the form that chat templates read; a field that is not understood is refused.

Two forms are understood: that of OpenAI's API (parts of content, arguments of calls as JSON text, the role developer,
null for an absent field), also as objects of its Python client; and that of the templates themselves (arguments as
dicts, tool_responses, thinking).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence, Set
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NoReturn, TypeAlias

from dgemma.errors import UsageError
from dgemma.files import json_lines

JsonObject: TypeAlias = dict[str, Any]
_Refuse: TypeAlias = Callable[[str, str], NoReturn]  # raises UsageError for a field; arguments: its name, the problem

# The role that a template is given for each role.
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "model",  # an assistant, as Gemma's templates write it
    "tool": "tool",
}
REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # three names of the same field; templates read the first two
TEXT_FIELDS = ("name", "tool_call_id", *REASONING)
PASSED_FIELDS = (*TEXT_FIELDS, "tool_responses")
KNOWN_FIELDS = ("role", "content", "refusal", "tool_calls")
OUR_FIELDS = ("diffusion",)  # figures in the answers of dg-serve; ignored when an answer comes back as a message
ASSISTANT = ("assistant", "model")
# The roles whose messages may have a field; a field that is not here may be in any message.
ROLES_OF_FIELD = {
    **dict.fromkeys(("refusal", "tool_calls", *REASONING), ASSISTANT),
    "tool_responses": (*ASSISTANT, "tool"),
    "tool_call_id": ("tool",),
}
# Names that are refused as fields of messages, even where a template reads them: the model understands only text, in
# content, and the other names here are fields of parts, tools and calls.
REFUSED_FIELDS = {
    *("image", "images", "image_url", "audio", "input_audio", "video", "videos", "file", "files"),
    *("text", "parts", "type", "function", "function_call", "arguments", "parameters"),
}
WHOLE_MESSAGE = "*"  # stands for all fields: the template writes the whole message; template_fields.py has it too


def is_message(value: Any) -> bool:
    """Return whether a value may be a message; objects of OpenAI's client may be."""
    return isinstance(value, Mapping) or callable(getattr(value, "model_dump", None)) or _is_record(value)


def read(
    messages: Any, known: Set[str] | None = None, *, reads_parts: Callable[[str], bool] = lambda role: False
) -> list[JsonObject]:
    """Return the messages in the form that templates read. Raises UsageError, with the place of the wrong field.

    known: the fields of messages that the template reads (see template.reads). Other fields are refused, because the
    template would leave them out. None: no template is known, and the usual fields are allowed.
    reads_parts: whether the template can write content that is a list of parts, for a role; otherwise the parts are
    joined to one text.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UsageError(f"messages must be a list of {{role, content}}, not {_kind(messages)}")
    if not messages:
        raise UsageError("no messages: a chat template needs a user message to answer")
    calls = _Calls()
    return [_message(message, at, calls, known, reads_parts) for at, message in enumerate(messages)]


def read_tools(tools: Any) -> list[JsonObject] | None:
    """Return the tools, each as {"type": "function", "function": {...}}. Raises UsageError."""
    if tools is None:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise UsageError(f"tools must be a list of functions, not {_kind(tools)}")
    return [_tool(plain(tool), at) for at, tool in enumerate(tools)]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the text of a message that read() returned."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def plain(value: Any) -> Any:
    """Return a value with plain dicts and lists in place of other mappings, sequences, dataclasses and client objects.

    Raises UsageError where it is nested too deeply.
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


@dataclass
class _Calls:
    """The calls of tools in the messages so far."""

    names: set[str] = field(default_factory=set)  # names of the called tools
    ids: dict[str, str] = field(default_factory=dict)  # the name of the called tool, by the id of the call

    def add(self, calls: Sequence[JsonObject]) -> None:
        self.names |= {call["function"]["name"] for call in calls}
        self.ids |= {call["id"]: call["function"]["name"] for call in calls if "id" in call}


def _message(
    given: Any, at: int, calls: _Calls, known: Set[str] | None, reads_parts: Callable[[str], bool]
) -> JsonObject:
    def refuse(field: str, problem: str) -> NoReturn:
        raise UsageError(f"messages[{at}]: {problem}", ".".join(filter(None, ("messages", str(at), field))))

    try:
        message = plain(given)
    except UsageError as problem:
        refuse("", str(problem))
    if not isinstance(message, dict):
        refuse("", f"expected {{role, content}}, found {_kind(given)}")
    role = _role(message.get("role"), refuse)
    made = _passed_fields(message, role, known, refuse)
    called = [_call(call, i, refuse) for i, call in enumerate(_list(message, "tool_calls", refuse))]
    texts = _texts(message.get("content"), role, refuse) + _refusal(message.get("refusal"), refuse)
    if not texts and not called and not _has_other_text(made, known):
        refuse("content", f"the {role} message has no content")
    joined = len(texts) <= 1 or not reads_parts(role)
    made["content"] = "".join(texts) if joined else [{"type": "text", "text": text} for text in texts]
    if called:
        made["tool_calls"] = called
        calls.add(called)
    if role == "tool" and "tool_responses" not in made:
        made["name"] = _tool_of_response(made, calls, refuse)
    return _with_reasoning({"role": role, **made})


def _passed_fields(message: JsonObject, role: str, known: Set[str] | None, refuse: _Refuse) -> JsonObject:
    """Return the fields that templates get unchanged; null and empty ones are left out."""
    made: JsonObject = {}
    for key, value in message.items():
        if _empty(value) or key in ("role", "content", *OUR_FIELDS):
            continue
        if (
            key not in KNOWN_FIELDS
            and key not in PASSED_FIELDS
            and (key in REFUSED_FIELDS or not _reads(known or (), key))
        ):
            refuse(str(key), f"unknown field {key!r}; a message has {', '.join((*KNOWN_FIELDS, *PASSED_FIELDS))}")
        if role not in ROLES_OF_FIELD.get(key, (role,)):
            refuse(key, _wrong_role(key, role))
        if known is not None and not _reaches_prompt(message, key, known):
            refuse(key, f"the file's chat template reads no {key} of a message: it would be left out")
        if key in TEXT_FIELDS and not isinstance(value, str):
            refuse(key, f"{key} must be text, not {_kind(value)}")
        if key not in KNOWN_FIELDS:
            made[key] = value
    for response in _list(made, "tool_responses", refuse):
        if not isinstance(response, dict) or "response" not in response:
            refuse("tool_responses", "a tool's response is {name, response}")
    return made


def _reads(known: Container[str], key: str) -> bool:
    return key in known or WHOLE_MESSAGE in known


def _reaches_prompt(message: JsonObject, key: str, known: Set[str]) -> bool:
    """Return whether a field reaches the prompt, or may be left out of it.

    Many templates leave the reasoning out, and the name or id of a tool's response only says which call it answers.
    """
    if key in ("name", "tool_call_id") and message.get("role") == "tool":
        return True
    return key in ("refusal", *REASONING) or _reads(known, key)


def _has_other_text(made: JsonObject, known: Set[str] | None) -> bool:
    """Return whether a message without content and calls has another field that the template writes."""
    if "tool_responses" in made:
        return True
    given = any(name in made for name in REASONING)
    return given and (known is None or any(_reads(known, name) for name in REASONING))


def _wrong_role(key: str, role: str) -> str:
    if key == "tool_calls":
        return f"only an assistant calls tools, not the role {role}"
    return f"{key} is of {' or '.join(ROLES_OF_FIELD[key])}, not of the role {role}"


def _tool_of_response(made: JsonObject, calls: _Calls, refuse: _Refuse) -> str:
    """Return the name of the tool whose response a message is.

    In OpenAI's form it is found by the call's id, tool_call_id; in the templates' form it is the field name.
    """
    name, call = made.get("name"), made.get("tool_call_id")
    if call is None and name is None:
        refuse("tool_call_id", "a tool's response needs the tool_call_id of a call before, or a tool's name")
    if call is not None and call not in calls.ids:
        refuse("tool_call_id", f"no call before has this tool_call_id, {call!r}")
    if name is not None and name not in calls.names:
        refuse("name", f"no call before is of this tool, {name!r}")
    if call is not None and name not in (None, calls.ids[call]):
        refuse("name", f"the call {call!r} is of the tool {calls.ids[call]!r}, not {name!r}")
    return str(name if call is None else calls.ids[call])


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)


def _with_reasoning(message: JsonObject) -> JsonObject:
    """Return a message with its reasoning under both names that templates read, as transformers does."""
    reasoning = next((message[name] for name in REASONING if name in message), None)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _role(role: Any, refuse: _Refuse) -> str:
    if role is None:
        refuse("role", "it has no role")
    if not isinstance(role, str) or role not in ROLES:
        refuse("role", f"unknown role {str(role)[:40]}; the roles are {', '.join(ROLES)}")
    return ROLES[role]


def _list(message: JsonObject, field: str, refuse: _Refuse) -> list[Any]:
    found = message.get(field)
    if found is not None and not isinstance(found, list):
        refuse(field, f"{field} must be a list, not {_kind(found)}")
    return found or []


def _texts(content: Any, role: str, refuse: _Refuse) -> list[str]:
    """Return the text of each part; none where there is no content."""
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
    """Return the text of a refusal as a list, to be added to the content: it is the assistant's answer too."""
    if refusal is not None and not isinstance(refusal, str):
        refuse("refusal", f"refusal must be text, not {_kind(refusal)}")
    return [refusal] if refusal else []


def _call(call: Any, at: int, refuse: _Refuse) -> JsonObject:
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
    made: JsonObject = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return {"id": call["id"], **made} if isinstance(call.get("id"), str) else made


def _tool(tool: Any, at: int) -> JsonObject:
    def refuse(problem: str) -> NoReturn:
        raise UsageError(f"tools[{at}]: {problem}")

    if not isinstance(tool, dict):
        refuse(f"expected {{type, function}}, found {_kind(tool)}")
    if "function" not in tool and "name" in tool:  # a function without a tool around it
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
