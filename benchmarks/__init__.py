"""Measurements of speed. They use gRPC as the services do."""

from amusd.rpc.tuning import tune_grpc

tune_grpc()  # before any benchmark imports gRPC
