"""Frames in, LoRA factors out: frozen encoder, Perceiver, head, composition, checkpoints.

Knows transformers and torch, and nothing of vLLM, Ray or HTTP. What is asked before anything is loaded (`locate`,
`config`) imports neither.
"""
