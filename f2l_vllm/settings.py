"""Operator settings, read from `F2L_*` environment variables; the flags of the `serve` command end up here too.

Only the environment reaches the API server, its engine and every Ray worker. Plain `vllm serve` with the plugins named
in `VLLM_PLUGINS` therefore starts the same server.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from f2l_vllm.grammar_limits import GrammarLimits
from f2l_vllm.video.reading import ReadingOptions

if TYPE_CHECKING:  # they load libraries that the command line's help does not need
    from f2l_vllm.video.decoder import DecodeLimits
    from f2l_vllm.video.fetch import FetchPolicy
    from f2l_vllm.video.probe import Limits

PREFIX = "F2L_"
CATALOG: Literal["catalog"] = "catalog"  # as `tenants`: the keys are the catalog's
SERVER_LOCK = "server.lock"  # in the data folder; the server that uses the folder holds it
# Variables with our prefix that are not fields: `cpu/` reads them when vLLM looks for a platform.
OTHER_VARIABLES = ("F2L_CPU_PLATFORM", "F2L_CPU_KV_BYTES")


class Settings(BaseSettings):
    """Operator settings; each field is the environment variable `F2L_<FIELD>`."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True, allow_inf_nan=False)

    home: Path = Field(Path("~/.f2l"), description="Data folder: videos, adapters, catalog.")
    database_url: str | None = Field(
        None,
        description="Catalog in SQLite or PostgreSQL; default: in the folder. Others see flags: a password belongs in "
        "F2L_DATABASE_URL.",
    )
    listen_url: str | None = Field(
        None, description="PostgreSQL past a pooler, for hearing of changes; default: the catalog's URL."
    )
    store: str | None = Field(
        None, description="Where videos and adapters are kept, any fsspec URL; default: the data folder."
    )
    cache_bytes: int = Field(
        16 << 30, ge=0, description="How much of a remote store is kept in the folder; 0: no limit."
    )
    hot_bytes: int = Field(256 << 20, ge=0, description="Memory (/dev/shm) for the adapters used most, bytes; 0: none.")
    reserve_bytes: int | None = Field(
        None, ge=0, description="Disk that uploads leave free; default: 256 MiB, or an eighth of it if that is less."
    )
    tenant_bytes: int | None = Field(None, ge=1, description="Bytes of one tenant's files; default: no limit.")
    warm_adapters: int = Field(256, ge=0, description="Adapters made resident at start, those used last first.")
    hypernetwork: str | None = Field(
        None, description="Directory, released .pt file, or hub id; default: the model's own."
    )
    hypernetwork_workers: int = Field(1, ge=0, description="Ray actors that internalize videos; 0: none here.")
    max_frames: int | None = Field(None, ge=1, description="Frames read of a video or chunk; default: as trained.")
    fps: float | None = Field(None, gt=0, description="Frames read per second, up to --max-frames.")
    chunk_seconds: float | None = Field(None, gt=0, description="Cut videos into chunks of this many seconds.")
    chunk_frames: int | None = Field(None, ge=1, description="Cut videos into chunks of this many frames.")
    merge_rate: float = Field(
        0.0, ge=0, lt=1, description="Part of a video's visual tokens merged away before it is internalized, [0, 1)."
    )
    max_chunks: int = Field(3, ge=1, description="Most chunks of a video; each adds to the LoRA rank.")
    batch_tokens: int = Field(
        0, ge=0, description="Internalize waiting videos together, up to this many tokens a pass; 0: one at a time."
    )
    batch_videos: int = Field(8, ge=1, description="Videos that a worker takes at a time when `batch_tokens` is set.")
    worker_cpus: float = Field(1.0, ge=0, description="CPUs that Ray reserves for each worker.")
    worker_gpus: float | None = Field(
        None, ge=0, description="GPUs, or a fraction of one, for each worker; 0: the CPU. Default: `serve` shares."
    )
    worker_devices: str | None = Field(
        None, description="CUDA_VISIBLE_DEVICES of the workers. Default: the GPUs that `serve` leaves to them."
    )
    gpu_share: float = Field(
        1.0, gt=0, le=1, description="Part of its GPUs that `serve` divides; less where several servers share one."
    )
    ray_address: str | None = Field(None, description="A running Ray cluster; default: a private one, started here.")
    queue_limit: int = Field(256, ge=1, description="Videos that may wait for a worker before `queue_full`.")
    queue_share: float = Field(
        0.5, gt=0, le=1, description="Part of the queue that one tenant may fill; with `tenants` only."
    )
    batch_requests: int = Field(
        16, ge=0, description="A batch asks while the engine has fewer requests than this; 0: this server runs none."
    )
    job_attempts: int = Field(3, ge=1, description="Workers a video may cost before it is marked `error`.")
    job_seconds: float = Field(600.0, gt=0, description="Longest a worker may take over one video, seconds.")
    wait_seconds: float = Field(30.0, ge=0, description="How long a question waits for a video in work, seconds.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="debug, info, warning or error; debug: all that vLLM, Ray and transformers say, too."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="text or json; json: a line for each event, with the id of its request."
    )
    shutdown_seconds: float = Field(
        30.0, ge=0, description="How long open answers may go on when the server is told to stop."
    )
    shutdown_delay_seconds: float = Field(
        0.0, ge=0, description="Of these, how long it still takes requests while `/ready` is 503, for load balancers."
    )
    max_upload_bytes: int = Field(1 << 30, ge=1, description="Largest upload, bytes.")
    max_frames_bytes: int = Field(64 << 20, ge=1, description="Largest video answered from its frames, bytes.")
    max_video_seconds: float = Field(4 * 3600.0, gt=0, description="Longest video, seconds.")
    max_video_pixels: int = Field(8192 * 4320, ge=1, description="Largest frame, pixels.")

    decode_memory_bytes: int = Field(4 << 30, ge=1 << 28, description="Address space of a decoding process, bytes.")
    decode_seconds: float = Field(300.0, gt=0, description="CPU seconds a video may take to decode.")
    max_decoded_bytes: int = Field(2 << 30, ge=1, description="Decoded frames of a video or chunk, bytes.")
    tenants: Literal["catalog"] | Path | None = Field(
        None, description="`catalog`: keys that `f2l-vllm keys` made; else a JSON or TOML file of tenants' keys."
    )
    open_routes: str = Field(
        "/health,/ready,/ping,/version,/metrics", description="Routes that need no API key, by comma."
    )
    extra_routes: str = Field("", description="Routes of vLLM's to open besides those that are needed, by comma.")
    max_body_bytes: int = Field(
        128 << 20, ge=1, description="Largest body of a request that is not an upload; a data URI is a part of it."
    )
    max_images: int = Field(32, ge=0, description="Pictures in one question.")
    max_image_bytes: int = Field(32 << 20, ge=1, description="Largest picture, bytes.")
    max_image_pixels: int = Field(50_000_000, ge=1, description="Pixels of a question's pictures together.")
    console: bool = Field(True, description="The page for people at /console.")
    share_caches: bool = Field(False, description="Tenants share vLLM's caches of prefixes, pictures and frames.")
    body_idle_seconds: float = Field(60.0, gt=0, description="How long a request's body may pause, seconds.")
    grammar_seconds: float = Field(
        5.0, gt=0, description="CPU seconds that compiling the schema, grammar or regex of an answer may take."
    )
    allowed_media_domains: str = Field(
        "", description="Hosts that videos may be fetched from, by comma; not public addresses must be listed too."
    )
    fetch_seconds: float = Field(60.0, gt=0, description="Longest a video may take to be fetched, seconds.")
    url_seconds: float = Field(
        86400.0, gt=0, description="How long a video named by address is kept after its last use, seconds."
    )
    max_streams: int = Field(64, ge=0, description="Streams of one tenant that are live at once; 0: none.")
    max_composed: int = Field(1024, ge=1, description="Adapters composed of several videos or chunks that are kept.")

    @classmethod
    def read(cls, given: Mapping[str, str] | None = None) -> Settings:
        """Read the settings from the environment.

        Args:
            given: variables that take precedence over the environment: the values of flags.

        Raises:
            ValueError: a value is invalid; the message names its flag or variable, in one sentence.
        """
        given = given or {}
        try:
            values: Any = {name.removeprefix(PREFIX).lower(): value for name, value in given.items()}
            return cls(**values)
        except ValidationError as error:
            raise ValueError("; ".join(_in_words(dict(one), given) for one in error.errors())) from error

    @model_validator(mode="after")
    def _can_be_read(self) -> Settings:
        _ = self.reading  # raises if the options contradict each other
        return self

    @property
    def data_folder(self) -> Path:
        """`home` with `~` expanded, absolute."""
        return self.home.expanduser().absolute()

    @property
    def reading(self) -> ReadingOptions:
        """How videos are read."""
        cut = self.chunk_seconds, self.chunk_frames, self.max_chunks
        return ReadingOptions(self.max_frames, self.fps, *cut, self.merge_rate)

    @property
    def tenant_queue_limit(self) -> int | None:
        """Number of videos of one tenant that may wait; None without tenants."""
        return None if self.tenants is None else max(1, int(self.queue_limit * self.queue_share))

    @property
    def decode_limits(self) -> DecodeLimits:
        """Limits on decoding a video."""
        from f2l_vllm.video.decoder import DecodeLimits

        return DecodeLimits(self.decode_memory_bytes, self.decode_seconds, self.max_decoded_bytes)

    @property
    def grammar_limits(self) -> GrammarLimits:
        """Limits on trying an answer's constraint."""
        return GrammarLimits(self.grammar_seconds)

    @property
    def video_limits(self) -> Limits:
        """Limits on the size and header of an uploaded video."""
        from f2l_vllm.video.probe import Limits

        return Limits(self.max_upload_bytes, self.max_video_seconds, self.max_video_pixels)

    @property
    def kept_video_limits(self) -> Limits:
        """Limits on a video of the store. Uploads were checked when they came; what a stream becomes may be longer."""
        return replace(self.video_limits, max_duration_s=math.inf)

    @property
    def fetch_policy(self) -> FetchPolicy:
        """What may be fetched for a question; nothing unless hosts are listed."""
        from f2l_vllm.video.fetch import FetchPolicy

        return FetchPolicy(tuple(listed(self.allowed_media_domains)), self.max_upload_bytes, self.fetch_seconds)

    @property
    def catalog_url(self) -> str:
        """The catalog's SQLAlchemy URL."""
        return self.database_url or f"sqlite:///{self.data_folder / 'catalog.sqlite3'}"


