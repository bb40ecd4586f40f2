"""The code that runs in vLLM's own processes: the plugin, the patches, the manager of adapters, the flags."""
