"""Several servers of one catalog: which one answers a question, and how many it takes."""
