"""Models on a device: token ids in, token ids out.

Nothing here knows gRPC, asyncio or sessions, or decides what is in a batch.
"""
