"""vLLM's side of the base models: the class that serves each family, and the loader that decodes videos for all."""
