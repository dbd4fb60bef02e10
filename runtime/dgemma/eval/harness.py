"""An adapter with which lm-eval (EleutherAI's evaluation harness) runs our models; the extra `eval` installs lm-eval.

    python -m dgemma.eval.harness run --model dgemma --model_args path=model.gguf --tasks gsm8k --apply_chat_template

All arguments after the module's name are lm-eval's. model_args: path, backend, threads, exact, ram, context (for
likelihoods, in tokens), thinking, and any generation option.

generate_until generates by block diffusion. Its temperatures are the model's schedule, so a task's temperature,
do_sample and the like are ignored; its length and stop texts are used. Likelihoods come from the encoder, which is
trained to predict the next token; they say nothing about the decoder.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

try:
    from lm_eval.api.model import TemplateLM  # type: ignore
    from lm_eval.api.registry import register_model  # type: ignore
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # type: ignore
except ImportError as problem:
    raise ImportError("dgemma.eval.harness needs lm-eval: pip install 'dgemma[eval]'") from problem

from dgemma.errors import UsageError
from dgemma.eval.results import shown
from dgemma.model import Model
from dgemma.options import options
from dgemma.session import Session

ROWS = 64  # tokens per call of the encoder, and so rows of logits in memory
TOKENS = 256  # the most tokens of an answer where the task gives no length


@register_model("dgemma")
class Harness(TemplateLM):  # type: ignore[misc]
    """A GGUF file as a model of lm-eval."""

    def __init__(
        self,
        path: str | None = None,
        backend: str = "auto",
        threads: int | None = None,
        exact: bool = False,
        ram: int | str | None = None,
        context: int | None = None,
        thinking: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **settings: Any,
    ) -> None:
        """Open a model for lm-eval.

        lm-eval always passes batch_size, max_batch_size and device. They have no effect: requests are answered one by
        one, on `backend`.
        """
        super().__init__()
        if unknown := sorted(settings.keys() - options().keys()):
            raise UsageError(f"model_args: there is no {unknown[0]!r}; generation options are {', '.join(options())}")
        self.model = Model(path, backend=backend, threads=threads, exact=exact, ram=ram)
        self.settings, self.thinking = settings, thinking
        self._context = context
        self._session: Session | None = None
        self._held: list[int] = []  # the tokens that the session has encoded

    # ---- Text ----

    @property
    def eot_token_id(self) -> int:
        return int(self.model.config.end_ids[0])

    @property
    def prefix_token_id(self) -> int:
        bos = self.model.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.model.path

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.model.tokenizer.chat_template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if not add_generation_prompt:
            raise UsageError("dgemma answers messages; it does not go on with a half-written one")
        return self.model.tokenizer.render(chat_history, thinking=self.thinking)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        return tokenizer.encode(string) if add_special_tokens is False else tokenizer.prompt(string)

    # ---- Answers ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        out = []
        for request in requests:
            prompt, wanted = request.args
            given = wanted.get("until") or []
            stops = [given] if isinstance(given, str) else list(given)
            length = next((wanted[name] for name in LENGTHS if wanted.get(name) is not None), TOKENS)
            limits = {"max_tokens": int(length), **self.settings}
            ids = self.tok_encode(prompt)
            text = cut(shown(self.model, ids, self.model.generate(ids, **limits)), stops)
            self.cache_hook.add_partial("generate_until", request.args, text)
            out.append(text)
        return out

    # ---- Likelihoods ----

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        out = []
        for texts, context, continuation in requests:
            answer = self.score(context, continuation)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            out.append(answer)
        return out

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        out = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self._open().context, context_len=1)
            total = sum(self.score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
            out.append(total)
        return out

    def score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Return the log likelihood of `continuation` after `context`, and whether each id is the most likely one.

        Where the context is too long, its beginning is left out.
        """
        session = self._open()
        ids = (context + continuation)[-session.context - 1 :][:-1]  # the last id is predicted, not read
        first = len(ids) + 1 - len(continuation)
        if first < 1:
            raise UsageError(f"a continuation of {len(continuation)} tokens is longer than the context")
        same = 0
        while same < min(len(ids), len(self._held), first - 1) and ids[same] == self._held[same]:
            same += 1
        session.rewind(same)
        self._held = self._held[:same]
        if same < first - 1:
            session.encode(ids[same : first - 1])
        total, greedy = 0.0, True
        for at in range(first - 1, len(ids), ROWS):
            part = ids[at : at + ROWS]
            logits = session.encode(part, logits="all")
            assert logits is not None
            z = logits.astype(np.float64)
            most = z.max(axis=1)
            targets = np.array(continuation[at - first + 1 : at - first + 1 + len(part)])
            picked = z[np.arange(len(part)), targets]
            total += float((picked - most - np.log(np.exp(z - most[:, None]).sum(axis=1))).sum())
            greedy = greedy and bool((z.argmax(axis=1) == targets).all())
        self._held = list(ids)
        return total, greedy

    def _open(self) -> Session:
        if self._session is None:
            self._session = self.model.session(self._context)
        return self._session


LENGTHS = ("max_gen_toks", "max_tokens", "max_new_tokens", "max_completion_tokens")


def cut(text: str, stops: Iterable[str]) -> str:
    """Return the part of a text before the first stop text."""
    for stop in stops:
        if stop:
            text = text.partition(stop)[0]
    return text


def main() -> None:
    from lm_eval.__main__ import cli_evaluate  # type: ignore

    cli_evaluate()


if __name__ == "__main__":
    main()
