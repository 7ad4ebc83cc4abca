"""The branches of one epoch that can still be taken: the same rule for all three services.

The rule
- A branch hangs on ``(epoch, position, token)``. The run of the epoch reaches beyond ``position``
  and has another token there.
- As long as no final token stands at ``position``, the branch is held.
- If the run is rejected at ``position`` in favor of ``token``, a held branch begins the next epoch.
  The other branches are dropped.
- A branch that arrives after that begins the epoch too, if nothing else of the epoch is known yet.
- A branch that comes again with further tokens replaces the held one. If it has begun the epoch
  already, its further tokens follow.
- Any other branch is dropped. So both sides take the same branch, whenever it reaches them: the
  verify service gets each branch after the tokens that it hangs on, and before the next epoch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from amusd.protocol.events import Branch


@dataclass(slots=True)
class Branches:
    """Branches of one epoch by outcome, at most ``max_branches``."""

    max_branches: int
    num_taken: int = 0
    """Branches that began an epoch."""
    _held: dict[tuple[int, int], Branch] = field(default_factory=dict)
    _root: tuple[int, int] | None = None  # the rejection that began the epoch
    _begun_with: tuple[int, ...] = ()  # the tokens of its branch that are taken

    @property
    def held(self) -> tuple[Branch, ...]:
        """The held branches."""
        return tuple(self._held.values())

    @property
    def is_full(self) -> bool:
        """Whether no further branch can be held."""
        return len(self._held) >= self.max_branches

    @property
    def has_begun(self) -> bool:
        """Whether a branch began the epoch, and no other tokens of it are known."""
        return self._root is not None and bool(self._begun_with)

    def holds(self, branch: Branch) -> bool:
        """Whether a branch for the same outcome is held."""
        return branch.root in self._held

    def takes(self, branch: Branch) -> bool:
        """Whether there is a place for a branch, or it goes on behind the one that is held."""
        held = self._held.get(branch.root)
        return not self.is_full if held is None else _goes_on(branch, held.tokens)

    def hold(self, branch: Branch) -> None:
        """Hold a branch, in place of a shorter one for the same outcome."""
        self._held[branch.root] = branch

    def drop_until(self, position: int) -> None:
        """Drop branches below ``position``, where the tokens are final now."""
        if self._held:
            self._held = {
                root: branch for root, branch in self._held.items() if root[0] >= position
            }

    def drop_all(self) -> None:
        """Drop all branches: another epoch begins, for a reason that is not known here."""
        self._held = {}

    def rejected(self, position: int, token: int) -> Branch | None:
        """Begin an epoch with the final ``token`` at ``position``; return the branch to take."""
        taken = self._held.get((position, token))
        self._held = {}
        self._root = (position, token)
        self._begun_with = () if taken is None else taken.tokens
        self.num_taken += taken is not None
        return taken

    def begun(self) -> None:
        """Handle other tokens of the epoch: from now on no late branch begins it or follows."""
        self._root = None

    def late(self, branches: Iterable[Branch]) -> Branch | None:
        """Return the branch of the epoch before that begins this one, if it is among them.

        It is returned again when it has further tokens.
        """
        found = None
        for branch in branches:
            if branch.root == self._root and _goes_on(branch, self._begun_with):
                self.num_taken += not self._begun_with
                self._begun_with = branch.tokens
                found = branch
        return found

    def check_integrity(self, verified_position: int) -> None:
        """Raise AssertionError if too many branches are held, or one whose outcome is known."""
        if len(self._held) > self.max_branches:
            raise AssertionError(f"holds {len(self._held)} branches, {self.max_branches} allowed")
        if any(position < verified_position for position, _ in self._held):
            raise AssertionError(f"holds a branch below the verified position: {self!r}")


def _goes_on(branch: Branch, tokens: tuple[int, ...]) -> bool:
    """Whether a branch has ``tokens`` and further ones."""
    return len(branch.tokens) > len(tokens) and branch.tokens[: len(tokens)] == tokens
