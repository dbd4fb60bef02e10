"""Validates requests, and makes the work that they ask for. Fields of options are made from options.def."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from dgemma.chat.template import no_template
from dgemma.errors import UsageError
from dgemma.model import Model
from dgemma.options import efforts, options
from dgemma.serve.errors import Refusal, bad_request
from dgemma.serve.parameters import Endpoint, split_parameters

TOP = ("max_tokens", "seed")  # options that OpenAI's requests have themselves
MOST_ANSWERS, MOST_PROMPTS, MOST_STOPS = 128, 128, 16


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class FunctionSchema(_Strict):
    """A function that the model may call."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None  # nothing enforces a schema


class Tool(_Strict):
    """A tool, as OpenAI has it: a function."""

    type: Literal["function"]
    function: FunctionSchema


class StreamOptions(_Strict):
    """The options of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # there is none to leave out


class OwnFields(_Strict):
    """Our own fields, under `diffusion`."""

    effort: str | None = Field(None, description="a name for several settings")
    events: bool | None = Field(
        None, description="in a stream, a canvas event per step: ids, text, entropy of each token"
    )
    deadline: float | None = Field(None, gt=0, le=86400, description="seconds that the whole request may take")


class _Diffusion(OwnFields):
    canvas: list[int] | None = Field(None, description="ids of a text that is given in part; see pinned")
    pinned: list[bool] | None = Field(None, description="which ids of the canvas stay; the others are written anew")


def option_fields(but: Sequence[str] = ()) -> dict[str, Any]:
    """Return a field per generation option."""
    fields: dict[str, Any] = {}
    for option in (each for name, each in options().items() if name not in but):
        kind: Any = bool if option.flag else float if option.real else int
        kind = Literal[tuple(option.choices)] if option.choices else kind
        bounds: dict[str, Any] = {} if option.flag or option.choices else {"ge": option.least, "le": option.most}
        fields[option.name] = (Annotated[kind, Field(**bounds)] | None, Field(None, description=option.help))
    return fields


Diffusion = create_model("Diffusion", __base__=_Diffusion, **option_fields())
Stop = str | list[str] | None
_Tokens = Annotated[int, Field(ge=1, le=int(options()["max_tokens"].most))] | None
_Seed = Annotated[int, Field(ge=0, le=int(options()["seed"].most))] | None


class CommonRequest(_Strict):
    """The fields that every request has."""

    model: str
    seed: _Seed = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str = ""
    diffusion: Any = None


class _GenerationRequest(CommonRequest):
    max_tokens: _Tokens = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stop: Stop = None


class ChatRequest(_GenerationRequest):
    """The JSON of a request for an answer to messages."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: _Tokens = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] = "none"
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] = "auto"


class TextRequest(_GenerationRequest):
    """The JSON of a request to go on from a text."""

    prompt: str | list[str] | list[int] | list[list[int]]


@dataclass(kw_only=True)
class BaseWork:
    """The fields of Work and EditWork."""

    settings: dict[str, Any]  # generation options
    need: int  # tokens of context
    events: bool
    stream: bool
    usage: bool
    user: str
    deadline: float | None
    ignored: list[str]


def delivery(request: CommonRequest, own: OwnFields, ignored: list[str]) -> dict[str, Any]:
    """Return the fields of BaseWork that say to whom, how and until when an answer goes, for any request."""
    if own.events and not request.stream:
        raise bad_request("diffusion.events needs stream", "diffusion.events")
    return {
        "events": bool(own.events),
        "stream": request.stream,
        "usage": request.stream_options is not None and bool(request.stream_options.include_usage),
        "user": request.user,
        "deadline": own.deadline,
        "ignored": ignored,
    }


@dataclass
class Work(BaseWork):
    """Work for the worker: `n` answers to each prompt, from seed, seed + 1, ..., all in one session."""

    endpoint: Endpoint
    prompts: list[list[int]]
    n: int
    seed: int  # not among the settings
    marks: bool  # thoughts and calls are parsed
    calls: bool  # calls are sent as tool calls; else they are text
    stops: tuple[str, ...]


_Request = TypeVar("_Request", bound=BaseModel)


def validated(schema: type[_Request], body: Any, under: str = "") -> _Request:
    try:
        return schema.model_validate(body)
    except ValidationError as failure:
        first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join([*([under] if under else []), *map(str, first["loc"])])
        raise bad_request(f"{where}: {first['msg']}", where or None, "invalid_value") from None


