"""Frames in, LoRA factors out: frozen encoder, Perceiver, head, composition, checkpoints.

Knows transformers and torch, and nothing of vLLM, Ray or HTTP. The modules that are needed before anything is loaded
(`locate`, `config`) import neither.
"""
