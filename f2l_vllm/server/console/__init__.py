"""The page for people at `/console`: its files, and the routes that only it needs."""
