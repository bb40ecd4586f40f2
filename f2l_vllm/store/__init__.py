"""Keeps videos and adapters on disk or in an object store, under names that say what they are made of.

Imports no torch; knows nothing of HTTP, Ray or vLLM.
"""
