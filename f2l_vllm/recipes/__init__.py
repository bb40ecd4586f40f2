"""How shipped models are made, one folder per model."""
