"""Model runners: ways to run a batch through a model, and the place that selects one."""
