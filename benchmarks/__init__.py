"""Measurements. Each is a command of its own whose result is committed with its configuration and versions."""
