"""The files of a model's tokenizer, for every service. Nothing here imports torch or grpc."""