@functools.cache
def current() -> Settings:
    """The settings in this process's environment, read once: reading them takes milliseconds."""
    return Settings()


def listed(text: str) -> list[str]:
    """The entries of a comma-separated list."""
    return [entry for part in text.split(",") if (entry := part.strip())]


_WORDS = {
    "int_parsing": "is no whole number",
    "int_from_float": "is no whole number",
    "float_parsing": "is no number",
    "finite_number": "is no finite number",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
}


def _in_words(error: dict[str, Any], given: Mapping[str, str]) -> str:
    """One of pydantic's errors as a sentence about the flag or variable that the user knows."""
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    field = str(error["loc"][0])
    name = f"{PREFIX}{field.upper()}"
    if name in given:
        name = f"--{field.replace('_', '-')}"
    limits = {key: f"{value:g}" for key, value in error.get("ctx", {}).items() if isinstance(value, int | float)}
    words = _WORDS.get(error["type"])
    what = str(error["msg"]) if words is None else words.format(**limits)
    return f"{name}={error['input']}: {error['input']!r} {what}"


def refuse_unknown(environment: Mapping[str, str]) -> None:
    """Refuse variables that have our prefix and are not settings: a misspelt one would be ignored.

    Raises:
        ValueError: there is such a variable; the message names the closest setting.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | set(OTHER_VARIABLES)
    for name in environment:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            close = difflib.get_close_matches(name.upper(), sorted(known), 1)
            hint = f"did you mean {close[0]}?" if close else "unset it, or see f2l_vllm/settings.py for those that are."
            raise ValueError(f"{name} is no setting of f2l-vllm: {hint}")


def refuse_environment(environment: Mapping[str, str]) -> None:
    """Refuse settings that do not exist, and vLLM's settings that would stop videos from being served or let any client
    load adapters.

    Raises:
        ValueError: one of them is set; the message says which and why.
    """
    refuse_unknown(environment)
    if environment.get("VLLM_USE_RUST_FRONTEND", "0") == "1":
        raise ValueError("VLLM_USE_RUST_FRONTEND=1 bypasses Python plugins, so videos would not be served: unset it")
    if environment.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").lower() in ("1", "true"):
        raise ValueError(
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING lets any client load any path on this machine as an adapter: unset it; "
            "f2l-vllm publishes adapters by itself"
        )
