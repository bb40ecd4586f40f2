"""`python -m benchmarks.startup`: start-up and its steps, upload to ready, time to first token and peak memory of a
served model.

Every video is fresh. For each, the same question is asked once from its adapter and once from its frames in context,
in turn and each first as often as second, so neither finds the other's prefix cache: adapters and frames share no
prompt beyond the first tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from openai import OpenAI

from f2l_vllm import torch_shims
from f2l_vllm.bench import record
from f2l_vllm.client import FROM_FRAMES, ask, upload
from f2l_vllm.server_process import ServerProcess

torch_shims.install()

_ARMS = {"adapter": None, "frames": FROM_FRAMES}
_ROLES = {
    "hypernetwork worker": "ray::HypernetworkWorker",
    "engine": "VLLM::EngineCore",
    "pool and ray": "ray",
}
# Where a start has come to, by what the log then says.
_STEPS = {
    "the command has checked everything and becomes vLLM": "starting vLLM",
    "the engine has the model's weights": "Loading weights took",
    "the engine has its KV cache": "KV cache size",
    "the API server has the catalog and the store": "data in",
    "the hypernetwork worker is ready": "hypernetwork worker ready",
    "all is ready": "ready: http",
}
_TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="f2l-tiny")
    parser.add_argument("--rounds", type=int, default=3, help="servers started, one after the other")
    parser.add_argument("--videos", type=int, default=16, help="fresh videos per server")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    rounds = [one_round(options.model, options.videos, seed) for seed in range(options.rounds)]
    results: dict[str, Any] = {"start_s": summary([r["start_s"] for r in rounds])}
    for key in ("upload_to_ready_s", "internalize_s", "ttft_adapter_ms", "ttft_frames_ms"):
        results[key] = summary([value for r in rounds for value in r[key]])
    results["ttft_frames_over_adapter"] = round(
        results["ttft_frames_ms"]["median"] / results["ttft_adapter_ms"]["median"], 2
    )
    for key in ("prompt_tokens_adapter", "prompt_tokens_frames"):
        results[key] = summary([value for r in rounds for value in r[key]])
    for key in ("start_steps_s", "start_cpu_s", "peak_memory_mib"):
        results[key] = {what: summary([r[key][what] for r in rounds]) for what in rounds[0][key]}
    record.write(options.json, {"model": options.model, "rounds": options.rounds, "videos": options.videos}, results)


def one_round(model: str, videos: int, seed: int) -> dict[str, Any]:
    """One server from start to stop."""
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    names = ("upload_to_ready_s", "internalize_s", "ttft_adapter_ms", "ttft_frames_ms")
    row: dict[str, Any] = {name: [] for name in (*names, "prompt_tokens_adapter", "prompt_tokens_frames")}
    with tempfile.TemporaryDirectory(prefix="f2l-bench-") as folder:
        paths = [
            write_mp4(scene, Path(folder) / f"{index}.mp4", size=(320, 240))
            for index, scene in enumerate(sample_scenes(videos + 1, seed=seed, split="held-out"))
        ]
        started, began = time.perf_counter(), time.time()
        server = ServerProcess(model, Path(folder) / "home", env={"F2L_LOG_FORMAT": "json"})
        try:
            server.wait_ready()
            row["start_s"] = time.perf_counter() - started
            row["start_steps_s"] = steps(server.log, began)
            row["start_cpu_s"] = by_role(server, cpu_seconds)
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
            for index, path in enumerate(paths):
                started = time.perf_counter()
                [file] = upload(client, path, poll_seconds=0.01)
                seconds = time.perf_counter() - started
                arms = list(_ARMS) if index % 2 else reversed(_ARMS)
                answers = {arm: ask(client, file.id, "Describe the video.", 48, _ARMS[arm]) for arm in arms}
                if index == 0:
                    continue  # the first video pays for warm-up
                row["upload_to_ready_s"].append(seconds)
                row["internalize_s"].append((file.model_extra or {})["f2l"]["internalize_seconds"])
                for arm, answer in answers.items():
                    row[f"ttft_{arm}_ms"].append(answer.ttft * 1e3)
                    row[f"prompt_tokens_{arm}"].append(answer.prompt_tokens)
            row["peak_memory_mib"] = by_role(server, record.peak_memory_mib)
        finally:
            server.stop()
    return row


def steps(log: Path, began: float) -> dict[str, float]:
    """Seconds from the start to each step."""
    events = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    return {
        step: next(datetime.fromisoformat(event["time"]).timestamp() for event in events if mark in event["message"])
        - began
        for step, mark in _STEPS.items()
    }


def cpu_seconds(pid: int) -> float:
    """What a process and the children that it has waited for have taken so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / _TICK


def by_role(server: ServerProcess, of: Callable[[int], float]) -> dict[str, float]:
    """Sums over the processes of each role; of memory, pages that processes share are counted in each."""
    found = {"api server": of(server.process.pid), **dict.fromkeys(_ROLES, 0.0)}
    for pid, command in server.descendants().items():
        role = next((role for role, mark in _ROLES.items() if mark in command), "pool and ray")
        found[role] += of(pid)
    return found


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    ordered = sorted(values)
    return {
        "median": round(statistics.median(ordered), 3),
        "min": round(ordered[0], 3),
        "max": round(ordered[-1], 3),
        "n": len(ordered),
    }


if __name__ == "__main__":
    main()
