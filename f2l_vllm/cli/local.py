"""Commands that need no server of their own: internalize, ask, convert."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from rich.console import Console

from f2l_vllm import models, torch_shims
from f2l_vllm.cli.options import api_url
from f2l_vllm.cli.progress import progress, status
from f2l_vllm.hypernetwork.locate import locate
from f2l_vllm.video.reading import ReadingOptions

if TYPE_CHECKING:
    from f2l_vllm.hypernetwork.adapter import Adapter
    from f2l_vllm.hypernetwork.internalizer import Internalizer

console = Console()


_STAGES = ("decode", "encode", "generate")


def _internalizer(
    model: str, hypernetwork: str | None, reading: ReadingOptions | None = None
) -> tuple[Internalizer, Path]:
    try:
        directory, weights = models.resolve(model), models.resolve_hypernetwork(model, hypernetwork)
        torch_shims.install()
        from f2l_vllm.hypernetwork.internalizer import Internalizer

        with status(console, "loading model and hypernetwork"):
            return Internalizer.load(directory, weights, reading=reading), directory
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _read(internalizer: Internalizer, video: Path) -> Adapter:
    from f2l_vllm.video.errors import VideoError

    with progress(console) as tell:

        def report(stage: str, fraction: float) -> None:
            if stage in _STAGES:
                tell(stage, fraction, 1)

        try:
            return internalizer.internalize(video, on_progress=report)
        except VideoError as error:
            console.print(f"[red]{error.code}[/]: {error}")
            raise typer.Exit(1) from error


def internalize(video: Path, output: Path, model: str, hypernetwork: str | None, reading: ReadingOptions) -> None:
    """Write a video's PEFT adapter to `output`."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} exists already; name a new directory")
    internalizer, directory = _internalizer(model, hypernetwork, reading)
    started = time.perf_counter()
    adapter = _read(internalizer, video)
    adapter.save(output, base_model=models.loadable_name(directory), family=internalizer.encoder.family)
    info = adapter.info
    console.print(
        f"rank {adapter.rank} adapter from {info.frames} frames ({info.visual_tokens} visual tokens) "
        f"in {time.perf_counter() - started:.2f} s: {output}"
    )


def ask(video: Path, question: str, model: str, hypernetwork: str | None, max_tokens: int) -> None:
    """Answer from the adapter with transformers, in this process: a plain text prompt, no visual token."""
    _check_question(question)
    internalizer, _ = _internalizer(model, hypernetwork)
    from f2l_vllm.base_models.text_layers import check_length
    from f2l_vllm.hypernetwork.adapter import apply_adapter

    processor, base = internalizer.processor, cast(Any, internalizer.model)  # transformers leaves `generate` untyped
    message = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        message, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(base.device)
    try:
        check_length(base, inputs["input_ids"].shape[1], max_tokens)  # before the video is read
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    adapter = _read(internalizer, video)
    with status(console, "answering"), apply_adapter(base, adapter):
        output = base.generate(**inputs, do_sample=False, max_new_tokens=max_tokens)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text = processor.decode(answer, skip_special_tokens=True).strip()
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def ask_server(video: Path, question: str, url: str, api_key: str, max_tokens: int) -> None:
    """Upload to a running server and ask there; it internalizes the same bytes only once."""
    from openai import APIError, OpenAI

    from f2l_vllm.client import NotInternalized, upload

    _check_question(question)
    try:
        client = OpenAI(base_url=api_url(url), api_key=api_key)
        with status(console, "uploading and internalizing"):
            [file] = upload(client, video, poll_seconds=0.2)
        answer = client.chat.completions.create(
            model=file.id,
            messages=[{"role": "user", "content": question}],
            max_completion_tokens=max_tokens,
            temperature=0,
        )
    except (APIError, NotInternalized) as error:
        console.print(f"[red]{error.code or type(error).__name__}[/]: {error.message}")
        raise typer.Exit(1) from error
    console.print((answer.choices[0].message.content or "").strip(), markup=False, highlight=False, soft_wrap=True)


def _check_question(question: str) -> None:
    if not question.strip():
        raise typer.BadParameter("the question is empty: ask something")


def convert(checkpoint: str, output: Path, base_model: str | None, dtype: str | None) -> None:
    """Read a hypernetwork through the safe reader and write the safe format, in `dtype` or the file's own."""
    if dtype not in (None, "fp32", "bf16"):
        raise typer.BadParameter(f"--dtype is fp32 or bf16, got {dtype!r}; leave it out to keep the file's own")
    try:
        found = locate(checkpoint, base_model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    torch_shims.install()
    import torch

    from f2l_vllm.hypernetwork.model import Hypernetwork

    dtypes = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16}
    try:
        with status(console, "reading the checkpoint"):
            hypernetwork = Hypernetwork.load(found, base_model=base_model, dtype=None)
            hypernetwork.save(output, dtypes[dtype])
    except (ValueError, FileExistsError) as error:
        raise typer.BadParameter(str(error)) from error
    config = hypernetwork.config
    console.print(f"{output}: rank {config.rank}, {', '.join(config.modules)}, for {config.base_model}")
