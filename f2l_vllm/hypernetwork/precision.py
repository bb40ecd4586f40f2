"""In which precision the frozen model reads a video, and the hypernetwork computes, on a device."""

from __future__ import annotations

import torch


def reading_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of the frozen model on this device; None: its checkpoint's own.

    A GPU reads in bf16 whatever the checkpoint stores (SmolVLM2-2.2B is stored in fp32), if it computes in bf16. Only
    then does torch take attention kernels whose memory does not grow with the square of the number of tokens. The
    adapter changes by less than two percent of its effect (`tests/unit/hypernetwork/test_precision.py`).

    A CPU without bf16 instructions reads in fp32: it would convert every bf16 weight at every use, which takes several
    times as long. The weights then take twice a bf16 checkpoint's memory.
    """
    if device.type == "cpu" and not has_bf16_instructions():
        return torch.float32
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return None


def has_bf16_instructions() -> bool:
    """Whether this CPU multiplies bf16 matrices itself."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def use_tf32() -> None:
    """Let this process multiply fp32 matrices in TF32, where the GPU has it: the hypernetwork computes in fp32, and an
    adapter is published in bf16, which has fewer digits than TF32."""
    torch.set_float32_matmul_precision("high")
