"""Loads models onto devices and describes them. Nothing here runs a batch."""
