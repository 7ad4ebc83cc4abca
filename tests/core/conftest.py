"""Property tests of the core run on busy machines too: an example may take its time."""

from hypothesis import settings

settings.register_profile("core", deadline=None)
settings.load_profile("core")
