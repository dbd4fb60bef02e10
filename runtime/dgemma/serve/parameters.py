"""The parameters of OpenAI's requests, and whether each is used, ignored or refused.

--help, checks and tests are made from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dgemma.serve.errors import bad_request

Endpoint = Literal["chat", "completions", "edits"]
ALL: tuple[Endpoint, ...] = ("chat", "completions", "edits")
BOTH: tuple[Endpoint, ...] = ("chat", "completions")
CHAT: tuple[Endpoint, ...] = ("chat",)
TEXT: tuple[Endpoint, ...] = ("completions",)
EDITS: tuple[Endpoint, ...] = ("edits",)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of requests, and what becomes of it.

    used: it does what it says. ignored: it is taken without effect, and named in the header X-Ignored-Parameters.
    refused: it is an error, unless it has one of the `neutral` values, which ask for nothing. null is always as if
    absent.
    """

    name: str
    of: tuple[Endpoint, ...]
    what: Literal["used", "ignored", "refused"]
    why: str
    neutral: tuple[Any, ...] = ()


def _used(name: str, of: tuple[Endpoint, ...], why: str) -> Parameter:
    return Parameter(name, of, "used", why)


def _ignored(name: str, of: tuple[Endpoint, ...], why: str) -> Parameter:
    return Parameter(name, of, "ignored", why)


def _refused(name: str, of: tuple[Endpoint, ...], why: str, *neutral: Any) -> Parameter:
    return Parameter(name, of, "refused", why, neutral)


_SCHEDULE = "tokens are drawn at the temperatures of diffusion.t_max and t_min, and accepted by their entropy"
_TOGETHER = "tokens of a canvas are written together: there is no order in which to {}"
_TEXT = "the model reads and writes text alone"
_BOOKS = "nothing is kept of a request"

PARAMETERS = (
    _used("model", ALL, "must be the id that /v1/models tells"),
    _used("messages", CHAT, "text parts alone; the thoughts of earlier answers are left out"),
    _used("prompt", TEXT, "text or ids, or a list of these; no chat template is applied"),
    _used("input", EDITS, "the text; what stands around diffusion.span stays as it is"),
    _used("instruction", EDITS, "what is to be done with the passage"),
    _used("max_tokens", BOTH, "default: for a chat what the context leaves, else one canvas"),
    _used("max_completion_tokens", CHAT, "the same as max_tokens, thoughts included"),
    _used("n", BOTH, "answers to a prompt, from seed, seed + 1, ..."),
    _used("seed", ALL, "default: drawn at random; an answer tells which in diffusion.seed"),
    _used("stop", BOTH, "one text or several: the answer ends before the first that it holds"),
    _used(
        "stream",
        ALL,
        "server-sent events; text is sent once it is final (with diffusion.commit, canvases from the front)",
    ),
    _used("stream_options", ALL, "include_usage"),
    _used("reasoning_effort", CHAT, "none (the default): no thought; any other: the model thinks as long as it does"),
    _used("tools", CHAT, "functions, for the file's chat template"),
    _used("tool_choice", CHAT, "auto or none; a call cannot be forced"),
    _used("user", ALL, "turns are shared fairly between users"),
    _used("diffusion", ALL, "our own fields, below"),
    _ignored("temperature", ALL, _SCHEDULE),
    _ignored("top_p", ALL, _SCHEDULE),
    _ignored("top_k", BOTH, _SCHEDULE),
    _ignored("min_p", BOTH, _SCHEDULE),
    _ignored("metadata", CHAT, _BOOKS),
    _ignored("store", CHAT, _BOOKS),
    _ignored("service_tier", CHAT, "there is one"),
    _ignored("safety_identifier", CHAT, _BOOKS),
    _ignored("prompt_cache_key", CHAT, "the longest beginning in the cache is found without it"),
    _ignored("prompt_cache_retention", CHAT, "what is in the cache stays while there is room"),
    _ignored("prompt_cache_options", CHAT, "the longest beginning in the cache is found without it"),
    _ignored("verbosity", CHAT, "ask for it in words"),
    _refused("logprobs", BOTH, _TOGETHER.format("multiply probabilities; diffusion.events tells entropies"), False),
    _refused("top_logprobs", CHAT, _TOGETHER.format("multiply probabilities; diffusion.events tells entropies"), 0),
    _refused("presence_penalty", BOTH, _TOGETHER.format("count what came before"), 0),
    _refused("frequency_penalty", BOTH, _TOGETHER.format("count what came before"), 0),
    _refused("logit_bias", BOTH, "logits are not changed", {}),
    _refused(
        "response_format", CHAT, "no grammar is enforced; pin what must stand with diffusion.canvas", {"type": "text"}
    ),
    _refused("parallel_tool_calls", CHAT, "how many calls a model writes cannot be bounded", True),
    _refused("functions", CHAT, "tools took their place"),
    _refused("function_call", CHAT, "tool_choice took its place", "none", "auto"),
    _refused("modalities", CHAT, _TEXT, ["text"]),
    _refused("audio", CHAT, _TEXT),
    _refused("prediction", CHAT, "pin what is known with diffusion.canvas"),
    _refused("web_search_options", CHAT, "nothing is searched"),
    _refused("moderation", CHAT, "nothing is moderated"),
    _refused("best_of", TEXT, "ask for n and choose", 1),
    _refused("echo", TEXT, "the prompt is known", False),
    _refused("n", EDITS, "ask again with another seed", 1),
    _refused("suffix", TEXT, "pin what stands behind with diffusion.canvas", ""),
)


def parameters(endpoint: Endpoint) -> dict[str, Parameter]:
    """Return the parameters of an endpoint by name."""
    return {parameter.name: parameter for parameter in PARAMETERS if endpoint in parameter.of}


def split_parameters(endpoint: Endpoint, body: Any) -> tuple[dict[str, Any], list[str]]:
    """Return what of a request is used, and the names of what is ignored.

    Raises a Refusal for what is refused or unknown.
    """
    if not isinstance(body, Mapping):
        raise bad_request("a request is a JSON object")
    known, used, ignored = parameters(endpoint), dict[str, Any](), list[str]()
    for name, value in body.items():
        parameter = known.get(name)
        if parameter is None:
            raise bad_request(f"there is no parameter {name!r}", name, "unknown_parameter")
        if value is None:
            continue
        if parameter.what == "used":
            used[name] = value
        elif parameter.what == "ignored":
            ignored.append(name)
        elif not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in parameter.neutral):
            raise bad_request(f"{name} is not supported: {parameter.why}", name, "unsupported_parameter")
    return used, ignored
