"""What a request asks of sampling. Pure: no tensors, no grpc, no model."""
