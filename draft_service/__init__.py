"""The draft service: a small model that proposes tokens without pause. It never verifies."""
