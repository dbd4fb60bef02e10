r"""Runs DiffusionGemma, a language model that denoises blocks of text.

>>> import dgemma
>>> with dgemma.Model() as model:  # the bundled one, a Sudoku solver; dgemma.Model("model.gguf") is one of yours
...     print(model.generate("534678912\n672195348\n19834256.\n859761423\n426853791\n"
...                          "713924856\n961537284\n287419635\n345286179\n").text[20:29])
198342567
"""

from dgemma.chat.conversation import Conversation, Reply
from dgemma.config import Config
from dgemma.errors import (
    BackendError,
    Error,
    FormatError,
    MemoryBudgetError,
    NumbersError,
    Stopped,
    SystemFailure,
    UsageError,
)
from dgemma.events import Block, Result, Step
from dgemma.model import Model, backends
from dgemma.options import Effort, efforts
from dgemma.session import Session
from dgemma.tokenizer import Tokenizer

__all__ = [
    "BackendError",
    "Block",
    "Config",
    "Conversation",
    "Effort",
    "Error",
    "FormatError",
    "MemoryBudgetError",
    "Model",
    "NumbersError",
    "Reply",
    "Result",
    "Session",
    "Step",
    "Stopped",
    "SystemFailure",
    "Tokenizer",
    "UsageError",
    "backends",
    "efforts",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from dgemma._native import ffi, lib

        return ffi.string(lib.dg_version()).decode()
    raise AttributeError(f"module 'dgemma' has no attribute {name!r}")
