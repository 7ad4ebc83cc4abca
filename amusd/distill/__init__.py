"""Distillation of draft models: torch and files, never gRPC."""
