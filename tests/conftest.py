"""What all tests share."""

import signal

from hypothesis import settings

# A shell that runs the tests in the background lets them ignore Ctrl-C, and the processes that they
# start would inherit it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Property tests run on busy machines too: an example may take its time.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")
