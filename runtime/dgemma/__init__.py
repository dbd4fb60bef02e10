"""Block diffusion with DiffusionGemma.

>>> with dgemma.Model("model.gguf") as model:
...     print(model.generate("Hello").text)
"""

from dgemma.config import Config
from dgemma.errors import BackendError, Error, FormatError, MemoryBudgetError, SystemFailure, UsageError
from dgemma.events import Block, Result, Step
from dgemma.model import Model, backends
from dgemma.options import Effort, efforts
from dgemma.session import Session
from dgemma.tokenizer import Tokenizer

__all__ = [
    "BackendError",
    "Block",
    "Config",
    "Effort",
    "Error",
    "FormatError",
    "MemoryBudgetError",
    "Model",
    "Result",
    "Session",
    "Step",
    "SystemFailure",
    "Tokenizer",
    "UsageError",
    "backends",
    "efforts",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("dgemma")
    raise AttributeError(f"module 'dgemma' has no attribute {name!r}")
