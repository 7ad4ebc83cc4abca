"""The errors of the embedded pair; each message is one line and ends with a remedy.

PairError
├── SourceMissingError   the package with the weights is not installed
├── SourceDamagedError   the weights have another checksum or format
└── CacheError           the cache folder cannot be written
"""


class PairError(RuntimeError):
    """The embedded pair cannot be prepared."""


class SourceMissingError(PairError):
    """The package with the weights is not installed."""


class SourceDamagedError(PairError):
    """The weights have another checksum or format."""


class CacheError(PairError):
    """The cache folder cannot be created, locked or filled."""
