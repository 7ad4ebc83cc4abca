"""Makes the engine for a model's name: synthetic, embedded, a folder, or a hub id."""

from typing import Literal

from amusd.engine.interface import DEFAULT_OPTIONS, Engine, EngineOptions
from amusd.engine.loading.device import DeviceSettings, bind_engine_thread, prepare_torch
from amusd.engine.synthetic import SyntheticEngine, SyntheticModel
from amusd.fleet.model_description import PROMPT_LOOKUP, is_synthetic
from amusd.pair import PairError, resolve_model
from amusd.protocol.errors import InvalidInputError

Role = Literal["draft", "verify"]


def load_model(
    name: str, role: Role, device: DeviceSettings, options: EngineOptions = DEFAULT_OPTIONS
) -> Engine:
    """Load a model onto a device, ready to decode on the calling thread.

    Raises:
        InvalidInputError: the model does not exist or cannot be served.
    """
    if name == PROMPT_LOOKUP:
        raise InvalidInputError(f"{PROMPT_LOOKUP} only drafts: name a model that verifies")
    bind_engine_thread(device)
    if is_synthetic(name):
        return SyntheticEngine(SyntheticModel.parse(name), name, options)
    prepare_torch(device)
    # Importing Transformers takes seconds, so only engines that need it do so.
    from amusd.engine.loading.model_source import ModelSource  # noqa: PLC0415
    from amusd.engine.model_engine import load_engine  # noqa: PLC0415

    source = ModelSource(name, locate_model(name, role), device.device, device.dtype)
    return load_engine(source, role == "draft", options)


def locate_model(name: str, role: Role) -> str:
    """Return the folder of an embedded model, created if necessary; else the name itself.

    Raises:
        InvalidInputError: the embedded pair cannot be created.
    """
    try:
        return resolve_model(name, role)
    except PairError as error:
        raise InvalidInputError(str(error)) from error
