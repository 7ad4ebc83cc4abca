"""Fingerprints of vocabularies, and a description of how two of them differ.

If draft and verify model map token ids to different tokens, every proposal is valid but
meaningless. So vocabularies are compared before anything is decoded.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCK_SIZE = 1024

_HOLE = b"\xff\xff\xff\xff"  # in place of the length of a token
_MAX_HOLES = 1 << 20


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Size, SHA-256 and one 64-bit hash per block of ids; describes a vocabulary without tokens."""

    size: int
    fingerprint: str = ""
    block_hashes: tuple[int, ...] = ()

    @classmethod
    def of(cls, tokens: Sequence[str | None]) -> "Vocabulary":
        """Return the description of the vocabulary ``tokens``, listed in the order of their ids.

        None is a hole: an id without a token.
        """
        whole = hashlib.sha256()
        blocks = []
        for start in range(0, len(tokens), BLOCK_SIZE):
            block = hashlib.sha256()
            for token in tokens[start : start + BLOCK_SIZE]:
                if token is None:
                    block.update(_HOLE)
                    continue
                raw = token.encode("utf-8", "surrogatepass")
                block.update(len(raw).to_bytes(4, "big") + raw)
            digest = block.digest()
            whole.update(digest)
            blocks.append(int.from_bytes(digest[:8], "big"))
        return cls(len(tokens), whole.hexdigest(), tuple(blocks))

    @classmethod
    def of_ids(cls, ids: Mapping[str, int]) -> "Vocabulary":
        """Return the description of a vocabulary that maps tokens to ids; ids may be missing.

        Raises:
            ValueError: there is no token, or an id is negative or far beyond the number of tokens.
        """
        if not ids:
            raise ValueError("the vocabulary has no token")
        first, last = min(ids.values()), max(ids.values())
        if first < 0 or last >= len(ids) + _MAX_HOLES:
            raise ValueError(
                f"the vocabulary has {len(ids)} tokens with ids from {first} to {last}: ids start "
                "at 0 and have few holes"
            )
        tokens: list[str | None] = [None] * (last + 1)
        for token in sorted(ids, reverse=True):  # of two tokens with one id the first counts
            tokens[ids[token]] = token
        return cls.of(tokens)

    @property
    def fits_any(self) -> bool:
        """Whether it fits every verify model: n-gram lookup has no vocabulary of its own."""
        return not self.fingerprint


def explain_difference(
    draft: Vocabulary,
    verify: Vocabulary,
    names: tuple[str, str] = ("the draft model", "the verify model"),
) -> str | None:
    """Say in one line how the two vocabularies differ, or return None if they are equal.

    ``names`` say what has each of them.
    """
    if draft.fits_any or draft.fingerprint == verify.fingerprint:
        return None
    if draft.size != verify.size:
        sizes = f"{names[0]} has {draft.size} tokens, {names[1]} {verify.size}"
    else:
        sizes = f"both have {draft.size} tokens"
    pairs = zip(draft.block_hashes, verify.block_hashes, strict=False)
    differing = [index for index, (ours, theirs) in enumerate(pairs) if ours != theirs]
    if not differing:
        return f"{sizes}; the ids they share are the same"
    first = differing[0] * BLOCK_SIZE
    last = min(first + BLOCK_SIZE, draft.size, verify.size) - 1
    return (
        f"{sizes}; they differ in {len(differing)} of {len(draft.block_hashes)} blocks of ids, "
        f"first among ids {first} to {last}"
    )
