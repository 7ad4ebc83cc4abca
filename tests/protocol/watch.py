"""Laws between draft and ledger, checked at every event that the ledger takes."""

from collections import Counter
from dataclasses import replace

from amusd.protocol.draft_source import DraftSource
from amusd.protocol.events import Advance, Branch, Decision, Proposal, Rollback
from amusd.protocol.ledger import Ledger


class Watch:
    """Remembers what the draft wrote in the current epoch, and compares it with what is final."""

    def __init__(self, ledger: Ledger, lookahead: int, max_branches: int) -> None:
        self.num_stale = 0
        self.num_late_mismatches = 0
        self.num_grown_late = 0  # branches that went on after they had begun an epoch
        self._ledger = ledger
        self._lookahead = lookahead
        self._max_branches = max_branches
        self._drafted: dict[int, int] = {}
        self._sources: dict[int, DraftSource] = {}
        self._settled: set[int] = set()
        self._head = ledger.verified_position
        self._root: tuple[int, int] | None = None
        self._taken: tuple[int, ...] = ()  # of the branch that began the epoch
        self._branches: tuple[Branch, ...] = ()  # of the last proposal
        self._known_branches: dict[tuple[int, int], Branch] = {}
        self._num_hits = 0
        self._epoch = ledger.epoch
        self.num_proposed_by: Counter[DraftSource] = Counter()
        self.num_right: Counter[DraftSource] = Counter()
        self.num_wrong: Counter[DraftSource] = Counter()

    def before_proposal(self, proposal: Proposal) -> None:
        """The draft stays within its look-ahead: it knows of no more final tokens than we do."""
        self._branches = proposal.branches
        end = proposal.position + len(proposal.tokens)
        if proposal.tokens:
            assert end <= self._ledger.verified_position + self._lookahead, "ran too far ahead"
        if proposal.epoch == self._ledger.epoch:
            self._draft(proposal.position, proposal.tokens, proposal.source)
            for branch in proposal.branches:
                known = self._known_branches.get(branch.root, branch)
                self._known_branches[branch.root] = max(
                    known, branch, key=lambda one: len(one.tokens)
                )
        else:
            if proposal.epoch == self._ledger.epoch - 1:
                self._grow_branch()
            self.num_proposed_by[proposal.source] += len(proposal.tokens)
            self.num_stale += 1

    def _draft(self, position: int, tokens: tuple[int, ...], source: DraftSource) -> None:
        """Record tokens of this epoch; those that are known already count once."""
        for index, token in enumerate(tokens, position):
            if index >= self._head:
                self.num_proposed_by[source] += 1
            if index not in self._settled:
                self._drafted[index] = token
                self._sources[index] = source
        self._head = max(self._head, position + len(tokens))

    def after_proposal(self, decision: Decision) -> None:
        """The same law holds for tokens that come late."""
        self.num_late_mismatches += decision.rollback is not None
        self.after(decision)
        self._take_late_branch()

    def after(self, decision: Decision) -> None:
        """A mismatch is noticed in the very event that brings its second half."""
        final = self._ledger.tokens
        seen = sorted(position for position in self._drafted if position < len(final))
        wrong = [position for position in seen if self._drafted[position] != final[position]]
        right = [position for position in seen if not wrong or position < wrong[0]]
        self.num_right.update(self._sources[position] for position in right)
        if not wrong:
            assert decision.rollback is None, "rolled back without a reason"
            self._settle(seen)
            return
        first = wrong[0]
        self.num_wrong[self._sources[first]] += 1
        epoch = self._ledger.epoch
        # This law does not say how far the draft runs ahead, or how many tokens it collects.
        rollback = decision.rollback and replace(
            decision.rollback, lookahead=0, tokens_per_proposal=0, first_proposal=0
        )
        taken = rollback.branch_tokens if rollback is not None else ()
        assert rollback == Rollback(epoch, first + 1, final[first], branch_tokens=taken), (
            "missed a mismatch"
        )
        rest = final[first + 1 :]
        advance = decision.advance and replace(decision.advance, lookahead=0, tokens_per_proposal=0)
        assert advance == (Advance(epoch, first + 1, rest) if rest else None)
        self._begin_epoch((first, final[first]), taken)

    def after_lost_proposal(self) -> None:
        """After the draft's loss, a branch in a message that comes again is taken on trust."""
        self._num_hits = self._ledger.counts.branch_hits
        for source, outcome in self._ledger.counts.by_source.items():
            self.num_proposed_by[source] = outcome.drafted

    def after_loss(self) -> None:
        """Without a draft a branch that came before its loss can still be taken, one epoch long."""
        if self._ledger.counts.branch_hits > self._num_hits:
            self._num_hits = self._ledger.counts.branch_hits
            final = self._ledger.tokens
            branch = self._known_branches[len(final) - 1, final[-1]]
            self.num_proposed_by[branch.source] += len(branch.tokens)
        if self._ledger.epoch != self._epoch:
            self._epoch = self._ledger.epoch
            self._known_branches.clear()

    def _begin_epoch(self, root: tuple[int, int], taken: tuple[int, ...]) -> None:
        self._drafted.clear()
        self._settled.clear()
        self._head, self._root, self._taken = root[0] + 1, root, ()
        self._epoch = self._ledger.epoch
        self._num_hits = self._ledger.counts.branch_hits
        if taken:
            self._take(self._known_branches[root], taken)
        self._known_branches.clear()

    def _take(self, branch: Branch, taken: tuple[int, ...]) -> None:
        """A branch begins an epoch as if its tokens were proposed in it.

        It is the longest version of it that came, or a shorter one that came again when there was
        room, after the longer one had found none.
        """
        assert branch.tokens[: len(taken)] == taken
        assert branch.tokens == taken or len(self._known_branches) > self._max_branches
        self._draft(branch.position + 1, taken, branch.source)
        self._taken = taken
        final = self._ledger.tokens
        late = [index for index in self._drafted if index < len(final)]
        assert all(self._drafted[index] == final[index] for index in late), "took a wrong branch"
        self.num_right.update(self._sources[index] for index in late)
        self._settle(late)

    def _take_late_branch(self) -> None:
        if self._ledger.counts.branch_hits == self._num_hits:
            return
        self._num_hits = self._ledger.counts.branch_hits
        branch = next(one for one in self._branches if one.root == self._root)
        self._take(branch, branch.tokens)

    def _grow_branch(self) -> None:
        """A branch that has begun the epoch goes on with the tokens that come late."""
        if self._root is None or not self._taken:
            return
        for branch in self._branches:
            start, taken = branch.position + 1, self._taken
            is_next = self._head == start + len(taken) and branch.root == self._root
            if is_next and branch.tokens[: len(taken)] == taken:
                self._draft(start, branch.tokens, branch.source)
                self.num_grown_late += len(branch.tokens) > len(taken)
                self._taken = branch.tokens

    def _settle(self, positions: list[int]) -> None:
        self._settled.update(positions)
        for position in positions:
            del self._drafted[position]
