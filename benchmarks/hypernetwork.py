"""`python -m benchmarks.hypernetwork`: generating an adapter from a video's features, in time and memory.

Arms: `blocks`, this project's hypernetwork, a layer at a time and a block of tokens at a time; `stacked`, the same
mathematics written plainly for all layers at once, with keys and values of tokens and latents concatenated, as the
published code computes it. Random weights and features at the released shapes; both arms get the same.

Each arm's peak memory is taken in a fresh process, above what that held when the weights and the features lay in
memory: the process's own high-water mark, or on a GPU what torch has allocated there. Times alternate between the arms
within one process; their ratio is that of the medians. On a GPU, seconds end when its result is there, fp32 is TF32 as
in a worker, and `launches` are the kernels and copies of one pass, by torch's profiler.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from f2l_vllm.bench import record
from f2l_vllm.bench.hypernetwork_shapes import SHAPES, random_hypernetwork
from f2l_vllm.hypernetwork.adapter import Factors
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.model import Hypernetwork
from f2l_vllm.hypernetwork.perceiver import EXPANSION
from f2l_vllm.hypernetwork.precision import use_tf32

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (800, 3200, 12800)
SPARE_GIB = 4.0  # left to the rest of the machine when deciding whether the stacked arm fits


def main() -> None:
    """Measure and write, or measure one arm's memory for the process that does."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=3, help="times each arm runs, at 3,200 tokens and below")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory-of", nargs=4, metavar=("ARM", "SHAPE", "DTYPE", "TOKENS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if device.type == "cuda":
        use_tf32()
    if options.memory_of:
        arm, shape, dtype, tokens = options.memory_of
        print(json.dumps(peak_memory(arm, shape, dtype, int(tokens), device)))
        return
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "matrix_product_gflops": {name: gflops(dtype, device) for name, dtype in DTYPES.items()},
    }
    for shape in options.shapes:
        for tokens in options.tokens:
            results[f"{shape}, {tokens} tokens"] = measure(shape, tokens, options.rounds, device)
    record.write(
        options.json,
        {
            "shapes": {name: SHAPES[name].hypernetwork.to_dict() for name in options.shapes},
            "tokens": options.tokens,
            "rounds": options.rounds,
            "threads": options.threads,
        },
        results,
    )


