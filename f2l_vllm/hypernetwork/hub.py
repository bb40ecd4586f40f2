"""Takes a hypernetwork to a repository of the Hugging Face Hub, and fetches it from there.

The hub's own client does the work, so `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean everywhere.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from f2l_vllm.files import atomic_directory
from f2l_vllm.hypernetwork.config import HypernetworkConfig
from f2l_vllm.hypernetwork.config_file import CONFIG_FILE, WEIGHTS_FILE, read_directory_config
from f2l_vllm.hypernetwork.locate import choose

CARD_FILE = "README.md"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_LOG_IN = "log in with 'hf auth login', or give --token or HF_TOKEN"


def push(
    folder: Path, repository: str, card: str, *, private: bool = False, revision: str | None = None, token: str | None
) -> str:
    """Make one commit of a hypernetwork's two files and a card; the repository and the branch are made if need be.

    Args:
        folder: a hypernetwork, already checked.
        card: text of `README.md`, which replaces the one that is there.
        private: only the owner may read the repository.
        revision: branch; None for `main`.
        token: None for the user's own.

    Returns:
        the commit's address.

    Raises:
        ValueError: the hub cannot be reached or refuses; the message says what to do.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    _check(repository)
    api = HfApi(token=token)
    with _explained(repository, revision, api.endpoint, "write"):
        api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise ValueError(f"{repository} exists and is public: make it private in its settings, or drop --private.")
        if revision is not None:
            api.create_branch(repository, branch=revision, exist_ok=True)
        files: list[tuple[str, str | bytes]] = [(CARD_FILE, card.encode())]
        files += [(name, str(folder / name)) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        operations = [CommitOperationAdd(name, content) for name, content in files]
        done = api.create_commit(
            repository, operations, commit_message="Upload a hypernetwork with f2l-vllm", revision=revision
        )
    return str(done.commit_url)


def pull(
    reference: str, output: Path, *, base_model: str | None = None, revision: str | None = None, token: str | None
) -> tuple[HypernetworkConfig, str]:
    """Fetch a hypernetwork into a new folder, which appears whole and checked, or not at all.

    The hub's cache keeps what has been fetched, so that a fetch that was killed goes on.

    Args:
        reference: `owner/name`, or `owner/name/file.pt`; a released `.pt` file is written in this project's format.
        base_model: chooses among several `.pt` files, as in `locate`.
        revision: branch, tag or commit; None for `main`.
        token: None for the user's own.

    Returns:
        its shape, and the commit that it comes from.

    Raises:
        ValueError: the hub cannot be reached or refuses, or what it holds is not a hypernetwork.
        FileExistsError: the output folder is not empty.
    """
    from huggingface_hub import HfApi, snapshot_download

    words = reference.split("/", 2)
    repository, file = "/".join(words[:2]), "".join(words[2:])
    _check(repository)
    api = HfApi(token=token)
    with _explained(repository, revision, api.endpoint, "read"):
        found = api.model_info(repository, revision=revision)
        commit = str(found.sha)
        names = [file.rfilename for file in found.siblings or ()]
        chosen = file or choose(names, repository, base_model)
        if chosen and chosen not in names:
            raise ValueError(f"{repository} holds no file {chosen!r}, but {', '.join(sorted(names))}.")

        def fetch(*wanted: str) -> Path:
            return Path(snapshot_download(repository, revision=commit, allow_patterns=list(wanted), token=token))

        if not chosen:
            read_directory_config(fetch(CONFIG_FILE))  # a base model's gigabytes are not fetched
        folder = fetch(chosen) if chosen else fetch(CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)
    from f2l_vllm.hypernetwork.model import Hypernetwork

    hyper = Hypernetwork.load(folder / chosen, dtype=None)
    if chosen:
        hyper.save(output)
        return hyper.config, commit
    with atomic_directory(output) as staging:
        for one in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE):
            if (folder / one).exists():
                shutil.copyfile(folder / one, staging / one)
    return hyper.config, commit


def _check(repository: str) -> None:
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is no repository of the hub: write OWNER/NAME.")


@contextmanager
def _explained(repository: str, revision: str | None, hub: str, verb: str) -> Iterator[None]:
    """Raise whatever the hub's client raises as a ValueError that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(f"HF_HUB_OFFLINE is set, so you cannot {verb} {repository}: unset it.") from error
    except (GatedRepoError, RevisionNotFoundError, HfHubHTTPError) as error:
        raise ValueError(_refused(error, repository, revision, hub, verb)) from error
    except RuntimeError as error:  # of a thread that uploads
        cause = error.__cause__
        if isinstance(cause, HfHubHTTPError):
            raise ValueError(_refused(cause, repository, revision, hub, verb)) from error
        raise ValueError(
            f"{repository} was not written: {error} ({cause}). Nothing was committed; try again."
        ) from error
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{hub} cannot be reached, so you cannot {verb} {repository} ({reason[0]}): check the network, or "
            "HF_ENDPOINT."
        ) from error


def _refused(error: Exception, repository: str, revision: str | None, hub: str, verb: str) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    status = getattr(getattr(error, "response", None), "status_code", None)
    said = getattr(error, "server_message", None) or (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, RevisionNotFoundError):
        return f"{repository} has no revision {revision!r}: name a branch, a tag or a commit of it."
    if isinstance(error, GatedRepoError):
        return f"{repository} is gated: ask for access on its page, then {_LOG_IN}."
    if isinstance(error, RepositoryNotFoundError) and verb == "read":
        return (
            f"There is no repository {repository} at {hub}, or your token may not read it: check the name; if it is "
            f"private, {_LOG_IN}."
        )
    if status in (401, 403, 404):
        return (
            f"{hub} does not let you {verb} {repository} ({said}): {_LOG_IN} of an account that may; to push, the "
            "token needs write access."
        )
    return f"{hub} answered {status} for {repository}: {said}"
