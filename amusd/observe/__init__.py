"""What a service tells of itself: metrics, traces, log lines; never a prompt or an output."""
