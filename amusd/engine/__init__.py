"""Models on a device: token ids in, token ids out; no gRPC, no asyncio, no session logic."""
