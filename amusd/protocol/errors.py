"""The errors a caller can cause or meet. Each message is one line that says what to do.

    AmusdError
    ├── InvalidInputError     the request itself is wrong
    ├── PreconditionError     the request does not fit the state it meets
    ├── UnknownSessionError   no session of that name is open
    ├── DuplicateSessionError a session of that name is open already
    ├── LimitExceededError    the request is fine but over a limit
    │   └── CacheFullError    no memory is left beside the open sessions
    ├── NotServedError        the request asks for what this version cannot do
    └── UnavailableError      a service is loading, draining, gone or out of reach
        └── StatusLostError   a call has ended, and why it has was lost

How they become gRPC statuses stands in ``amusd.rpc.faults``, and nowhere else.
"""


class AmusdError(Exception):
    """Root of every error that AMUSD raises on purpose."""


class InvalidInputError(AmusdError):
    """The request itself is wrong, whatever the state."""


class PreconditionError(AmusdError):
    """The request does not fit the state it meets, and has not changed it."""


class UnknownSessionError(AmusdError):
    """No session of that name is open here."""


class DuplicateSessionError(AmusdError):
    """A session of that name is open already."""


class LimitExceededError(AmusdError):
    """A limit would be exceeded; the same request may pass later or with other limits."""


class CacheFullError(LimitExceededError):
    """No memory for keys and values is left beside the open sessions; there will be again."""


class NotServedError(AmusdError):
    """The request asks for what this version cannot do."""


class UnavailableError(AmusdError):
    """A service is loading, draining, gone or out of reach."""


class StatusLostError(UnavailableError):
    """A call has ended, and the status that says why was lost; the same call may tell it."""
