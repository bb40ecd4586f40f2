"""What runs in vLLM's own processes: the plugin, the patches, who holds adapters, the flags."""
