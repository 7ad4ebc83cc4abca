"""The native engine: Llama-like models on CPU in C, and what Python needs to call it.

Nothing here selects runners, manages the KV cache or turns logits into tokens.
"""
