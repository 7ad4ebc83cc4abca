"""The errors of the embedded pair; each message is one line that ends with what to do.

PairError
├── SourceMissingError   the package that carries the weights is not installed
├── SourceDamagedError   the weights are there, but are not the ones this code was written for
└── CacheError           the cache folder cannot be written
"""


class PairError(RuntimeError):
    """The embedded pair cannot be made ready."""


class SourceMissingError(PairError):
    """The package that carries the weights is not installed."""


class SourceDamagedError(PairError):
    """The weights found differ from the ones this code knows."""


class CacheError(PairError):
    """The cache folder cannot be created, locked or filled."""
