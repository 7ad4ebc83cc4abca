"""A tokenizer with words, bytes and special tokens, and masks as sets of ids."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from amusd.engine.sampling.constraint_grammar import Mask
from amusd.engine.sampling.constraint_state import ConstraintState
from amusd.sampling.parameters import Constraint, ConstraintKind

_LETTERS = tuple(sorted(pre_tokenizers.ByteLevel.alphabet()))
_MERGES = ("t r", "tr u", "tru e", "n u", "nu l", "nul l", '" :', "a b", "1 2", '{ "', "Ġ {", "a a")
_END, _SECOND_END, _OTHER = "<end>", "<stop>", "<other>"


@dataclass(frozen=True)
class TokenizerFolder:
    """A folder with a tokenizer. The last of its special tokens is in its configuration alone."""

    folder: Path
    tokenizer: Tokenizer
    size: int

    @classmethod
    def save(cls, folder: Path) -> "TokenizerFolder":
        words = [merge.replace(" ", "") for merge in _MERGES]
        vocabulary = {text: index for index, text in enumerate([*_LETTERS, *words])}
        merges = [(first, second) for first, second in (merge.split(" ") for merge in _MERGES)]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(
            [AddedToken(text, special=True) for text in (_END, _SECOND_END)]
        )
        tokenizer.save(str(folder / "tokenizer.json"))
        added = {str(len(vocabulary) + 2): {"content": _OTHER, "special": True}}
        config = json.dumps({"added_tokens_decoder": added})
        (folder / "tokenizer_config.json").write_text(config, encoding="utf-8")
        return cls(folder, tokenizer, len(vocabulary) + 3)

    @property
    def ends(self) -> tuple[int, int]:
        """The end-of-text tokens."""
        return self.size - 3, self.size - 2

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def id(self, text: str) -> int:
        """Return the token that is a text."""
        (token,) = self.ids(text)
        return token

    def text(self, ids: Iterable[int]) -> str:
        """Return the text of tokens, without the special ones."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def regex(text: str) -> Constraint:
    return Constraint(ConstraintKind.REGEX, text)


def schema(value: object) -> Constraint:
    return Constraint(ConstraintKind.JSON_SCHEMA, json.dumps(value))


def grammar(text: str) -> Constraint:
    return Constraint(ConstraintKind.GRAMMAR, text)


def ids_of(mask: Mask) -> set[int]:
    """Return the tokens that a mask allows."""
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def allowed(state: ConstraintState, output: Iterable[int] = ()) -> set[int]:
    """Return the tokens that may follow an output."""
    return ids_of(state.masks(list(output), [])[0])
