"""Checks that a tokenizer belongs to the verify model: with another one, all text is nonsense."""

from pathlib import Path

import huggingface_hub
from tokenizers import Tokenizer

from amusd.fleet.model_description import BYTES_TOKENIZER, ModelDescription, is_synthetic
from amusd.fleet.vocabulary import Vocabulary, explain_difference
from amusd.library_output import one_line
from amusd.pair import PairError, resolve_model
from amusd.protocol.errors import InvalidInputError

_NAMES = ("the tokenizer", "the verify model")


def check_tokenizer(name: str, model: ModelDescription) -> None:
    """Check that the tokenizer ``name`` maps ids to the same tokens as the verify model.

    A synthetic model has no text of its own, so it takes any tokenizer.

    Raises:
        InvalidInputError: the vocabularies differ, or the tokenizer cannot be read.
    """
    if not name or is_synthetic(model.name) or not model.vocabulary.fingerprint:
        return
    if name == BYTES_TOKENIZER:
        raise InvalidInputError(
            f"the tokenizer {BYTES_TOKENIZER!r} is for synthetic models, and {model.name!r} is "
            "none: leave --tokenizer out"
        )
    difference = explain_difference(_vocabulary(name), model.vocabulary, _NAMES)
    if difference is not None:
        raise InvalidInputError(
            f"the tokenizer of {name!r} does not belong to the verify model {model.name!r}: "
            f"{difference}; name the model's own with --tokenizer, or leave it out"
        )


def _vocabulary(name: str) -> Vocabulary:
    try:
        tokenizer = Tokenizer.from_file(str(_file(name)))
        return Vocabulary.of_ids(tokenizer.get_vocab(with_added_tokens=True))
    except PairError as error:
        raise InvalidInputError(str(error)) from error
    except Exception as error:  # the library raises no narrower type
        raise InvalidInputError(
            f"cannot load the tokenizer of {name!r}: {one_line(error)}; name a folder or a hub id "
            "with tokenizer.json with --tokenizer"
        ) from error


def _file(name: str) -> Path:
    """Return the path of the tokenizer.json of a built-in model, a folder, or a hub id."""
    location = resolve_model(name, "verify")
    folder = Path(location)
    if folder.is_absolute() or folder.is_dir():
        return folder / "tokenizer.json"
    return Path(huggingface_hub.hf_hub_download(location, "tokenizer.json"))
