"""The index of the n-gram lookup: where the last tokens of a session occurred before."""


class NgramIndex:
    """For every run of tokens in a session, the position where it last ended.

    The longest match counts, and among equal ones the latest. The last token is not indexed yet,
    because a run must not find itself.
    """

    def __init__(self, min_match: int, max_match: int) -> None:
        """Look for matches of ``min_match`` to ``max_match`` tokens."""
        self._sizes = range(max_match, min_match - 1, -1)
        # Position after each run, the latest last; a rollback pops what lies beyond.
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._entered: list[list[tuple[int, ...]]] = []

    def continuation(self, tokens: list[int], room: int) -> list[int]:
        """Return at most ``room`` tokens that followed the last of ``tokens`` earlier on.

        ``tokens`` start with those of the previous call, up to where the index was truncated.
        """
        while len(self._entered) < len(tokens) - 1:
            end = len(self._entered) + 1
            runs = [tuple(tokens[end - size : end]) for size in self._sizes if size <= end]
            for run in runs:
                self._ends.setdefault(run, []).append(end)
            self._entered.append(runs)
        for size in self._sizes:
            ends = self._ends.get(tuple(tokens[-size:])) if size <= len(tokens) else None
            if ends:
                return tokens[ends[-1] : ends[-1] + room]
        return []

    def truncate(self, length: int) -> None:
        """Forget what was seen beyond ``length`` tokens."""
        while len(self._entered) > length:
            for run in self._entered.pop():
                ends = self._ends[run]
                ends.pop()
                if not ends:
                    del self._ends[run]
