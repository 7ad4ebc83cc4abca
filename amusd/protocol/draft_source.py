"""Where a drafted token comes from."""

import enum


class DraftSource(enum.Enum):
    """What wrote a proposed token."""

    MODEL = "model"
    LOOKUP = "lookup"


ALL_SOURCES = frozenset(DraftSource)
