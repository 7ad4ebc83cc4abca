"""Replicas: which one opens the next session, and which ones serve the same model.

Pure: no torch, grpc, asyncio or clock.
"""
