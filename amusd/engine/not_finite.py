"""The error for NaN or infinity in the results of a model, with its likely cause."""

from amusd.fleet.model_description import ModelDescription
from amusd.protocol.errors import NotFiniteError


def not_finite(model: ModelDescription) -> NotFiniteError:
    """Return the error of a session for which ``model`` computed NaN or infinity."""
    return NotFiniteError(f"{model.name} computed NaN or infinity: {likely_cause(model.dtype)}")


def likely_cause(dtype: str) -> str:
    """Return why a model may compute NaN in ``dtype``, and what to do about it."""
    if dtype == "float16":
        return "float16 overflows above 65504; start the service with --dtype bfloat16 or float32"
    if dtype == "bfloat16":
        return "try --dtype float32; if it stays, the weights are broken"
    return "the weights are broken, or too large for float32"
