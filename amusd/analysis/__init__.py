"""Analysis of generations: statistics, timelines, acceptance, comparisons of outputs.

Pure: no torch, grpc, asyncio or clock.
"""
