"""Model runners: how a batch goes through a model, and the one place that selects a runner.

Nothing here knows sessions or decides which sequences are in a batch.
"""
