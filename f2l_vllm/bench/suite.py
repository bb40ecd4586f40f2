"""What a suite measures, as data: a YAML file of `bench/suites/`; keys are checked and can be replaced one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from f2l_vllm.bench.arms import ARMS

SUITES = Path(__file__).parent / "suites"


def _several(value: Any) -> Any:
    return (value,) if isinstance(value, str | int | float) else value


_OneOrMore = BeforeValidator(_several)
Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1), _OneOrMore]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], _OneOrMore]
Url = Annotated[str, Field(pattern="^https?://")]


class Base(BaseModel):
    """The keys of every suite.

    Attributes:
        rounds: times that all arms are measured, in turn.
        seed: of the videos' scenes, the choice of questions, and the time of each question.
        serve_flags: more flags for every server, as `f2l-vllm serve` takes them; they override those of the suite.
        servers_at_once: servers in memory at a time; if the arms need more, servers are stopped and started in turn.
        kv_gib: KV cache of each server; None: room for the sequences in work at a time.
        dtype: None: fp32 for the shipped model on a CPU, else bfloat16.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rounds: PositiveInt = 3
    seed: int = 0
    serve_flags: Texts = ()
    servers_at_once: PositiveInt = 2
    kv_gib: Annotated[float, Field(gt=0)] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class OfVideos(Base):
    """The keys of suites that ask about videos.

    Attributes:
        arms: names of `f2l_vllm.bench.arms.ARMS`.
        questions: the same for each arm.
        output_tokens: exact length of every answer.
        merge_rate: part of the visual tokens that the merging arms leave out.
        base_url: of a server that runs already, with or without `/v1`; None: servers are started.
    """

    arms: Annotated[Texts, Field(min_length=1)]
    questions: Annotated[Texts, Field(min_length=2)]
    output_tokens: PositiveInt = 8
    merge_rate: Annotated[float, Field(gt=0, lt=1)] = 0.7
    base_url: Url | None = None

    @model_validator(mode="after")
    def _known_arms(self) -> OfVideos:
        unknown = [name for name in self.arms if name not in ARMS]
        if unknown or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms are different ones of {', '.join(ARMS)}, not {', '.join(self.arms)}")
        return self

    @model_validator(mode="after")
    def _starts_servers(self) -> OfVideos:
        if self.base_url and (self.serve_flags or self.kv_gib or self.dtype):
            raise ValueError("serve_flags, kv_gib and dtype are of servers that are started: base_url starts none")
        return self


class Latency(OfVideos):
    """Time to the first token, prompt tokens and state, over frames and resolution.

    Attributes:
        resolution: longest edges of the video files, pixels.
        count_above: cells of more frames are not run; their tokens and bytes come from processor and configuration.
    """

    suite: Literal["latency"]
    frames: Counts
    resolution: Counts
    count_above: PositiveInt = 32


class Amortise(OfVideos):
    """Time to the first token of many questions about one video, internalization included.

    Attributes:
        questions_per_video: the largest number of questions.
        frames_asked: questions that are really sent for the arm `frames`; the others are assumed to cost their median.
    """

    suite: Literal["amortise"]
    frames: PositiveInt
    resolution: PositiveInt
    questions_per_video: PositiveInt = 64
    frames_asked: PositiveInt = 4

    @model_validator(mode="after")
    def _first_is_cold(self) -> Amortise:
        if "adapter-cold" in self.arms:
            raise ValueError("adapter-cold is the first question of the arm adapter here: leave it out")
        return self


