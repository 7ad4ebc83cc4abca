"""Loads models onto devices. Nothing here runs a batch."""
