"""Compiles constraints for one model, and keeps the ones used last.

Compiling takes from a millisecond to seconds, so it is done beside the engine thread: ``prepare``
may be called on any thread. What it returns keeps a constraint compiled. The masks of a sequence
belong to the engine thread.
"""

import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import llguidance

from amusd.engine.sampling.constraint_check import ConstraintCheck
from amusd.engine.sampling.constraint_grammar import (
    Mask,
    fill,
    grammar_of,
    new_matcher,
    new_row,
    refusal,
)
from amusd.engine.sampling.constraint_state import ConstraintState
from amusd.engine.sampling.constraint_trial import COMPILE_STACK_BYTES, run_with_stack
from amusd.library_output import cause_of
from amusd.protocol.errors import InvalidInputError, NotServedError
from amusd.sampling.parameters import Constraint
from amusd.tokenizer.model_tokenizer import make_tokenizer
from amusd.tokenizer.tokenizer_files import read_tokenizer_files

_MAX_KEPT = 64
"""Constraints that stay compiled without a session, and refused ones that are remembered."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class CompiledConstraint:
    """A compiled constraint at the start of an output. The engine thread copies it."""

    matcher: llguidance.LLMatcher


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The tokens of a model as the library sees them.

    ``num_ids`` is the number of ids of the tokenizer or the model, whichever is larger.
    """

    tokenizer: llguidance.LLTokenizer
    check: ConstraintCheck
    mask_of_end: Mask

    @property
    def num_ids(self) -> int:
        return self.tokenizer.vocab_size


class ConstraintCompiler:
    """Compiles constraints over the tokens of one model. The tokenizer loads with the first."""

    def __init__(
        self, location: str, vocabulary_size: int, eos_token_ids: Sequence[int] = ()
    ) -> None:
        """Compile for a model.

        Args:
            location: folder or hub id of the model's tokenizer; empty: it has none.
            vocabulary_size: number of token ids that the model has logits for.
            eos_token_ids: the model's end-of-text tokens.
        """
        self._location = location
        self._vocabulary_size = vocabulary_size
        self._eos_token_ids = tuple(eos_token_ids)
        self._loading = threading.Lock()
        self._loaded: _Tokens | str | None = None  # a text says why it cannot be loaded
        self._changing = threading.Lock()
        self._compiled: weakref.WeakValueDictionary[Constraint, CompiledConstraint] = (
            weakref.WeakValueDictionary()
        )
        # The constraints used last, and why others are refused; the oldest first.
        self._kept: OrderedDict[Constraint, CompiledConstraint | str] = OrderedDict()

    def prepare(self, constraint: Constraint) -> CompiledConstraint:
        """Return a constraint compiled. Any thread may call it; it takes up to some seconds.

        Raises:
            InvalidInputError: the constraint is malformed, is too complex, or no output matches it;
                or the tokenizer of the model cannot be loaded.
            NotServedError: the model has no end-of-text token, or no tokenizer.
        """
        found = self._find(constraint)
        if found is None:
            tokens = self._tokens()
            grammar = grammar_of(constraint)
            found = tokens.check.reason_against(grammar) or _compile(tokens, grammar)
            self._keep(constraint, found)
        if isinstance(found, str):
            raise refusal(constraint.kind, found)
        return found

    def state(self, constraint: Constraint) -> ConstraintState:
        """Return the state of a new sequence, at once if the constraint is prepared.

        Raises:
            InvalidInputError: as ``prepare``.
            NotServedError: as ``prepare``.
        """
        compiled, tokens = self.prepare(constraint), self._tokens()
        return ConstraintState(
            compiled.matcher, tokens.mask_of_end, tokens.num_ids, self._vocabulary_size
        )

    def close(self) -> None:
        """End the process that tries out constraints, if there is one."""
        with self._loading:
            if isinstance(self._loaded, _Tokens):
                self._loaded.check.close()

    def _find(self, constraint: Constraint) -> CompiledConstraint | str | None:
        with self._changing:
            found = self._compiled.get(constraint) or self._kept.get(constraint)
            if constraint in self._kept:
                self._kept.move_to_end(constraint)
            return found

    def _keep(self, constraint: Constraint, found: CompiledConstraint | str) -> None:
        with self._changing:
            self._kept[constraint] = found
            if isinstance(found, CompiledConstraint):
                self._compiled[constraint] = found
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)

    def _tokens(self) -> _Tokens:
        if not self._location and not self._eos_token_ids:
            raise NotServedError(
                "the model has neither a tokenizer nor an end-of-text token: send no constraint, "
                "or use another model"
            )
        if not self._eos_token_ids:
            raise NotServedError(
                "the model has no end-of-text token to end a constrained output: name one in its "
                "generation_config.json, or send no constraint"
            )
        with self._loading:
            if self._loaded is None:
                self._loaded = self._load()
            if isinstance(self._loaded, str):
                raise InvalidInputError(
                    f"the model takes no constraint: its tokenizer cannot be used "
                    f"({self._loaded}); send no constraint, or add a tokenizer.json to the model"
                )
            return self._loaded

    def _load(self) -> _Tokens | str:
        try:
            tokenizer = make_tokenizer(read_tokenizer_files(self._location)).tokenizer
            last_id = max(tokenizer.get_vocab(with_added_tokens=True).values())
            text, num_ids = tokenizer.to_str(), max(last_id + 1, self._vocabulary_size)
            made = llguidance.LLTokenizer(
                text, n_vocab=num_ids, eos_token=list(self._eos_token_ids)
            )
        except (OSError, ValueError, ImportError) as error:
            return cause_of(error)
        check = ConstraintCheck(text, num_ids, self._eos_token_ids)
        return _Tokens(made, check, _mask_of(self._eos_token_ids, num_ids))


def _compile(tokens: _Tokens, grammar: str) -> CompiledConstraint | str:
    """Return the compiled grammar, or why it is refused."""
    matcher = run_with_stack(COMPILE_STACK_BYTES, lambda: new_matcher(tokens.tokenizer, grammar))
    # The first mask is the slowest one: it fills what all sequences begin with.
    reason = matcher.get_error() or fill(matcher, new_row(tokens.num_ids))
    return reason or CompiledConstraint(matcher)


def _mask_of(token_ids: Sequence[int], num_ids: int) -> Mask:
    row = new_row(num_ids)
    for token in token_ids:
        row[token // 32] |= 1 << token % 32
    return row
