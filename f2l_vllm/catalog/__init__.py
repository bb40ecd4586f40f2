"""The records of files, adapters and jobs in SQLite or PostgreSQL, and the allowed changes of state.

Imports no torch; knows nothing of HTTP, Ray or vLLM.
"""
