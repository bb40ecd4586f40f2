"""`vllm bench serve`, run in this process: vLLM's own client, for what it can send: random text with adapters."""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from f2l_vllm import torch_shims

torch_shims.install()

_PER_REQUEST = {"input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times"}
_TEXTS = {"generated_texts", "errors"}


class TrafficFailed(RuntimeError):
    """Requests failed, or were not of the length that was asked for."""


async def random_text(url: str, model: str, tokenizer: Path, *, log: Path, **traffic: Any) -> dict[str, Any]:
    """Send random text to a server in a closed loop; greedy answers, all of the same length.

    Args:
        url, model, tokenizer, traffic: as `arguments` takes them.
        log: the client's output is appended to this file.

    Returns:
        vLLM's result, without texts and without the values of single requests.

    Raises:
        TrafficFailed: a request was not answered at full length.
    """
    from vllm.benchmarks.serve import main_async

    args = arguments(url, model, tokenizer, **traffic)
    logging.getLogger("vllm").setLevel(logging.ERROR)
    try:
        with log.open("a") as output, contextlib.redirect_stdout(output):
            result: dict[str, Any] = await main_async(args)
    finally:
        gc.unfreeze()  # vLLM's client freezes all objects, and a library complains about that at exit
    wanted = args.num_prompts * args.random_output_len
    if result["completed"] != args.num_prompts or result["total_output_tokens"] != wanted:
        errors = sorted({error for error in result["errors"] if error})
        raise TrafficFailed(
            f"{result['completed']} of {args.num_prompts} requests were answered, with "
            f"{result['total_output_tokens']} of {wanted} tokens: {'; '.join(errors)[:500] or 'no error was given'}"
        )
    return {name: value for name, value in result.items() if name not in _PER_REQUEST | _TEXTS}


def arguments(
    url: str,
    model: str,
    tokenizer: Path,
    *,
    input_tokens: int,
    output_tokens: int,
    requests: int,
    concurrency: int,
    adapters: Sequence[str] = (),
    seed: int = 0,
) -> argparse.Namespace:
    """The arguments of `vllm bench serve`.

    Args:
        url: without `/v1`.
        model: name of the base model on the server.
        tokenizer: the model's directory.
        adapters: names that take turns; without any, the base model answers.
    """
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    chosen = {
        "--backend": "openai",
        "--base-url": url,
        "--endpoint": "/v1/completions",
        "--model": tokenizer,
        "--served-model-name": model,
        "--dataset-name": "random",
        "--random-input-len": input_tokens,
        "--random-output-len": output_tokens,
        "--num-prompts": requests,
        "--max-concurrency": concurrency,
        "--temperature": 0,
        "--seed": seed,
        "--percentile-metrics": "ttft,tpot,itl,e2el",
        "--metric-percentiles": "50,90,99",
        "--ready-check-timeout-sec": 0,
    }
    words = [word for flag, value in chosen.items() for word in (flag, str(value))] + ["--disable-tqdm"]
    if adapters:
        words += ["--lora-assignment", "round-robin", "--lora-modules", *adapters]
    args: argparse.Namespace = parser.parse_args(words)
    return args
