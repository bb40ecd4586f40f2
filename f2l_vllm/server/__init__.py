"""The API process: vLLM's HTTP server made video-native."""
