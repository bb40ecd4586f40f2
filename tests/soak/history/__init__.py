"""Histories of several servers of one catalog and one store, and what none of them may show."""