def measure(shape: str, tokens: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds and peak memory of every arm at one size."""
    config = SHAPES[shape].hypernetwork
    inputs = config.num_layers * tokens * config.feature_size * 4 / 2**30
    free = free_gib(device)
    arms = [("blocks", "fp32"), ("blocks", "bf16")]
    row: dict[str, Any] = {"features_fp32_gib": round(inputs, 3)}
    for dtype in DTYPES:
        needed = 1.5 * inputs + stacked_gib(config, tokens, DTYPES[dtype])
        if needed + SPARE_GIB < free:
            arms.append(("stacked", dtype))
        else:
            row[f"stacked, {dtype}"] = f"left out: needs about {needed:.1f} GiB, {free:.1f} GiB are free"
    for arm, dtype in arms:
        row[f"{arm}, {dtype}"] = fresh_process(arm, shape, dtype, tokens, device)
    seconds, difference = times(config, tokens, arms, rounds if tokens <= 3200 or device.type == "cuda" else 1, device)
    for (arm, dtype), values in seconds.items():
        row[f"{arm}, {dtype}"]["seconds"] = {"median": round(statistics.median(values), 5), "all": values}
    if ("stacked", "fp32") in arms:
        stacked = row["stacked, fp32"]["seconds"]["median"]
        for arm, dtype in arms:
            row[f"{arm}, {dtype}"]["time_over_stacked_fp32"] = round(
                row[f"{arm}, {dtype}"]["seconds"]["median"] / stacked, 3
            )
        row["largest_difference_fp32_over_largest_value"] = difference
    return row


def free_gib(device: torch.device) -> float:
    """Memory that nobody uses, where this device computes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    meminfo = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) / 2**20 for line in meminfo if line.startswith("MemAvailable"))


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gflops(dtype: torch.dtype, device: torch.device, rounds: int = 7) -> float:
    """What torch's own product of square matrices does on this device, 10^9 operations a second, median."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = torch.ones(2, size, size, dtype=dtype, device=device)
    F.linear(a, b)
    seconds = []
    for _ in range(rounds):
        wait(device)
        started = time.perf_counter()
        F.linear(a, b)
        wait(device)
        seconds.append(time.perf_counter() - started)
    return round(2 * size**3 / statistics.median(seconds) / 1e9, 1)


def fresh_process(arm: str, shape: str, dtype: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """What `peak_memory` finds in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.hypernetwork", "--device", str(device)]
    command += ["--memory-of", arm, shape, dtype, str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def peak_memory(arm: str, shape: str, dtype: str, tokens: int, device: torch.device) -> dict[str, Any]:
    """GiB this process holds at most while generating, above what it holds before; on a GPU also its launches."""
    config = SHAPES[shape].hypernetwork
    hyper = random_hypernetwork(config, DTYPES[dtype]).to(device)
    features = make_features(config, tokens, DTYPES[dtype]).to(device)
    # The libraries' own buffers and threads come with their first use and do not grow with the video.
    run(arm, hyper, features[:, :32].contiguous())
    if device.type == "cuda":
        wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run(arm, hyper, features)
        peak = (torch.cuda.max_memory_allocated(device) - held) / 2**30
        return {"peak_above_inputs_gib": round(peak, 4), "launches": launches(arm, hyper, features)}
    before = record.restart_high_water_mark()
    run(arm, hyper, features)
    return {"peak_above_inputs_gib": round((record.peak_memory_mib(os.getpid()) - before) / 1024, 4)}


def launches(arm: str, hyper: Hypernetwork, features_LTD: Tensor) -> int:
    """Kernels and copies that a GPU is given in one pass."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        run(arm, hyper, features_LTD)
        wait(features_LTD.device)
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or ())


def times(
    config: HypernetworkConfig, tokens: int, arms: list[tuple[str, str]], rounds: int, device: torch.device
) -> tuple[dict[tuple[str, str], list[float]], float | None]:
    """Seconds of every arm, taking turns; and how far the fp32 arms' factors are apart."""
    hypers = {name: random_hypernetwork(config, dtype).to(device) for name, dtype in DTYPES.items()}
    features = {"fp32": make_features(config, tokens, torch.float32).to(device)}
    features["bf16"] = features["fp32"].bfloat16()
    seconds: dict[tuple[str, str], list[float]] = {arm: [] for arm in arms}
    factors: dict[tuple[str, str], Factors] = {}
    for arm, dtype in arms:
        run(arm, hypers[dtype], features[dtype][:, :32].contiguous())
    for _ in range(rounds):
        for arm, dtype in arms:
            wait(device)
            started = time.perf_counter()
            factors[arm, dtype] = run(arm, hypers[dtype], features[dtype])
            wait(device)
            seconds[arm, dtype].append(round(time.perf_counter() - started, 5))
    if ("stacked", "fp32") not in arms:
        return seconds, None
    pairs = zip(factors["blocks", "fp32"]["down_proj"], factors["stacked", "fp32"]["down_proj"], strict=True)
    return seconds, max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def make_features(config: HypernetworkConfig, tokens: int, dtype: torch.dtype) -> Tensor:
    """Random features [L, T, D]."""
    generator = torch.Generator().manual_seed(1)
    features_LTD = torch.empty(config.num_layers, tokens, config.feature_size, dtype=dtype)
    for layer in features_LTD:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    return features_LTD


@torch.no_grad()
def run(arm: str, hyper: Hypernetwork, features_LTD: Tensor) -> Factors:
    """One chunk's factors, as one of the arms computes them."""
    arms: dict[str, Callable[[Hypernetwork, Tensor], Factors]] = {"blocks": Hypernetwork.generate, "stacked": stacked}
    return arms[arm](hyper, features_LTD)


def stacked(hyper: Hypernetwork, features_LTD: Tensor) -> Factors:
    """All layers at once, written plainly with the hypernetwork's weights."""
    config = hyper.config
    weights = dict(hyper.named_parameters())
    prefix = "aggregator.perceiver"

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weights[f"{name}.weight"], 1e-6)

    def mlp(x: Tensor, name: str) -> Tensor:
        return linear(F.silu(linear(x, f"{name}.gate_proj")) * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)

    def resample(context: Tensor, name: str, blocks: int) -> Tensor:
        latents = weights[f"{name}.latents_q"].expand(len(context), -1, -1)
        for layer in (f"{name}.layers.{index}" for index in range(blocks)):
            normed = norm(latents, f"{layer}.input_latents_layernorm")
            source = torch.cat((norm(context, f"{layer}.input_context_layernorm"), normed), dim=1)
            q, k, v = (
                heads(linear(x, f"{layer}.self_attn.{part}_proj"))
                for x, part in ((normed, "q"), (source, "k"), (source, "v"))
            )
            attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
            attended = linear(attended, f"{layer}.self_attn.o_proj")
            latents = latents + norm(attended, f"{layer}.post_attention_layernorm")
            hidden = mlp(norm(latents, f"{layer}.pre_ff_layernorm"), f"{layer}.mlp")
            latents = latents + norm(hidden, f"{layer}.post_ff_layernorm")
        return norm(latents, f"{name}.layernorm")

    context = mlp(features_LTD, f"{prefix}.modality_projection")
    encoded = resample(context, f"{prefix}.encoder", config.num_blocks)
    del context
    factors = hyper.project(resample(encoded, f"{prefix}.decoder", 1)[None])
    return {name: (a[0], b[0]) for name, (a, b) in factors.items()}


def stacked_gib(config: HypernetworkConfig, tokens: int, dtype: torch.dtype) -> float:
    """What the stacked arm's projection alone holds at once: activated gate, up, and their product."""
    return 3 * config.num_layers * tokens * EXPANSION * config.feature_size * dtype.itemsize / 2**30


if __name__ == "__main__":
    main()
