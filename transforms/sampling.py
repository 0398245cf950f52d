"""A sample of rows from all over a table, taken while they pass by."""

from __future__ import annotations

from reembed.transforms.rows import Row


class Sample:
    """At most `most` of the rows that are added, evenly spread; at least half as many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._rows: list[Row] = []
        self._seen, self._step = 0, 1

    def add(self, row: Row) -> None:
        """Offer another row."""
        if self._most and self._seen % self._step == 0:
            self._rows.append(row)
        self._seen += 1
        if len(self._rows) > 2 * self._most:
            self._rows, self._step = self._rows[::2], 2 * self._step

    @property
    def rows(self) -> list[Row]:
        """The sampled rows, in the order in which they came."""
        return self._rows[:: -(-len(self._rows) // (self._most or 1)) or 1]
