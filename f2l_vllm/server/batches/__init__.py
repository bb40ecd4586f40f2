"""Batches: many questions in one file, answered behind everybody's own."""