def read_request(endpoint: Endpoint, body: Any, model: Model, served: str, context: int) -> Work:
    """Read the work that a request's JSON asks for.

    Raises a Refusal, or UsageError for options that do not go together.
    """
    used, ignored = split_parameters(endpoint, body)
    request = validated(ChatRequest, used) if endpoint == "chat" else validated(TextRequest, used)
    check_model(request.model, served)
    own = validated(Diffusion, {} if request.diffusion is None else request.diffusion, "diffusion")
    settings = settings_of(request, own)
    delivered = delivery(request, own, ignored)
    seed = settings.pop("seed")
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(request, ChatRequest):
        prompts = [_chat_prompt(model, request)]
    else:
        prompts = _text_prompts(model, request.prompt)
    templated = isinstance(request, ChatRequest) and model.tokenizer.chat_template is not None
    if own.canvas is not None or own.pinned is not None:
        settings |= {"canvas": own.canvas, "pinned": own.pinned}
        tokens = len(own.canvas or ())
    elif settings.get("max_tokens") or not templated:
        tokens = settings.setdefault("max_tokens", int(model.config.canvas_length))
    else:
        tokens = settings["max_tokens"] = _tokens_left(model, len(prompts[0]), context)
    return Work(
        endpoint,
        prompts,
        request.n,
        secrets.randbits(32) if seed is None else seed,
        settings=settings,
        need=_context_for(model, max(map(len, prompts)), tokens, context),
        marks=templated,
        calls=isinstance(request, ChatRequest) and bool(_tools(request)),
        stops=_stops(request.stop),
        **delivered,
    )


def check_model(asked: str, served: str) -> None:
    if asked != served:
        raise Refusal(404, f"there is no model {asked!r} here; {served!r} is served", "model_not_found", "model")


def settings_of(request: CommonRequest, own: OwnFields) -> dict[str, Any]:
    """Return the generation options of our own fields, and those that OpenAI's requests have themselves."""
    settings = {name: getattr(own, name) for name in options() if hasattr(own, name)}
    for name in (name for name in TOP if hasattr(request, name)):
        above = _top_level(request, name)
        if above is not None and settings[name] is not None:
            raise bad_request(f"{name} is given twice, here and in diffusion", name)
        settings[name] = settings[name] if above is None else above
    if own.effort is not None and own.effort not in efforts():
        raise bad_request(f"diffusion.effort must be {', '.join(efforts())}, not {own.effort!r}", "diffusion.effort")
    return settings | {"effort": own.effort}


def _top_level(request: CommonRequest, name: str) -> Any:
    """Return max_tokens and seed as OpenAI's requests give them."""
    value = getattr(request, name)
    if name == "max_tokens" and isinstance(request, ChatRequest) and request.max_completion_tokens is not None:
        if value not in (None, request.max_completion_tokens):
            raise bad_request("max_tokens and max_completion_tokens differ; give one", name)
        return request.max_completion_tokens
    return value


def _tokens_left(model: Model, prompt: int, context: int) -> int:
    """Return the most tokens of an answer behind a prompt: its last canvas is not encoded."""
    length: int = model.config.canvas_length
    return max(0, (context - prompt) // length + 1) * length or length


def _context_for(model: Model, prompt: int, tokens: int, context: int) -> int:
    length: int = model.config.canvas_length
    need = prompt + (-(-tokens // length) - 1) * length
    if need > context:
        raise bad_request(
            f"a prompt of {prompt} tokens and an answer of {tokens}, whose last canvas needs none, need a context of"
            f" {need}, more than {context}",
            "messages" if prompt > context else "max_tokens",
            "context_length_exceeded",
        )
    return max(need, prompt)


def _stops(stop: Stop) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(texts) > MOST_STOPS or not all(texts):
        raise bad_request(f"stop takes at most {MOST_STOPS} texts, none of them empty", "stop")
    return texts


def _text_prompts(model: Model, prompt: str | list[str] | list[int] | list[list[int]]) -> list[list[int]]:
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    prompts: list[Any] = prompt if several else [prompt]  # type: ignore[assignment]
    if len(prompts) > MOST_PROMPTS:
        raise bad_request(f"at most {MOST_PROMPTS} prompts, not {len(prompts)}", "prompt")
    if any(len(each) == 0 for each in prompts):
        raise bad_request("empty prompt", "prompt")
    return [model.prompt_ids(each) for each in prompts]


def _tools(request: ChatRequest) -> list[Tool]:
    return [] if request.tool_choice == "none" else request.tools or []


def _chat_prompt(model: Model, request: ChatRequest) -> list[int]:
    thinking, tools = request.reasoning_effort != "none", _tools(request)
    if model.tokenizer.chat_template is None and (thinking or tools):
        name = "tools" if tools else "reasoning_effort"
        raise bad_request(no_template(f"{name} needs", "this model has none"), name)
    given = [tool.model_dump(exclude_none=True) for tool in tools] or None
    try:
        ids = model.tokenizer.chat(request.messages, given, thinking)
    except UsageError as refused:
        raise bad_request(str(refused), refused.place or None, "invalid_value" if refused.place else None) from None
    if not ids:
        raise bad_request("empty prompt", "messages")
    return ids
