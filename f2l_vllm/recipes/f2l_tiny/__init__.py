"""The default model, made from nothing: a synthetic world, a tiny SmolVLM that sees it, and the hypernetwork on top."""
