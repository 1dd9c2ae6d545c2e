"""A run's history in bounded memory."""

ROWS = 256


class Timeline:
    """Rows of equal length; `width` steps went into each. When it is full, neighbours are averaged."""

    def __init__(self, rows: int = ROWS) -> None:
        self.most, self.width = rows, 1
        self.rows: list[list[float]] = []
        self._sum: list[float] = []
        self._in_sum = 0

    def add(self, row: list[float]) -> None:
        self._sum = row if not self._in_sum else [a + b for a, b in zip(self._sum, row, strict=True)]
        self._in_sum += 1
        if self._in_sum == self.width:
            self.rows.append([value / self.width for value in self._sum])
            self._in_sum = 0
        if len(self.rows) == self.most:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [[(a + b) / 2 for a, b in zip(*pair, strict=True)] for pair in pairs]
            self.width *= 2
