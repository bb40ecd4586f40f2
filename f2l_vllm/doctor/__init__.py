"""Whether this machine computes what it should: engines and workers against references, and then what it costs."""
