"""Turns logits into tokens. Nothing here runs a model or knows a sequence."""
