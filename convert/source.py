"""The sources of a conversion: the folder of a Hugging Face checkpoint, or a GGUF file."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dgemma.convert.chat_template import try_out
from dgemma.convert.config import Config, read_config
from dgemma.convert.gguf_header import encode_values
from dgemma.convert.metadata import Pair, carried, metadata
from dgemma.convert.names import HEAD, Origins, Wanted, match
from dgemma.convert.opening import open_vocabulary
from dgemma.convert.safetensors import Checkpoint, SourceTensor
from dgemma.convert.tokenizer import read_vocabulary
from dgemma.errors import FormatError, SystemFailure
from dgemma.files.gguf_file import File, Tensor
from dgemma.files.output import readable
from dgemma.files.regular import read_regular
from dgemma.model import Model
from dgemma.tokenizer import Tokenizer


class Source(ABC):
    """The model that is converted; a context manager that keeps its files open."""

    path: Path
    config: Config
    notes: list[str]  # notes on the source for the user; pairs() adds them

    @abstractmethod
    def origins(self, needed: Sequence[Wanted]) -> Origins:
        """Return the source tensors for the needed tensors."""

    @abstractmethod
    def pairs(self, needed: Sequence[Wanted], file_type: int) -> list[Pair]:
        """Return the metadata of a file made of this source."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of a file made of this source."""

    @abstractmethod
    def read(self, tensor: SourceTensor, start: int, count: int) -> Any:
        """Return `count` bytes of a tensor from byte `start` on."""

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Folder(Source):
    """A checkpoint's folder, with config.json, tokenizer.json and safetensors."""

    def __init__(self, path: Path) -> None:
        self.path, self.notes = path, []
        self._tokenizer: Tokenizer | None = None
        if os.path.lexists(adapter := path / "adapter_config.json"):
            raise FormatError(f"{adapter}: this adapter would be left out; merge it into the weights, or remove it")
        self._checkpoint = Checkpoint(path)
        try:
            self.config = read_config(path)
        except BaseException:
            self.close()
            raise

    def origins(self, needed: Sequence[Wanted]) -> Origins:
        return match(self._checkpoint.tensors, needed, self.path)

    def pairs(self, needed: Sequence[Wanted], file_type: int) -> list[Pair]:
        vocabulary = read_vocabulary(self.path, self.config.values["n_vocab"], self.config.special_ids)
        pairs = encode_values(metadata(self.config, vocabulary, needed, file_type))
        self.notes, self._tokenizer = vocabulary.notes, open_vocabulary(pairs, vocabulary)
        if self._tokenizer.chat_template is not None:
            self.notes += try_out(self.path, self._tokenizer)
        return pairs

    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self.pairs([], 0)
            assert self._tokenizer is not None
        return self._tokenizer

    def read(self, tensor: SourceTensor, start: int, count: int) -> Any:
        return self._checkpoint.read(tensor, start, count)

    def close(self) -> None:
        self._checkpoint.close()


class SourceModel(Model):
    """A model whose file may have the embedding a second time, as the output head; the conversion compares both."""

    _head_copy = True


class Gguf(Source):
    """A GGUF file, or the first part of a split one. The runtime checks it as it does before it runs one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with SourceModel(path, backend="cpu", threads=1) as model:
            values = {name: list(v) if isinstance(v, tuple) else v for name, v in model.config}
            self.notes = _notes(path, model.tokenizer)
        end_ids = values.pop("end_ids")
        self._file = File(path)
        self.config = Config(values, 0.0, end_ids, {}, str(self._file.get("general.name") or readable(path.stem)))
        self._data = {tensor.name: tensor.data for tensor in self._file.tensors}

    def origins(self, needed: Sequence[Wanted]) -> Origins:
        tensors = {tensor.name: tensor for tensor in self._file.tensors}
        found, copies = {}, list[tuple[SourceTensor, SourceTensor]]()
        for want in needed:
            names = [name for name in (want.gguf, *((HEAD,) if want.kind == "TABLE" else ())) if name in tensors]
            one, *others = [self._tensor(tensors[name]) for name in names or want.halves]
            found[want.gguf] = (one,) if names else (one, *others)
            copies += [(one, other) for other in others if names]
        for one, other in copies:
            kept = tensors[other.name].format
            if other.shape != one.shape or not kept.decodes or other.bytes != other.count // kept.block * kept.bytes:
                raise FormatError(
                    f"{self.path}: tensor {other.name} must equal {one.name}, which is the output head: found"
                    f" {other.dtype} {list(other.shape)} there, {one.dtype} {list(one.shape)} here"
                )
        return Origins(found, copies, 0)  # the runtime refuses a file with any other tensor

    def _tensor(self, of: Tensor) -> SourceTensor:
        return SourceTensor(of.name, self.path, of.format.name, of.dims[::-1], 0, of.bytes)

    def pairs(self, needed: Sequence[Wanted], file_type: int) -> list[Pair]:
        return carried(self._file, file_type)

    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_gguf(self.path)

    def read(self, tensor: SourceTensor, start: int, count: int) -> Any:
        copy = bytearray(memoryview(self._data[tensor.name])[start : start + count])
        self._file.check()
        return copy

    def close(self) -> None:
        self._data = {}
        self._file.close()


def _notes(path: Path, tokenizer: Tokenizer) -> list[str]:
    """Return notes on a file's chat template. A damaged one is kept, as the file runs without it."""
    if tokenizer.chat_template is None:
        return []
    try:
        return try_out(path, tokenizer)
    except FormatError as problem:
        return [str(problem)]


def open_source(path: Path) -> Source:
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise SystemFailure(f"{path}: no such folder or file")
    if read_regular(path, 4) != b"GGUF":
        raise FormatError(f"{path}: expected the folder of a Hugging Face checkpoint or a GGUF file, found neither")
    return Gguf(path)
