"""vLLM's side of the base models: the class that serves each family, and the loader by which all decode videos."""
