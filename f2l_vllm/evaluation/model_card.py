"""The model card of a hypernetwork: what a hub shows of it, from its run and its evaluation.

Paths of the machine that trained it do not go into the card: they concern nobody else.

Source of the metadata: https://huggingface.co/docs/hub/model-cards.
"""

from __future__ import annotations

import re
from typing import Any

from f2l_vllm.evaluation import report
from f2l_vllm.evaluation.questions import ADAPTER
from f2l_vllm.hypernetwork.config import HypernetworkConfig

LIBRARY = "f2l-vllm"
TASK = "video-text-to-text"
_TAGS = ("f2l-vllm", "hypernetwork", "lora", "video", "arxiv:2606.04351")
_LONGEST = 60  # characters of an option


def model_card(
    repository: str,
    config: HypernetworkConfig,
    *,
    base_model: str | None = None,
    license: str | None = None,
    run: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
) -> str:
    """The text of `README.md`, metadata first.

    Args:
        repository: `owner/name` on the hub.
        base_model: the hub's name of the base model; None if it has none.
        license: the hub's name of a licence, e.g. `apache-2.0`.
        run: a run's `training.json`.
        evaluation: what `f2l-vllm eval --json` writes.

    Raises:
        ValueError: the evaluation lacks what the card shows.
    """
    from huggingface_hub import ModelCardData

    name = repository.split("/")[-1]
    data = ModelCardData(
        base_model=base_model,
        license=license,
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=list(_TAGS),
        model_name=name,
        eval_results=None if evaluation is None else _eval_results(evaluation) or None,
    )
    if data.eval_results is None:
        data.model_name = None
    parts = [_summary(repository, config, base_model)]
    if run is not None:
        parts.append(_training(run))
    if evaluation is not None:
        parts.append(_scores(evaluation))
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(parts)


def _summary(repository: str, config: HypernetworkConfig, base_model: str | None) -> str:
    model = base_model or "MODEL"
    linked = (
        f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a base model that has no page here"
    )
    frames = "as the processor does" if config.max_frames is None else f"{config.max_frames} frames"
    edge = "" if config.longest_edge is None else f", the longer side scaled to {config.longest_edge} pixels"
    return f"""# {repository.split("/")[-1]}

A hypernetwork for {linked}. It reads a video once and writes a LoRA adapter, from which the base model answers
questions about the video without a visual token (Frames2LoRA, arXiv 2606.04351).

```bash
f2l-vllm serve {model} --hypernetwork {repository}
```

| | |
|---|---|
| adapts | {", ".join(f"`{module}`" for module in config.modules)} in {config.num_layers} text layers |
| rank | {config.rank}, scale {config.scale:g} |
| latents | {config.num_latents} of width {config.latent_size}, {config.num_blocks} blocks |
| reads | {frames}{edge} |
"""


def _training(run: dict[str, Any]) -> str:
    rows = [("steps", run.get("steps")), ("processes", run.get("processes")), ("seed", run.get("seed"))]
    rows += [("videos", run.get("videos")), ("videos left out", len(run.get("left_out") or ()))]
    rows += [("first loss", run.get("first_loss")), ("last loss, smoothed", run.get("loss"))]
    validation = run.get("validation_loss") or {}
    rows += [(f"validation loss {when} training", validation.get(when)) for when in ("before", "after")]
    rows += [("best step", run.get("best_step")), ("earlier runs that it extends", len(run.get("extends") or ()))]
    shown = [f"| {name} | {value} |" for name, value in rows if value not in (None, 0) or name == "seed"]
    options = [f"| `{name}` | {_short(value)} |" for name, value in run["options"].items() if value is not None]
    grid = "\n".join(["| | |", "|---|---|", *shown, "", "| option | |", "|---|---|", *options])
    return f"## Training\n\n{grid}\n"


def _scores(evaluation: dict[str, Any]) -> str:
    try:
        tables = report.markdown({**evaluation, "skipped": []})
    except (KeyError, TypeError) as error:
        raise _unknown(error) from error
    left_out = len(evaluation.get("skipped") or ())
    note = f"\n{left_out} videos could not be used and were left out.\n" if left_out else ""
    return f"## Evaluation\n\n{tables}{note}"


def _eval_results(evaluation: dict[str, Any]) -> list[Any]:
    """The adapter's score for each row of the evaluation's table."""
    from huggingface_hub import EvalResult

    try:
        metric = evaluation["configuration"]["metric"]
        return [
            EvalResult(
                task_type=TASK,
                dataset_type=re.sub(r"\W+", "-", row["dataset"]).strip("-"),
                dataset_name=row["dataset"],
                dataset_config=row["type"],
                metric_type=metric,
                metric_name=f"{metric}, from the adapter",
                metric_value=row["arms"][ADAPTER]["score"],
            )
            for row in evaluation["table"]
            if row["arms"][ADAPTER]["score"] is not None
        ]
    except (KeyError, TypeError) as error:
        raise _unknown(error) from error


def _unknown(error: Exception) -> ValueError:
    return ValueError(
        f"The evaluation lacks {error}: give the JSON that this version of 'f2l-vllm eval --json' writes."
    )


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
