"""What is known of files, adapters and jobs, in SQLite or PostgreSQL, and which changes of state there are.

Imports no torch; knows nothing of HTTP, Ray or vLLM.
"""
