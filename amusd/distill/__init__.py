"""Training of a draft model on a verify model's own words: torch and files here, never gRPC."""
