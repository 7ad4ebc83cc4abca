"""What is worth its time: when a pass starts, how far to speculate, which draft source to use.

Pure: no torch, grpc, asyncio or clock.
"""
