"""`python -m f2l_vllm.doctor.engine_child REQUEST ANSWERS`: one engine, in a process of its own, answers prompts.

The environment says which model runner it has, which vLLM reads once in a process. The process ends with the one that
holds the other end of its standard input.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from f2l_vllm.files import write_whole
from f2l_vllm.lifeline import end_with_writer


def main(request: dict[str, Any]) -> dict[str, Any]:
    """Load the engine, ask each batch at once, and say what ran.

    Args:
        request: `model`, `engine` (arguments of `vllm.LLM`), `adapters` (directories by name), `max_tokens`, and
            `batches` of rows, each with the parts of a user's turn (`content`) and the name of an `adapter` or None.

    Returns:
        `runner`, `graphs`, `dtype`, and for each row of `batches` its `prompt`, `tokens` and their `logprobs`.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(request["model"], **request["engine"])
    numbers = enumerate(request["adapters"].items(), 1)
    adapters = {name: LoRARequest(name, number, path) for number, (name, path) in numbers}
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, logprobs=0)
    batches = []
    for rows in request["batches"]:
        chats: Any = [[{"role": "user", "content": row["content"]}] for row in rows]
        chosen: Any = [adapters[row["adapter"]] if row["adapter"] else None for row in rows]
        outputs = llm.chat(chats, sampling, lora_request=chosen, use_tqdm=False)
        batches.append([_answer(output) for output in outputs])
    config = llm.llm_engine.vllm_config
    mode = config.compilation_config.cudagraph_mode
    return {
        "runner": "V2" if config.use_v2_model_runner else "V1",
        "graphs": getattr(mode, "name", str(mode)),
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "batches": batches,
    }


def _answer(output: Any) -> dict[str, Any]:
    completion = output.outputs[0]
    steps = zip(completion.logprobs or [], completion.token_ids, strict=False)
    return {
        "prompt": list(output.prompt_token_ids),
        "tokens": list(completion.token_ids),
        "logprobs": [step[token].logprob for step, token in steps],
        "reason": completion.finish_reason,
    }


if __name__ == "__main__":
    end_with_writer(0)
    asked, answered = map(Path, sys.argv[1:])
    write_whole(answered, json.dumps(main(json.loads(asked.read_text()))))
