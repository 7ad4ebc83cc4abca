"""What pays: when a pass starts, how far to speculate, which draft source to ask.

Pure: no torch, grpc, asyncio or clock.
"""
