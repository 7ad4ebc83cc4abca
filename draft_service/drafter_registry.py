"""The one place that maps a draft service's settings to its drafter."""

from dataclasses import replace

from amusd.engine.interface import MAX_ALTERNATIVES
from amusd.engine.loading.model_loading import load_model
from amusd.fleet.model_description import PROMPT_LOOKUP
from draft_service.draft_settings import DraftServiceSettings
from draft_service.drafters import Drafter, model_drafter, ngram_drafter
from draft_service.ngram_index import BYTES_PER_TOKEN


def make_drafter(settings: DraftServiceSettings) -> Drafter:
    """Return the drafter that the settings name. A model may take a while to load."""
    engine = settings.engine
    if engine.model == PROMPT_LOOKUP:
        return ngram_drafter(engine.engine_options)
    index_bytes = BYTES_PER_TOKEN if settings.uses_lookup else 0
    options = replace(
        engine.engine_options,
        index_bytes=index_bytes,
        num_alternatives=MAX_ALTERNATIVES if engine.max_branches else 0,
        is_draft=True,
    )
    loaded = load_model(engine.model, "draft", engine.device, options)
    return model_drafter(loaded, with_ngrams=settings.uses_lookup)
