"""Distributions over the vocabulary, one per canvas position, in bounded memory, and the divergence of two.

All arithmetic is float64 on the model's float32 logits. A distribution is softmax(logits / temperature), from which the
sampler draws. For a small vocabulary all logits are kept, and everything is exact. For a large one, each row keeps its
most likely ids until the others together have a probability below TAIL, but at most MOST ids; the others are treated as
one id. The divergence of such coarser distributions is at most the true one; what is missing is the divergence within
the tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WHOLE = 4096  # all logits are kept for a vocabulary of at most so many ids
MOST = 1024  # the most ids that are kept of a row, for a larger vocabulary
TAIL = 1e-6  # the probability of the ids that are not kept is below this, unless MOST are kept
LEAST = 1e-9  # the least probability of the ids that are not kept: rounding may leave 0
CHUNK = 1 << 22  # logits that are converted to float64 at a time

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class State:
    """Figures of n distributions over the whole vocabulary."""

    log_total: Floats  # [n] log of the sum of exp(logit / temperature)
    entropy: Floats  # [n] nats
    peak: Floats  # [n] probability of the most likely id
    argmax: npt.NDArray[np.int32]  # [n] the most likely id


@dataclass(slots=True)
class Rows:
    """The most likely ids of n distributions, and their logits."""

    state: State
    temperature: Floats  # [n]
    ends: npt.NDArray[np.int64]  # [n] ids[ends[i - 1] : ends[i]] are those of row i
    ids: npt.NDArray[np.int32]  # [m] the ids that are kept
    logits: npt.NDArray[np.float32]  # [m] the logits of these ids

    def __len__(self) -> int:
        return len(self.ends)

    def row(self, i: int) -> slice:
        return slice(int(self.ends[i - 1]) if i else 0, int(self.ends[i]))

    def log_p(self, i: int) -> Floats:
        """Return the log probabilities of the kept ids of row i."""
        z: Floats = self.logits[self.row(i)].astype(np.float64) / self.temperature[i]
        return z - float(self.state.log_total[i])


@dataclass(slots=True)
class Scaled:
    """Logits divided by the temperature, for some rows."""

    z: Floats  # [n][n_vocab] logits / temperature
    log_total: Floats  # [n] log of the sum of exp(z)


def chunks(n: int, n_vocab: int) -> list[slice]:
    size = max(1, CHUNK // n_vocab)
    return [slice(at, min(at + size, n)) for at in range(0, n, size)]


def scaled(logits: npt.NDArray[np.float32], temperature: float) -> Scaled:
    z = logits.astype(np.float64) / temperature
    most = z.max(axis=1)
    return Scaled(z, most + np.log(np.exp(z - most[:, None]).sum(axis=1)))


def state(logits: npt.NDArray[np.float32], temperature: float) -> State:
    """Return the State of float32 logits[n][n_vocab]."""
    n, n_vocab = logits.shape
    out = State(np.empty(n), np.empty(n), np.empty(n), logits.argmax(axis=1).astype(np.int32))
    for part in chunks(n, n_vocab):
        some = scaled(logits[part], temperature)
        p = np.exp(some.z - some.log_total[:, None])
        out.log_total[part] = some.log_total
        out.entropy[part] = some.log_total - (p * some.z).sum(axis=1)
        out.peak[part] = p.max(axis=1)
    return out


def keep(logits: npt.NDArray[np.float32], temperature: float) -> Rows:
    """Return the Rows of float32 logits[n][n_vocab]."""
    n, n_vocab = logits.shape
    its, ends = state(logits, temperature), np.empty(n, np.int64)
    ids: list[npt.NDArray[np.int32]] = []
    total = 0
    for part in chunks(n, n_vocab):
        z = logits[part].astype(np.float64) / temperature
        for i, of_row in enumerate(likely(np.exp(z - its.log_total[part, None])), part.start):
            ids.append(of_row)
            total += len(of_row)
            ends[i] = total
    kept_logits = np.concatenate([logits[i, of_row] for i, of_row in enumerate(ids)])
    return Rows(its, np.full(n, temperature), ends, np.concatenate(ids), kept_logits)


def likely(p: Floats) -> list[npt.NDArray[np.int32]]:
    """Return the ids that each row of p[n][n_vocab] keeps, in rising order."""
    n, n_vocab = p.shape
    if n_vocab <= WHOLE:
        return [np.arange(n_vocab, dtype=np.int32)] * n
    best = np.argpartition(p, n_vocab - MOST, axis=1)[:, n_vocab - MOST :]
    out = []
    for row, ids in zip(p, best, strict=True):
        ids = ids[np.argsort(-row[ids])]
        count = int(np.searchsorted(np.cumsum(row[ids]), 1 - TAIL)) + 1
        out.append(np.sort(ids[:count]).astype(np.int32))
    return out


def divergence(base: Rows, first: int, logits: npt.NDArray[np.float32]) -> Floats:
    """Return KL(base || other) in nats of rows [first, first + n), at base's temperature.

    other: logits[n][n_vocab]. The same logits give exactly zero.
    """
    n, n_vocab = logits.shape
    out = np.empty(n)
    for part in chunks(n, n_vocab):
        temperature = float(base.temperature[first])
        other = scaled(logits[part], temperature)
        for i in range(part.start, part.stop):
            ids, log_p = base.ids[base.row(first + i)], base.log_p(first + i)
            log_q = other.z[i - part.start, ids] - other.log_total[i - part.start]
            p, q = np.exp(log_p), np.exp(log_q)
            out[i] = (p * (log_p - log_q)).sum()
            rest_p, rest_q = 1 - p.sum(), 1 - q.sum()
            if len(ids) < n_vocab and rest_p > 0:
                out[i] += rest_p * np.log(rest_p / max(rest_q, np.finfo(np.float64).eps))
    return np.maximum(out, 0)  # a divergence is never negative; rounding may make it so


def condition(base: Rows, first: int, n: int, n_vocab: int) -> npt.NDArray[np.float32]:
    """Return the self-conditioning after rows [first, first + n): logits / temperature [n][n_vocab].

    Ids that were not kept get equal shares of the remaining probability.
    """
    out = np.empty((n, n_vocab), np.float32)
    for i in range(n):
        at, row = base.row(first + i), out[i]
        ids = base.ids[at]
        if len(ids) < n_vocab:
            left = max(1 - float(np.exp(base.log_p(first + i)).sum()), LEAST)
            row[:] = base.state.log_total[first + i] + np.log(left / (n_vocab - len(ids)))
        row[ids] = base.logits[at] / np.float32(base.temperature[first + i])
    return out


def joined(parts: list[Rows]) -> Rows:
    """Return the concatenation of several Rows."""
    shifts = np.cumsum([0, *(len(part.ids) for part in parts[:-1])])
    return Rows(
        state=joined_states([part.state for part in parts]),
        temperature=np.concatenate([part.temperature for part in parts]),
        ends=np.concatenate([part.ends + shift for part, shift in zip(parts, shifts, strict=True)]),
        ids=np.concatenate([part.ids for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
    )


def joined_states(parts: list[State]) -> State:
    """Return the concatenation of several States."""
    return State(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in State.__slots__})


def without_ids(rows: Rows) -> Rows:
    """Return the rows with their State, but without ids and logits."""
    none = np.empty(0)
    return Rows(rows.state, rows.temperature, rows.ends, none.astype(np.int32), none.astype(np.float32))


def kept(rows: Rows) -> float:
    """Return the smallest probability that the kept ids of a row have together."""
    return min(1.0, min(float(np.exp(rows.log_p(i)).sum()) for i in range(len(rows))))
