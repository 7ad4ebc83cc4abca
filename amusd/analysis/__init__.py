"""What happened in a generation: statistics, timelines, comparisons of outputs.

Pure: no torch, grpc, asyncio or clock.
"""
