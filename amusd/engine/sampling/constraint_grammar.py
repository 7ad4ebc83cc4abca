"""Constraints as grammars of llguidance: what each one means, and the limits of its library.

The limits count work, so a constraint is refused at the same place on every machine.
"""

import re

import llguidance
import numpy as np
import numpy.typing as npt

from amusd.protocol.errors import InvalidInputError
from amusd.sampling.parameters import Constraint, ConstraintKind

Mask = npt.NDArray[np.uint32]
"""Bit ``i % 32`` of word ``i // 32`` says whether token ``i`` is allowed, [ceil(vocabulary/32)]."""

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms
    step_lexer_fuel=200_000,  # 15 ms a mask
    step_max_items=50_000,  # 3 ms a mask
    max_lexer_states=50_000,  # 100 MB a sequence
    max_grammar_size=200_000,
    verbose_errors=False,
)

_MAX_WHITESPACE = 20
# A model that repeats whitespace wherever JSON allows it never ends its output.
_WHITESPACE = rf"[\x20\x0A\x0D\x09]{{1,{_MAX_WHITESPACE}}}"
_MAX_REASON_CHARACTERS = 200


def grammar_of(constraint: Constraint) -> str:
    """Return a constraint as a grammar for ``new_matcher``.

    Raises:
        InvalidInputError: a JSON schema is no JSON document.
    """
    matcher = llguidance.LLMatcher
    match constraint.kind:
        case ConstraintKind.JSON_SCHEMA:
            return _schema_grammar(constraint.text)
        case ConstraintKind.JSON_OBJECT:
            return _schema_grammar('{"type": "object"}')
        case ConstraintKind.REGEX:
            return matcher.grammar_from_regex(constraint.text)
        case ConstraintKind.CHOICES:
            texts = "|".join(_literal(text) for text in constraint.choices)
            return matcher.grammar_from_regex(texts)
        case ConstraintKind.GRAMMAR:
            return matcher.grammar_from_lark(constraint.text)


def refusal(kind: ConstraintKind, reason: str) -> InvalidInputError:
    """Return the error for a constraint that the library refuses for ``reason``."""
    return InvalidInputError(f"the {kind.value} cannot be used: {_brief(reason)}; change it")


def new_matcher(tokenizer: llguidance.LLTokenizer, grammar: str) -> llguidance.LLMatcher:
    """Return a matcher at the start of an output; it is in an error state if it is refused."""
    return llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)


def new_row(num_ids: int) -> Mask:
    """Return an empty mask of ``num_ids`` tokens."""
    return np.zeros((num_ids + 31) // 32, dtype=np.uint32)


def fill(matcher: llguidance.LLMatcher, row: Mask) -> str:
    """Write the mask of the matcher's state into ``row``; return why there is none, or empty."""
    try:
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
    except ValueError as error:
        return str(error)
    return matcher.get_error()


def _schema_grammar(schema: str) -> str:
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_pattern": _WHITESPACE}
        )
    except ValueError as error:
        raise refusal(ConstraintKind.JSON_SCHEMA, str(error)) from error


def _literal(text: str) -> str:
    """Return a regular expression that matches ``text`` alone."""
    return "".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)


def _brief(reason: str) -> str:
    """Return the reason of the library in one line of bounded length."""
    _, _, of_regex = reason.rpartition("\nerror: ")
    first = (of_regex or reason).strip().partition("\n")[0]
    first = re.sub(r"^at \d+\(\d+\): ", "", first)
    if first.startswith("NoExtension"):
        first = "no output matches it"
    return f"{first[:_MAX_REASON_CHARACTERS]}..." if len(first) > _MAX_REASON_CHARACTERS else first
