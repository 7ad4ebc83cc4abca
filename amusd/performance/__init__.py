"""The performance model: how fast a deployment decodes, by simulation of the real session logic.

Pure: no torch, grpc, asyncio or clock. Time is simulated.
"""
