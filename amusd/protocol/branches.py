"""The branches of one epoch that can still be taken: the same rule for all three services.

The rule
- A branch hangs on ``(epoch, position, token)``. The run of the epoch reaches beyond ``position``
  and has another token there.
- As long as no final token stands at ``position``, the branch is held.
- If the run is rejected at ``position`` in favor of ``token``, a held branch begins the next epoch.
  The other branches are dropped.
- A branch that arrives after that begins the epoch too, if nothing of the epoch is known yet.
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
    _held: dict[tuple[int, int], Branch] = field(default_factory=dict)
    _root: tuple[int, int] | None = None  # the rejection that began the epoch, if without a branch

    @property
    def held(self) -> tuple[Branch, ...]:
        """The held branches."""
        return tuple(self._held.values())

    @property
    def is_full(self) -> bool:
        """Whether no further branch can be held."""
        return len(self._held) >= self.max_branches

    def holds(self, branch: Branch) -> bool:
        """Whether a branch for the same outcome is held."""
        return branch.root in self._held

    def hold(self, branch: Branch) -> None:
        """Hold a branch for an outcome that has none yet."""
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
        self._root = None if taken is not None else (position, token)
        return taken

    def begun(self) -> None:
        """Handle the first tokens of the epoch: from now on no late branch begins it."""
        self._root = None

    def late(self, branches: Iterable[Branch]) -> Branch | None:
        """Return the branch of the epoch before that begins this one, if it is among them."""
        for branch in branches:
            if branch.root == self._root:
                self._root = None
                return branch
        return None

    def check_integrity(self, verified_position: int) -> None:
        """Raise AssertionError if too many branches are held, or one whose outcome is known."""
        if len(self._held) > self.max_branches:
            raise AssertionError(f"holds {len(self._held)} branches, {self.max_branches} allowed")
        if any(position < verified_position for position, _ in self._held):
            raise AssertionError(f"holds a branch below the verified position: {self!r}")
