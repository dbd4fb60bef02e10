"""A pool of sessions: a request with the prefix of an earlier one reuses what that encoded."""

from __future__ import annotations

from dataclasses import dataclass

from dgemma.errors import MemoryBudgetError
from dgemma.model import Model
from dgemma.session import Session


@dataclass(eq=False)
class Slot:
    """A session of the pool, and what is known of it."""

    session: Session
    peak: int = 0  # the most tokens that it has held: its memory
    prompt: int = 0  # tokens of the last prompt, which the same conversation begins with
    used: int = 0  # the number of the request that used it last


class Pool:
    """Sessions of one model within `budget` bytes, for the worker's thread alone.

    A prompt gets the session that holds the longest beginning of it. Where there is no room for another session, those
    that nobody uses give way, the one that was used longest ago first: its memory serves again. A request that is alone
    always gets a session.
    """

    def __init__(self, model: Model, context: int, budget: int) -> None:
        self._model, self._context, self._budget = model, context, budget
        self._idle: list[Slot] = []
        self._taken: dict[Slot, int] = {}  # sessions in use, with the tokens that each may need
        self._acquired = 0
        self.tokens = 0  # tokens kept in sessions that nobody uses; any thread may read it

    @property
    def bytes(self) -> int:
        """What all sessions take, or may take while they are used."""
        tokens = [slot.peak for slot in self._idle] + [max(slot.peak, need) for slot, need in self._taken.items()]
        return sum(map(self._model.session_bytes, tokens))

    def acquire(self, prompt: list[int], need: int) -> Slot | None:
        """Take a session for a prompt and its answer; None while those that are used leave no room."""
        used = sum(self._model.session_bytes(max(slot.peak, n)) for slot, n in self._taken.items())
        if self._taken and used + self._model.session_bytes(need) > self._budget:
            return None
        slot = self._best(prompt)
        if slot is not None and self._worth_reusing(slot, prompt):
            self._idle.remove(slot)
        else:
            slot = self._new(need)
            if slot is None:
                return None
        self._acquired += 1
        slot.prompt, slot.used = len(prompt), self._acquired
        self._taken[slot] = need
        self._make_room()
        return slot

    def release(self, slot: Slot, broken: bool = False) -> None:
        """Give a session back: its request is done."""
        del self._taken[slot]
        if broken:
            slot.session.close()
        else:
            self._idle.append(slot)
        self._make_room()

    def close(self) -> None:
        for slot in [*self._idle, *self._taken]:
            slot.session.close()
        self._idle, self._taken = [], {}

    def _best(self, prompt: list[int]) -> Slot | None:
        return max(self._idle, key=lambda slot: (slot.session.shared(prompt), -slot.used), default=None)

    def _worth_reusing(self, slot: Slot, prompt: list[int]) -> bool:
        """Return whether as much is reused as another conversation would lose."""
        shared = slot.session.shared(prompt)
        return shared >= max(1, min(slot.prompt, slot.session.length) - shared)

    def _new(self, need: int) -> Slot | None:
        """Return another session where there is room, or else the one that was used longest ago, emptied."""
        if self._idle and self.bytes + self._model.session_bytes(need) > self._budget:
            slot = self._oldest()
            slot.session.rewind(0)
            return slot
        while True:
            try:
                return Slot(self._model.session(self._context))
            except MemoryBudgetError:  # the model's own budget
                if self._idle:
                    self._oldest().session.close()
                elif self._taken:
                    return None
                else:
                    raise

    def _make_room(self) -> None:
        while self._idle and self.bytes > self._budget:
            self._oldest().session.close()
        self.tokens = sum(slot.session.length for slot in self._idle)

    def _oldest(self) -> Slot:
        slot = min(self._idle, key=lambda slot: slot.used)
        self._idle.remove(slot)
        return slot
