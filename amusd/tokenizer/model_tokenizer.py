"""A model's tokenizer as its files describe it, with all of its added and special tokens."""

from dataclasses import dataclass

from tokenizers import Tokenizer

from amusd.tokenizer.special_tokens import SpecialTokens, add_tokens, special_tokens_of
from amusd.tokenizer.tokenizer_files import TokenizerFiles


@dataclass(frozen=True, slots=True)
class ModelTokenizer:
    """A tokenizer and its special tokens."""

    tokenizer: Tokenizer
    special_tokens: SpecialTokens


def make_tokenizer(files: TokenizerFiles) -> ModelTokenizer:
    """Return the tokenizer that the files describe.

    Raises:
        ValueError: a file is broken.
    """
    try:
        tokenizer = Tokenizer.from_str(files.tokenizer)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(f"tokenizer.json: {error}") from error
    special_tokens = special_tokens_of(files, tokenizer)
    add_tokens(tokenizer, special_tokens)
    # Both are left over from training: Transformers does not apply them to a prompt either.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return ModelTokenizer(tokenizer, special_tokens)
