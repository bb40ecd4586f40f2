"""A server that runs already: what it says of itself, and which part of a suite can be measured at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from openai import BadRequestError, UnprocessableEntityError
from prometheus_client.parser import text_string_to_metric_families

from f2l_vllm.bench.arms import ARMS, about_frames
from f2l_vllm.bench.client import Client
from f2l_vllm.bench.films import Films
from f2l_vllm.bench.results_file import Say
from f2l_vllm.bench.suite import Latency, OfVideos, Ramp
from f2l_vllm.server_process import ServerFailed

_TIMEOUT_SECONDS = 60.0
_CACHE = ("enable_prefix_caching", "kv_cache_memory_bytes", "kv_cache_size_tokens", "cache_dtype")


@dataclass(frozen=True)
class RunningServer:
    """Stands where suites take a model to start servers with, and where `Servers` has a server that it started.

    Attributes:
        url: without `/v1`.
        facts: what it says of itself, for the result.
        kv_bytes_per_token: of its KV cache, if it says so.
        name, dtype: of the model, for tables.
    """

    url: str
    api_key: str = field(repr=False)
    name: str
    facts: dict[str, Any]
    kv_bytes_per_token: int | None
    dtype: str = "as served"

    def wait_ready(self) -> None:
        """It is."""

    def end(self) -> None:
        """It goes on."""


def reach(base_url: str, api_key: str) -> RunningServer:
    """Ask a server what it is.

    Args:
        base_url: with or without `/v1`.

    Raises:
        ServerFailed: there is none, it is another kind of server, it is not ready, or it refuses the key.
    """
    url = base_url.rstrip("/").removesuffix("/v1")
    bearer = {"Authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(base_url=url, headers=bearer, timeout=_TIMEOUT_SECONDS) as client:
            _check_ready(url, client.get("/ready"))
            models = client.get("/v1/models", params={"limit": 1})
            if models.status_code == 401:
                raise ServerFailed(f"{url} refuses the key: give one that it knows with --api-key or OPENAI_API_KEY")
            others = {path: client.get(path) for path in ("/version", "/metrics", "/console/about")}
            card = models.raise_for_status().json()["data"][0]
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise ServerFailed(f"{base_url!r} is no address of a server: {error}") from error
    except httpx.TransportError as error:
        raise ServerFailed(f"no server answers at {url} ({error}): start one with 'f2l-vllm serve'") from error
    except (httpx.HTTPStatusError, KeyError, LookupError, ValueError) as error:
        raise ServerFailed(f"{url} does not say which model it serves: {error!r}") from error
    about, version = (_json(others[path]) for path in ("/console/about", "/version"))
    facts = {
        "url": url,
        "model": card["id"],
        "max_model_len": card.get("max_model_len"),
        "f2l_vllm": about.get("version"),
        "vllm": version.get("version"),
        **({"kv_bytes_per_token": known} if (known := about.get("kv_bytes_per_token")) else {}),
        **_measured(others["/metrics"]),
    }
    return RunningServer(url, api_key, card["id"], facts, known)


async def measurable(suite: OfVideos | Ramp, server: RunningServer, folder: Path, say: Say) -> dict[str, Any]:
    """The keys to replace in a suite, so that it can be measured at this server; what is left out is said.

    Raises:
        ValueError: nothing is left.
        APIError: the server did not answer.
    """
    changes: dict[str, Any] = {}
    if isinstance(suite, OfVideos):
        changes["arms"] = tuple(name for name in suite.arms if ARMS[name].anywhere)
        if left_out := [name for name in suite.arms if not ARMS[name].anywhere]:
            say(f"left out: {', '.join(left_out)}, whose servers are started with flags of their own")
        if "frames" in changes["arms"] and (why := await _refused(server, folder)):
            changes["arms"] = tuple(name for name in changes["arms"] if name != "frames")
            say(f"left out: frames, which this server does not take ({why})")
    if isinstance(suite, Latency):
        changes["frames"] = tuple(count for count in suite.frames if count <= suite.count_above)
        if more := [count for count in suite.frames if count > suite.count_above]:
            say(f"left out: {', '.join(map(str, more))} frames, above count_above={suite.count_above}")
    if () in changes.values():
        able = ", ".join(name for name, arm in ARMS.items() if arm.anywhere)
        raise ValueError(f"nothing is left to measure at a server that runs already: its arms are {able}")
    return changes


async def _refused(server: RunningServer, folder: Path) -> str | None:
    """Why the server takes no frames; None if it takes them."""
    film = Films(folder / "films").make(2, 128, "frames")
    async with Client(server.url, 1, server.api_key) as client:
        try:
            await client.ask("What is shown?", **about_frames(server.name, film))
        except (BadRequestError, UnprocessableEntityError) as error:
            return error.message
    return None


def _check_ready(url: str, answer: httpx.Response) -> None:
    parts = _json(answer)
    if "ready" not in parts:
        raise ServerFailed(f"{url} is no server of f2l-vllm: GET /ready is answered with {answer.status_code}")
    if not parts["ready"]:
        missing = ", ".join(name for name, fine in parts.items() if fine is False and name != "ready")
        why = "; ".join(parts.get("why", {}).values())
        raise ServerFailed(f"{url} is not ready ({missing}{f': {why}' if why else ''}): wait until GET /ready is 200")


def _json(answer: httpx.Response) -> dict[str, Any]:
    try:
        found = answer.json()
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _measured(answer: httpx.Response) -> dict[str, Any]:
    """What the metrics say of the configuration; nothing if they are not open to this client."""
    if answer.status_code != 200:
        return {}
    samples = [one for family in text_string_to_metric_families(answer.text) for one in family.samples]
    cache = next((one.labels for one in samples if one.name == "vllm:cache_config_info"), {})
    workers = [one.value for one in samples if one.name == "f2l_workers"]
    return {name: cache[name] for name in _CACHE if name in cache} | {"workers": int(sum(workers))}
