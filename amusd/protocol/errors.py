"""The errors of this project. Each message is one line that says what to do.

    AmusdError
    ├── InvalidInputError     the request itself is wrong, or larger than this service ever takes
    ├── PreconditionError     the request does not fit the present state
    ├── UnknownSessionError   no session of that name is open
    ├── DuplicateSessionError a session of that name is open already
    ├── LimitExceededError    the request is fine, but too much beside the others
    │   └── CacheFullError    no KV cache is left beside the open sessions
    ├── NotServedError        the request asks for what this version cannot do
    ├── InternalError         a service failed on the request; it may fail on it again
    │   └── NotFiniteError    a model computed NaN or infinity
    └── UnavailableError      a service is loading, draining, gone or out of reach
        └── StatusLostError   a call has ended, and its status was lost

``amusd.rpc.faults`` is the only place that maps them to gRPC statuses.
"""


class AmusdError(Exception):
    """Root of all errors that AMUSD raises on purpose."""


class InvalidInputError(AmusdError):
    """The request itself is wrong, whatever the state."""


class PreconditionError(AmusdError):
    """The request does not fit the present state, and has not changed it."""


class UnknownSessionError(AmusdError):
    """No session of that name is open here."""


class DuplicateSessionError(AmusdError):
    """A session of that name is open already."""


class LimitExceededError(AmusdError):
    """A limit would be exceeded. The same request may pass later."""


class CacheFullError(LimitExceededError):
    """No KV cache is left beside the open sessions. It comes free when sessions end."""


class NotServedError(AmusdError):
    """The request asks for what this version cannot do."""


class InternalError(AmusdError):
    """A service failed while it computed the request, which may be the cause."""


class NotFiniteError(InternalError):
    """A model computed NaN or infinity, so there is no next token."""


class UnavailableError(AmusdError):
    """A service is loading, draining, gone or out of reach."""


class StatusLostError(UnavailableError):
    """A call has ended, and its status was lost. The same call, made again, may return it."""
