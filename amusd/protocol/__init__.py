"""The rules of one session: events, ledger, and the session as either service sees it.

Pure: no torch, grpc, asyncio or clock.
"""
