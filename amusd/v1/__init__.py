"""Generated stubs of protos/amusd/v1; nothing else."""
