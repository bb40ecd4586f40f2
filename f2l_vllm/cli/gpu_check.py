"""`f2l-vllm doctor --gpu-check`: what this machine computes, against references, and what it costs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import typer

from f2l_vllm import models
from f2l_vllm.cli.evaluate import stoppable
from f2l_vllm.cli.files import keep
from f2l_vllm.cli.serve import Launch
from f2l_vllm.evaluation import environment

_DTYPES: dict[str | None, str | None] = {"half": "float16", "float": "float32", "auto": None}


def run(planned: Launch, results: Path | None, overwrite: bool, *, with_suites: bool) -> None:
    """Compute here and compare, a line for each check; exit with 1 when something disagrees.

    Args:
        planned: names the model whose answers are compared.
        results: folder to write, which must be new or empty unless `overwrite`.
    """
    if find_spec("peft") is None:
        raise typer.BadParameter("--gpu-check compares with peft, which is not installed: pip install peft")
    if results is None:
        results = Path("benchmarks/results", environment.folder_name(environment.machine()))
    keep(results, overwrite=overwrite)
    from transformers.utils import logging

    from f2l_vllm.bench import shapes
    from f2l_vllm.doctor import check, page

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = planned.model
    shipped = next((name for name in models.shipped() if models.resolve(name) == Path(model)), None)
    dtype = getattr(planned.flags, "dtype", None)
    subject = shapes.of_model(shipped or model, planned.env["F2L_HYPERNETWORK"], _DTYPES.get(dtype, dtype))
    with stoppable():
        found = check.check(
            check.Machine(planned.gpus.count > 0, subject), results, typer.echo, with_suites=with_suites
        )
    wrong = [finding.name for finding in found if finding.trouble is not None]
    typer.echo(f"written: {results / page.NAME}")
    if wrong:
        typer.echo(f"{len(wrong)} of {len(found)} checks disagree or did not run: {'; '.join(wrong)}", err=True)
        raise typer.Exit(1)
    typer.echo(f"all {len(found)} checks agree")
