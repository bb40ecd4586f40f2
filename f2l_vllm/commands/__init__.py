"""What the command line does, one module per command that is more than a call."""
