"""`f2l-vllm demo`: goes the whole way once, with the stock openai client, and compares the numbers that matter."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import typer
from openai import OpenAI
from rich.console import Console
from rich.table import Table

from f2l_vllm.cli.progress import status
from f2l_vllm.client import FROM_FRAMES, NotInternalized, ask, upload
from f2l_vllm.server_process import ServerFailed, ServerProcess

console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
QUESTIONS = ("What is the background?", "How many shapes are there?", "Describe the video.")
_TOKENS = 48  # of an answer, at most


def demo(video: Path | None, model: str, hypernetwork: str | None, port: int | None) -> None:
    """Run the demo; exit with 1 when any step fails."""
    with tempfile.TemporaryDirectory(prefix="f2l-demo-") as folder:
        truth = None
        if video is None:
            video = Path(folder) / "shapes.mp4"
            truth = make_video(video)
            console.print(f"made a video of moving shapes, {video.stat().st_size / 1e3:.0f} kB: {truth}")
        started = time.perf_counter()
        flags = [] if hypernetwork is None else ["--hypernetwork", hypernetwork]
        server = ServerProcess(model, Path(folder) / "home", *flags, port=port)
        try:
            with status(console, f"starting Ray, hypernetwork worker and vLLM (log: {server.log})"):
                server.wait_ready()
            console.print(f"server ready after {time.perf_counter() - started:.1f} s: {server.url}")
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none")
            started = time.perf_counter()
            [file] = upload(client, video)
            seconds = time.perf_counter() - started
            console.print(f"uploaded and internalized in {seconds:.2f} s; {_adapter_line(file)}")
            ask(client, file.id, "Hello", _TOKENS)  # the engine's first question pays for its warm-up
            console.print(_compare(client, file.id))
        except (ServerFailed, NotInternalized) as error:
            console.print(str(error), style="red", markup=False, highlight=False)
            raise typer.Exit(1) from error
        finally:
            server.stop()
    console.print("server stopped")


def make_video(path: Path) -> str:
    """Write an mp4 of a scene that the default model has never seen; returns what happens in it."""
    from f2l_vllm import torch_shims

    torch_shims.install()
    from f2l_vllm.synthetic import phrases
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    scene = sample_scenes(1, seed=int(time.time()), split="held-out")[0]
    write_mp4(scene, path, size=(320, 240))
    return phrases.caption(scene)


def _compare(client: OpenAI, file_id: str) -> Table:
    table = Table(title="the same question, from the adapter and from the frames in context")
    for name in ("question", "from", "answer"):
        table.add_column(name)
    for name in ("prompt tokens", "first token, ms"):
        table.add_column(name, justify="right")
    for question in QUESTIONS:
        for frames in (False, True):
            answer = ask(client, file_id, question, _TOKENS, FROM_FRAMES if frames else None)
            source = "frames" if frames else "adapter"
            row = (answer.text, str(answer.prompt_tokens), f"{answer.ttft * 1e3:.0f}")
            table.add_row("" if frames else question, source, *row)
    return table


def _adapter_line(file: Any) -> str:
    details = file.model_extra["f2l"]
    return (
        f"rank {details['rank']} adapter, {details['adapter_bytes'] / 1e3:.0f} kB, from {details['frames']} frames; "
        f"{details['visual_tokens']} visual tokens saved in every question"
    )
