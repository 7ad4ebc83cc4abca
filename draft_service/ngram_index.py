"""The index of the n-gram lookup: where the last tokens of a session occurred before."""

from array import array

BYTES_PER_TOKEN = 450
"""Most bytes of an index for each token, with runs of three sizes. It is largest after a table has
just grown."""


class NgramIndex:
    """For every run of tokens in a session, the position where it last ended.

    The longest match counts, and among equal ones the latest. The last token is not indexed yet,
    because a run must not find itself.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        """Look for matches of ``min_match`` to ``max_match`` tokens."""
        self._tables = [_Table(size) for size in range(max_match, min_match - 1, -1)]
        self._num_indexed = 0

    def num_missing(self, tokens: list[int]) -> int:
        """Return how many of ``tokens`` are still to be indexed."""
        return max(0, len(tokens) - 1 - self._num_indexed)

    def extend(self, tokens: list[int], most: int) -> None:
        """Index at most ``most`` more of ``tokens``.

        They start with those of the previous call, up to where the index was truncated.
        """
        end = self._num_indexed + min(most, self.num_missing(tokens))
        for table in self._tables:
            table.extend(tokens, self._num_indexed, end)
        self._num_indexed = end

    def continuation(self, tokens: list[int], room: int) -> list[int]:
        """Return at most ``room`` tokens that followed the last of ``tokens`` earlier on.

        Indexes all of ``tokens`` first.
        """
        self.extend(tokens, len(tokens))
        for table in self._tables:
            if end := table.find_last(tokens):
                return tokens[end : end + room]
        return []

    def continuation_of(self, tokens: list[int], position: int, token: int, room: int) -> list[int]:
        """Return at most ``room`` tokens that followed ``token`` after the same words as here.

        ``token`` takes the place of the one at ``position`` of ``tokens``.
        """
        for table in self._tables:
            start = position + 1 - table.size
            if start >= 0 and (end := table.find([*tokens[start:position], token], tokens)):
                return tokens[end : end + room]
        return []

    def truncate(self, length: int) -> None:
        """Forget what was seen beyond ``length`` tokens."""
        for table in self._tables:
            table.truncate(length)
        self._num_indexed = min(self._num_indexed, length)


class _Table:
    """The runs of one size, by their hash.

    Of two runs with the same hash only the later one is found. This is rare, and costs a proposal.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._ends: dict[int, int] = {}  # by hash: where a run last ended
        # Of the run that ends at position size + i: its hash, and what it replaced in _ends or 0.
        self._hashes = array("q")
        self._replaced = array("q")

    def extend(self, tokens: list[int], start: int, end: int) -> None:
        """Add the runs that end in (start, end]."""
        size, ends = self.size, self._ends
        for position in range(max(start + 1, size), end + 1):
            run = hash(tuple(tokens[position - size : position]))
            self._hashes.append(run)
            self._replaced.append(ends.get(run, 0))
            ends[run] = position

    def find_last(self, tokens: list[int]) -> int:
        """Return where the run that ``tokens`` end with last ended before; 0: nowhere."""
        return self.find(tokens[-self.size :], tokens)

    def find(self, run: list[int], tokens: list[int]) -> int:
        """Return where ``run`` last ended in ``tokens``; 0: nowhere."""
        end = self._ends.get(hash(tuple(run)), 0)
        return end if end and tokens[end - self.size : end] == run else 0

    def truncate(self, length: int) -> None:
        """Drop the runs that end beyond ``length``."""
        while len(self._hashes) > max(0, length - self.size + 1):
            run, replaced = self._hashes.pop(), self._replaced.pop()
            if replaced:
                self._ends[run] = replaced
            else:
                del self._ends[run]
