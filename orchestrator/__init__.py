"""The orchestrator: owns the truth about each session and drives draft and verify services."""
