"""Frames in, LoRA factors out: frozen encoder, Perceiver, head, composition, checkpoints.

Knows transformers and torch, and nothing of vLLM, Ray or HTTP.
"""

from f2l_vllm import torch_shims

torch_shims.install()
