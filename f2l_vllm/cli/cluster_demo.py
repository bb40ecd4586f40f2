"""`f2l-vllm cluster demo`: two engines behind two fronts on this machine, one of which is killed while it is asked."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from openai import APIError, OpenAI
from rich.table import Table

from f2l_vllm.cli import cluster_service as service
from f2l_vllm.cli.cluster_service import console
from f2l_vllm.client import NotInternalized, metric, upload
from f2l_vllm.cluster import local
from f2l_vllm.server_process import LOOPBACK, free_port

_QUESTIONS = ("What is the background?", "How many shapes are there?", "Describe the video.", "Which colors are there?")
_START_SECONDS = 600.0


def run(model: str, videos: int) -> None:
    """Run it in a folder that is removed afterwards.

    Raises:
        ClusterFailed: the service did not start, or did not go on.
    """
    with tempfile.TemporaryDirectory(prefix="f2l-cluster-demo-") as folder:
        home = Path(folder) / "home"
        wanted = local.config(model, [], engines=2, fronts=2, workers=1, host=LOOPBACK, port=free_port())
        began = time.perf_counter()
        url = service.start(wanted, home, None, _START_SECONDS)
        node = local.Node.find(home)
        assert node is not None
        try:
            console.print(f"two engines and two fronts ready after {time.perf_counter() - began:.0f} s: {url}")
            with service.connected(node.address):
                _show(OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120), _clips(folder, videos))
        finally:
            service.stop(node.address, home)
    console.print("stopped")


def _show(client: OpenAI, clips: Sequence[Path]) -> None:
    from f2l_vllm.cluster.state import engines

    began = time.perf_counter()
    try:
        files = [file.id for file in upload(client, *clips)]
    except NotInternalized as error:
        raise local.ClusterFailed(str(error)) from error
    console.print(f"{len(files)} videos uploaded and internalized in {time.perf_counter() - began:.1f} s")

    urls = engines()
    table = Table(title=f"{len(_QUESTIONS)} questions about each video: who answered")
    for name in ("video", *urls):
        table.add_column(name)
    for file in files:
        before = _answered(urls)
        for question in _QUESTIONS:
            _ask(client, file, question)
        after = _answered(urls)
        table.add_row(file, *(str(after[name] - before[name]) for name in urls))
    console.print(table)

    name, url = next(iter(urls.items()))
    killed = _listening(url)
    console.print(f"kill -9 of the server of engine {name} (process {killed}); the questions go on")
    os.kill(killed, signal.SIGKILL)
    began, slowest, asked = time.perf_counter(), 0.0, 0
    while engines().get(name) == url or asked < 3 * len(files):
        started = time.perf_counter()
        _ask(client, files[asked % len(files)], _QUESTIONS[asked % len(_QUESTIONS)])
        slowest, asked = max(slowest, time.perf_counter() - started), asked + 1
    seconds = time.perf_counter() - began
    console.print(f"{asked} questions in {seconds:.1f} s, all answered, the slowest after {slowest:.1f} s")


def _ask(client: OpenAI, file: str, question: str) -> str:
    try:
        answer = client.chat.completions.create(
            model=file, messages=[{"role": "user", "content": question}], temperature=0, max_completion_tokens=24
        )
    except APIError as error:
        raise local.ClusterFailed(f"a question was not answered: {error}") from error
    return answer.choices[0].message.content or ""


def _answered(urls: Mapping[str, str]) -> dict[str, int]:
    """Questions that each engine has answered about videos."""
    return {name: round(metric(url, "f2l_questions_total", outcome="answered")) for name, url in urls.items()}


def _listening(url: str) -> int:
    """The server's process, which has started the others that were given its port."""
    port, parents = url.rpartition(":")[2], dict[int, int]()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_text().split("\0")
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if f"--port={port}" in words or ("--port" in words and port in words):
            parents[int(entry.name)] = parent
    return next(process for process, parent in parents.items() if parent not in parents)


def _clips(folder: str, count: int) -> list[Path]:
    from f2l_vllm import torch_shims

    torch_shims.install()
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    scenes = sample_scenes(count, seed=int(time.time()), split="held-out")
    return [write_mp4(scene, Path(folder) / f"{number}.mp4", size=(160, 120)) for number, scene in enumerate(scenes)]
