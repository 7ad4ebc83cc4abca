"""The OpenAI-compatible HTTP API in front of an orchestrator: JSON and server-sent events to gRPC.

It only translates. Nothing here tokenizes, samples or decides about speculation, and nothing
imports torch or another service.
"""
