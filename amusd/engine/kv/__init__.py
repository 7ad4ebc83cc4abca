"""The KV cache: who holds which tokens, and the tensors behind it. Nothing here runs a model."""
