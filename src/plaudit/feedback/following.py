"""The answers in a store, followed while people give them: what was read is not read again."""

from __future__ import annotations

from plaudit.feedback.items import Label
from plaudit.feedback.store import Store


class Following:
    """The answers that stand. For one thread at a time."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._labels: dict[str, Label] = {}
        self._at, self._gold = 0, 0

    @property
    def version(self) -> str:
        """Another text after an answer, an undoing or a right answer; not after a question was only given out."""
        return "{}.{}".format(*self._store.positions)

    def labels(self) -> list[Label]:
        """As `Store.labels`, of which only what is new since the last call is read."""
        if self._store.positions == (self._at, self._gold):
            return list(self._labels.values())
        found = self._store.news(self._at)
        if found.gold != self._gold:  # items that were read have another content now
            self._labels, found = {}, self._store.news(0)
        self._labels |= {label.id: label for label in found.labels}
        for name in found.undone:
            self._labels.pop(name, None)
        self._at, self._gold = found.position, found.gold
        return list(self._labels.values())
