"""Commands that train: a hypernetwork for any model from manifests, and the default model from nothing."""

from __future__ import annotations

import json
import time
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from f2l_vllm import torch_shims
from f2l_vllm.cli.progress import EVERY_SECONDS, progress, say

if TYPE_CHECKING:
    from f2l_vllm.train.estimate import Memory
    from f2l_vllm.train.forecast import Forecast
    from f2l_vllm.train.trackers import Trackers

console = Console()

_FINISHED = ("hypernetwork", "training.json")
_SHAPE = ("rank", "latent_size", "latents", "blocks", "self_attention", "modules")
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that holds a run.")]

NewModules = Annotated[str, typer.Option(help="Linears a new hypernetwork adapts, separated by commas.")]


def _set_defaults(context: typer.Context, name: str | None) -> str | None:
    """Let the options that are not given have a preset's values."""
    from f2l_vllm.train.presets import preset

    if name is not None:
        try:
            context.default_map = dict(preset(name))
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return name


def train(
    context: typer.Context,
    output: Annotated[Path, typer.Argument(help="Folder for the hypernetwork; an unfinished run in it goes on.")],
    manifest: Annotated[
        list[str], typer.Option(help="JSONL manifest, or tar files: shards-{000..099}.tar; may be given several times.")
    ],
    preset: Annotated[
        str | None,
        typer.Option(
            is_eager=True,
            callback=_set_defaults,
            help="Values for the options that are not given: paper, paper-self-distillation or composable.",
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="Base model: shipped model, directory, or hub id.")] = "f2l-tiny",
    split: Annotated[str | None, typer.Option(help="Only the manifests' examples of this split.")] = None,
    validation: Annotated[str | None, typer.Option(help="Manifest whose loss is taken before and after.")] = None,
    validate_every: Annotated[
        int | None, typer.Option(min=1, help="Take it after every so many steps, too, and keep the best hypernetwork.")
    ] = None,
    hypernetwork: Annotated[
        str | None, typer.Option(help="Start from this one: directory, released .pt file, or hub id.")
    ] = None,
    rank: Annotated[int, typer.Option(min=1, max=256, help="LoRA rank of a new hypernetwork.")] = 16,
    latent_size: Annotated[int, typer.Option(min=1, help="Width of a new hypernetwork's latents.")] = 512,
    latents: Annotated[int, typer.Option(min=1, help="Latent queries of a new hypernetwork.")] = 8,
    blocks: Annotated[int, typer.Option(min=1, help="Cross-attention layers of a new hypernetwork.")] = 9,
    self_attention: Annotated[
        int, typer.Option(min=0, help="Self-attention layers after each of them, in a new hypernetwork.")
    ] = 0,
    modules: NewModules = "down_proj",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps; default: by --epochs.")] = None,
    epochs: Annotated[float, typer.Option(min=0.0, help="Passes over the videos.")] = 1.0,
    videos: Annotated[int, typer.Option(min=1, help="Videos per step, of all processes and parts together.")] = 8,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Videos that a process computes at once, in place of --videos.")
    ] = None,
    accumulate: Annotated[int, typer.Option(min=1, help="Parts of a step computed one after the other.")] = 1,
    questions: Annotated[int, typer.Option(min=1, help="Most questions about a video in a step.")] = 8,
    frames: Annotated[str, typer.Option(help="Numbers of frames to mix, e.g. 8,12,16; default: the sampling's.")] = "",
    longest_edge: Annotated[
        int | None, typer.Option(min=2, help="Pixels the longer side is read at; default: the hypernetwork's.")
    ] = None,
    chunks: Annotated[str, typer.Option(help="Numbers of chunks to mix, e.g. 1,1,2.")] = "1",
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    muon_rate: Annotated[float | None, typer.Option(help="Of Muon, which then takes the matrices.")] = None,
    ce: Annotated[float, typer.Option(min=0.0, help="Weight of the answers' cross-entropy.")] = 1.0,
    kl: Annotated[float, typer.Option(min=0.0, help="Weight of the divergence from the model with frames.")] = 0.0,
    temperature: Annotated[float, typer.Option(help="Of both distributions in the divergence.")] = 1.0,
    weigh: Annotated[str, typer.Option(help="What counts alike in a step: tokens or answers.")] = "tokens",
    precision: Annotated[str, typer.Option(help="fp32 or bf16; weights stay in fp32.")] = "fp32",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory for more time: the Perceiver is computed again, by layers.")
    ] = False,
    loader_workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode videos ahead; default: by the cores, 0 without a GPU."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, order and choices.")] = 0,
    log_with: Annotated[
        list[str] | None, typer.Option(help="tensorboard, wandb or trackio; may be given several times.")
    ] = None,
    extend: Annotated[
        bool, typer.Option("--extend", help="Go on from the finished run in the folder, for --steps or --epochs more.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Train a hypernetwork from manifests, for any base model. Goes on where it was killed; `torchrun` shares steps."""
    from f2l_vllm import models
    from f2l_vllm.base_models.registry import check_module
    from f2l_vllm.train import folder
    from f2l_vllm.train.data.shards import read_examples
    from f2l_vllm.train.trackers import Trackers, check_trackers

    if hypernetwork is not None and extend:
        raise typer.BadParameter("--extend starts from the hypernetwork in the folder: leave out --hypernetwork")
    if _is_given(context, "micro_batch") and _is_given(context, "videos"):
        raise typer.BadParameter("--videos are of a whole step, --micro-batch of a part of it: give one of them")
    if _is_given(context, "videos"):
        micro_batch = None
    if _is_given(context, "epochs") and not _is_given(context, "steps"):
        steps = None
    if validation is None and not _is_given(context, "validate_every"):
        validate_every = None
    if validate_every is not None and validation is None:
        raise typer.BadParameter("--validate-every needs --validation, the manifest to validate with")
    given = [name for name in _SHAPE if _is_given(context, name)]
    if given and (extend or hypernetwork is not None):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"{flags}: only a new hypernetwork takes its shape from flags; this one has its own")
    try:  # first the checks without torch, which takes seconds to load
        folder.check(output, _FINISHED, overwrite=overwrite, extend=extend)
        check_trackers(log_with or ())
        examples = [example for name in manifest for example in read_examples(name, split)]
        held_out = [] if validation is None else read_examples(validation)
        directory = models.resolve(model)
        weights = None if hypernetwork is None else models.resolve_hypernetwork(model, hypernetwork)
        module_names = [name.strip() for name in modules.split(",")]
        for name in module_names:
            check_module(name)
        numbers = _numbers(frames), _numbers(chunks)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error

    torch_shims.install()
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from f2l_vllm.base_models.text_layers import module_sizes, text_model_of
    from f2l_vllm.evaluation.plots import plot_training
    from f2l_vllm.hypernetwork.config import HypernetworkConfig
    from f2l_vllm.hypernetwork.model import Hypernetwork
    from f2l_vllm.train.forecast import forecast
    from f2l_vllm.train.loader import default_workers
    from f2l_vllm.train.loop import Loop
    from f2l_vllm.train.options import TrainingOptions
    from f2l_vllm.train.trainer import Trainer, train_to

    try:
        options = TrainingOptions(
            epochs=epochs,
            steps=steps,
            videos=videos if micro_batch is None else micro_batch * accumulate,
            accumulate=accumulate,
            questions=questions,
            learning_rate=learning_rate,
            muon_rate=muon_rate,
            ce=ce,
            kl=kl,
            temperature=temperature,
            weigh=weigh,
            frames=numbers[0],
            chunks=numbers[1],
            precision=precision,
            recompute=recompute,
            validate_every=validate_every,
        )
        base = AutoModelForImageTextToText.from_pretrained(str(directory), dtype="auto")
        processor = AutoProcessor.from_pretrained(str(directory))
        run = output / folder.RUN_FOLDER
        loop = Loop(run, seed=seed)
        if loop.is_main:
            folder.prepare(output, overwrite=overwrite, extend=extend)
        loop.wait()
        if micro_batch is not None:
            options = replace(options, videos=options.videos * loop.processes)
        if extend:
            start = run / folder.START_FOLDER / folder.BEST
            hyper = Hypernetwork.load(start, base_model=str(directory))
        elif weights is not None:
            hyper = Hypernetwork.load(weights, base_model=str(directory))
        else:
            torch.manual_seed(seed)
            text_config: Any = text_model_of(base).config
            hyper = Hypernetwork(
                HypernetworkConfig(
                    base_model=model,
                    num_layers=text_config.num_hidden_layers,
                    feature_size=text_config.hidden_size,
                    modules=module_sizes(base, module_names),
                    rank=rank,
                    latent_size=latent_size,
                    num_latents=latents,
                    num_blocks=blocks,
                    num_self_attn_per_block=self_attention,
                )
            )
        if longest_edge is not None:
            hyper.config = replace(hyper.config, longest_edge=longest_edge)
        trackers = Trackers(log_with or (), run, output, context.params) if loop.is_main else nullcontext()
        with progress(console) as tell, trackers as told:
            loop.on_progress = lambda stage, done: tell(stage, done, 1)
            loop.on_log = _Lines(told)
            workers = default_workers(loop.device) if loader_workers is None else loader_workers
            trainer = Trainer(base, processor, hyper, loop)
            if loop.is_main:
                say(console, _needed(trainer.memory(examples, options)))
                say(console, _lasting(forecast(trainer, examples, options, workers)))
            report = train_to(output, trainer, examples, options, held_out, workers)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if loop.is_main:
        plot_training(output / folder.LOG_FILE, output)
        console.print_json(data=report)


def make_model(
    output: Annotated[Path, typer.Argument(help="Folder for model and hypernetwork; an unfinished run goes on.")],
    seed: Annotated[int, typer.Option(help="Seed of data and weights.")] = 0,
    scale: Annotated[float, typer.Option(min=0.001, help="Fraction of the full number of steps.")] = 1.0,
    base: Annotated[
        Path | None,
        typer.Option(help="Train only a hypernetwork, for the model in this folder.", exists=True, file_okay=False),
    ] = None,
    score_scenes: Annotated[int, typer.Option(min=0, help="Held-out scenes asked about in the end.")] = 512,
    overwrite: Overwrite = False,
) -> None:
    """Make the default model from nothing: a synthetic world, a tiny base model, its hypernetwork, their scores."""
    torch_shims.install()
    from f2l_vllm.evaluation.plots import plot_training
    from f2l_vllm.recipes.f2l_tiny.recipe import make_model as run
    from f2l_vllm.train.folder import LOG_FILE

    try:
        with progress(console) as tell:
            report = run(
                output,
                seed=seed,
                scale=scale,
                base=base,
                score_scenes=score_scenes,
                overwrite=overwrite,
                on_progress=lambda stage, done: tell(stage, done, 1),
            )
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if "bytes" in report:  # only in the process that wrote the files
        plot_training(output / LOG_FILE, output)
        console.print(json.dumps(report, indent=2))


class _Lines:
    """Prints the log of a run, a line now and then and one for every validation, and passes all of it to trackers."""

    def __init__(self, trackers: Trackers | None) -> None:
        self._trackers, self._said = trackers, 0.0

    def __call__(self, stage: str, step: int, steps: int, figures: dict[str, float]) -> None:
        if self._trackers is not None:
            self._trackers.log(stage, step, steps, figures)
        at = time.monotonic()
        if at - self._said < EVERY_SECONDS and step != steps and "validation" not in figures:
            return
        self._said = at
        words = [f"step {step} of {steps}", f"loss {figures['smoothed']:.4f}"]
        if "validation" in figures:
            words.append(f"validation loss {figures['validation']:.4f}")
        if "tokens_per_s" in figures:
            words.append(f"{figures['tokens_per_s']:,.0f} tokens/s")
        words.append(f"{timedelta(seconds=round(figures['eta_s']))} to go")
        words.append(f"{figures['peak_memory_mib'] / 1024:.1f} GiB at most")
        say(console, f"{stage}: {', '.join(words)}")


def _needed(memory: Memory) -> str:
    parts = {
        "weights": memory.model + memory.hypernetwork,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "features": memory.features,
        "activations": memory.activations,
    }
    words = ", ".join(f"{name} {size / 2**30:.1f}" for name, size in parts.items())
    return f"A process needs about {memory.total / 2**30:.1f} GiB for a step, beside what its libraries take: {words}."


def _lasting(forecast: Forecast) -> str:
    hours = forecast.seconds / 3600
    return (
        f"A step takes about {forecast.step_seconds:.3g} s, {forecast.steps:,} steps about {hours:.3g} hours in all, "
        f"without validations: {forecast.operations / 1e12:.3g} TFLOP a step and process, at the "
        f"{forecast.rate / 1e12:.3g} TFLOP/s at which one video was computed here."
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ValueError(f"{text!r} is no list of whole numbers; write them like 8,12,16.") from error


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"
