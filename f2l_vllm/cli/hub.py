"""`f2l-vllm push` and `f2l-vllm pull`: a hypernetwork to a repository of the hub, and from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from f2l_vllm.hypernetwork.hub import REPOSITORY

console = Console(soft_wrap=True)

Token = Annotated[str | None, typer.Option(help="The hub's token; default: HF_TOKEN, or as you logged in.")]


def push(
    folder: Annotated[Path, typer.Argument(help="A hypernetwork, or the folder of the run that trained it.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub; made if it is not there.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="JSON of 'f2l-vllm eval', to be shown in the model card."),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="OWNER/NAME of the base model; default: the one it was trained for.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="As the hub names it, e.g. apache-2.0.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only its owner may read the repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    token: Token = None,
) -> None:
    """Publish a hypernetwork on the Hugging Face Hub, with a model card."""
    from f2l_vllm.hypernetwork import hub

    try:
        found, run = _find(folder)
        scores = None if evaluation is None else _read(evaluation)
        _check_same(scores, found, evaluation)
        from f2l_vllm import torch_shims

        torch_shims.install()
        from f2l_vllm.evaluation.model_card import model_card
        from f2l_vllm.hypernetwork.model import Hypernetwork

        config = Hypernetwork.load(found, dtype=None).config  # what is damaged is not published
        name = base_model or _hub_name(config.base_model)
        if base_model is not None and not REPOSITORY.fullmatch(base_model):
            raise ValueError(f"--base-model {base_model!r}: a model card names a repository of the hub, OWNER/NAME")
        card = model_card(repository, config, base_model=name, license=license, run=run, evaluation=scores)
        address = hub.push(found, repository, card, private=private, revision=revision, token=token)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    if name is None:
        console.print(f"The card names no base model, because {config.base_model!r} is none of the hub's: --base-model")
    console.print(address, highlight=False)


def pull(
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub, or OWNER/NAME/FILE.pt.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory to write; must not exist.")],
    base_model: Annotated[str | None, typer.Option(help="Base model, where the repository holds several.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; default: main.")] = None,
    token: Token = None,
) -> None:
    """Fetch a hypernetwork from the Hugging Face Hub into a folder, checked; a released .pt file is converted."""
    from f2l_vllm import torch_shims
    from f2l_vllm.hypernetwork import hub

    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise typer.BadParameter(f"{output} exists already; name a new directory")
    torch_shims.install()
    try:
        config, commit = hub.pull(repository, output, base_model=base_model, revision=revision, token=token)
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error
    console.print(
        f"{output}: rank {config.rank}, {', '.join(config.modules)}, for {config.base_model}, commit {commit}",
        highlight=False,
    )


def _find(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The hypernetwork in a folder, and the report of its run."""
    from f2l_vllm.hypernetwork.config_file import CONFIG_FILE, WEIGHTS_FILE
    from f2l_vllm.train.folder import BEST, REPORT_FILE, RUN_FOLDER

    found = folder / BEST if (folder / BEST).is_dir() else folder
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (found / name).is_file()]
    if missing and (folder / RUN_FOLDER).is_dir():
        raise ValueError(f"{folder} holds a run that is not finished: end it with 'f2l-vllm train', then push it")
    if missing:
        raise ValueError(
            f"{folder} holds no hypernetwork ({' and '.join(missing)} missing): name a folder that 'f2l-vllm train' or "
            "'f2l-vllm convert' has written"
        )
    report = folder / REPORT_FILE
    run = _read(report) if report.is_file() else None
    return found, run if run is not None and "options" in run else None  # 'make-model' reports stages, not options


def _check_same(evaluation: dict[str, Any] | None, found: Path, file: Path | None) -> None:
    """Raise ValueError for the evaluation of another hypernetwork; that of a running server does not say of which."""
    from f2l_vllm.store.address import fingerprint

    configuration = (evaluation or {}).get("configuration")
    measured = configuration.get("hypernetwork_revision") if isinstance(configuration, dict) else None
    if measured is not None and measured != fingerprint(found):
        raise ValueError(f"{file} is the evaluation of another hypernetwork than {found}: evaluate this one")


def _hub_name(model: str) -> str | None:
    from f2l_vllm import models

    known = models.recognised(model)
    return known or (model if REPOSITORY.fullmatch(model) and not Path(model).exists() else None)


def _read(path: Path) -> dict[str, Any]:
    from f2l_vllm.files import read_json

    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found
