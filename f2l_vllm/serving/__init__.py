"""vLLM's server made video-native: plugins, routes, the adapter registry, metrics. The only package besides `cpu` that
touches vLLM, and its internals only through `compat`."""