class Slo(BaseModel):
    """Limits of a good answer, milliseconds, as in `vllm bench serve --goodput`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft: Annotated[float, Field(gt=0)] | None = None
    tpot: Annotated[float, Field(gt=0)] | None = None
    e2el: Annotated[float, Field(gt=0)] | None = None


class Throughput(OfVideos):
    """Many videos asked at once.

    Attributes:
        requests, frames_requests: questions in each round, for arms that know the videos (as adapters or by their KV),
            and for arms that read the frames at every question; the latter get the first of the former's questions.
        popularity: how often each video is asked about; `zipf`: the n-th in proportion to 1 / n ** zipf_alpha.
        arrivals: `closed`: `concurrency` askers, each asks its next question when the last is answered; `poisson`:
            `request_rate` questions a second whatever the server does, at most `concurrency` of them in work.
    """

    suite: Literal["throughput"]
    frames: PositiveInt
    resolution: PositiveInt
    videos: PositiveInt = 64
    concurrency: Counts = (16,)
    popularity: Annotated[tuple[Literal["uniform", "zipf"], ...], Field(min_length=1), _OneOrMore] = ("uniform",)
    zipf_alpha: Annotated[float, Field(gt=0)] = 1.0
    arrivals: Literal["closed", "poisson"] = "closed"
    request_rate: Annotated[float, Field(gt=0)] | None = None
    requests: PositiveInt = 256
    frames_requests: PositiveInt = 32
    slo: Slo = Slo()

    @model_validator(mode="after")
    def _rate(self) -> Throughput:
        if (self.arrivals == "poisson") != (self.request_rate is not None):
            raise ValueError("request_rate, questions a second, belongs to arrivals: poisson, and is needed there")
        if "adapter-cold" in self.arms:
            raise ValueError("adapter-cold asks about each video once: measure it with the suite latency")
        return self


class Tax(Base):
    """The same text traffic without LoRA and with 1 to many adapters, by `vllm bench serve`.

    Attributes:
        streams: questions in work at a time, each with an output of `output_tokens`.
        adapters: numbers of different adapters, which the streams use in turn; 0: a server without LoRA. Cells with
            fewer streams than adapters are left out.
        prefill_tokens: length of the `prefill_requests` prompts whose first token is timed, one at a time.
        rank: of the adapters; None: that of a video's adapter.
        tuned: the LoRA kernels are tuned for this GPU first, as `f2l-vllm tune` does.
    """

    suite: Literal["tax"]
    streams: Counts = (1, 8, 64)
    adapters: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), _OneOrMore] = (0, 1, 8, 64)
    input_tokens: PositiveInt = 16
    output_tokens: Annotated[int, Field(ge=2)] = 64
    prefill_tokens: PositiveInt = 512
    prefill_requests: PositiveInt = 5
    rank: PositiveInt | None = None
    tuned: bool = False


class Capacity(BaseModel):
    """Videos per GB: the bytes of adapters and of KV caches, counted.

    Attributes:
        gb: memory to fill, in 10^9 bytes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Literal["capacity"]
    frames: Counts
    gb: Annotated[float, Field(gt=0)] = 1.0
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Ramp(BaseModel):
    """The highest rate of questions at which a server that runs already gives good answers.

    Attributes:
        base_url: the server's, with or without `/v1`.
        arm: answers from adapters, or from the frames in context.
        requests: questions at each rate, at random times.
        rate, lowest: the first one tried, and the lowest, questions a second.
        share: of the answers that must be within `slo`.
        precision: the largest relative gap that remains between a good and a bad rate.
        seed: of the videos' scenes, the choice of questions, and the time of each question.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    suite: Literal["ramp"]
    base_url: Url = "http://127.0.0.1:8000"
    arm: Literal["adapter", "frames"] = "adapter"
    videos: PositiveInt = 16
    frames: PositiveInt
    resolution: PositiveInt
    questions: Annotated[Texts, Field(min_length=1)]
    output_tokens: PositiveInt = 16
    requests: PositiveInt = 256
    rate: Annotated[float, Field(gt=0)] = 1.0
    lowest: Annotated[float, Field(gt=0)] = 0.25
    share: Annotated[float, Field(gt=0, le=1)] = 0.99
    precision: Annotated[float, Field(gt=0)] = 0.1
    slo: Slo
    seed: int = 0

    @model_validator(mode="after")
    def _has_limits(self) -> Ramp:
        if not self.slo.model_dump(exclude_none=True):
            raise ValueError("slo needs a limit, milliseconds: ttft, tpot or e2el")
        return self


Suite = Latency | Amortise | Throughput | Tax | Capacity | Ramp
_ANY: TypeAdapter[Suite] = TypeAdapter(Annotated[Suite, Field(discriminator="suite")])


def names() -> list[str]:
    """The suites that come with the package."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def load(reference: str, changes: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite.

    Args:
        reference: one of `names()`, or the path of a YAML file.
        changes: keys to replace.

    Raises:
        ValueError: no such suite, not YAML, or invalid keys or values; the message names each.
    """
    path = SUITES / f"{reference}.yaml" if reference in names() else Path(reference)
    if not path.is_file():
        raise ValueError(f"no suite {reference!r}: give one of {', '.join(names())}, or the path of a YAML file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, the first of them 'suite: latency' or another suite")
    try:
        return _ANY.validate_python({**content, **(changes or {})})
    except ValidationError as error:
        raise ValueError(f"{path.name}: " + "; ".join(_said(one) for one in error.errors())) from error


def parse_changes(pairs: Sequence[str], lists: Mapping[str, str | None], values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a suite to replace, with their new values.

    Args:
        pairs: `key=value`, the values as YAML.
        lists: one value, or several separated by commas; None for those not given.
        values: as they are; None for those not given.

    Raises:
        ValueError: a pair is not `key=value`.
    """
    changes = {key: value for key, value in values.items() if value is not None}
    for key, text in lists.items():
        if text is not None:
            parts = [yaml.safe_load(part) for part in text.split(",")]
            changes[key] = parts[0] if len(parts) == 1 else parts
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise ValueError(f"--set takes a key and its value, e.g. --set output_tokens=16, not {pair!r}")
        changes[key.strip().replace("-", "_")] = yaml.safe_load(value)
    return changes


def _said(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"][1:]) or "suite"
    if where == "base_url" and error["type"] == "extra_forbidden":
        return (
            f"the suite {error['loc'][0]} asks no server that runs already: it needs the model's files, and tax an "
            "engine without LoRA beside one with it"
        )
    if error["type"] == "extra_forbidden":
        return f"the suite {error['loc'][0]} has no key '{where}'"
    return f"{where}: {error['msg'].removeprefix('Value error, ')}"
