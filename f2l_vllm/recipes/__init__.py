"""How shipped models are made, a folder for each."""
