"""From the bytes of a video to sampled frames: probe, limits, decode, sample. Knows nothing of models, HTTP or vLLM."""
