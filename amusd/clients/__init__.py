"""What the blocking and the asynchronous Python client share; nothing here runs a service."""
