"""What is known of an adapter: its worker says it, manifest and catalog keep it as JSON, and the API shows it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter


@dataclass(frozen=True)
class Part:
    """Chunks of an adapter that another is composed of; `covered`: (start, end) of the seconds they were read from."""

    adapter: str
    chunks: tuple[int, ...]
    covered: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class AdapterInfo:
    """How an adapter was made. Fields with their default values are not part of the JSON.

    Attributes:
        timestamps: seconds into the video of every frame.
        visual_tokens, prompt_tokens: as the text layers read them.
        merge_rate: part of the visual tokens that was merged away, in [0, 1).
        seconds: of "decode", "vision" (frames to merged visual tokens), "text" (the text layers), "perceiver" and
            "head" (latents to factors).
        chunks: how many the video was cut into, if there were several.
        rank: in all, the bias included.
        spans: (start, end) in seconds of each chunk.
        internalize_seconds: from the job's begin to the publication.
        probe_effect, norm: as `hypernetwork/adapter_check.py` measures them.
        parts: what a composed adapter is made of.
    """

    frames: int = 0
    timestamps: tuple[float, ...] = ()
    duration_s: float = 0.0
    width: int = 0
    height: int = 0
    visual_tokens: int = 0
    merge_rate: float | None = None
    prompt_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    chunks: int = 0
    rank: int = 0
    spans: tuple[tuple[float, float], ...] = ()
    internalize_seconds: float = 0.0
    probe_effect: float = 0.0
    norm: float = 0.0
    parts: tuple[Part, ...] = ()

    @classmethod
    def of_json(cls, kept: dict[str, Any]) -> AdapterInfo:
        """What `to_json` returned; entries of other versions are left out."""
        return _JSON.validate_python(kept)

    def to_json(self) -> dict[str, Any]:
        """In plain types, in the order of the fields."""
        shown: dict[str, Any] = _JSON.dump_python(self, mode="json", exclude_defaults=True)
        return shown

    def decoded_in(self, seconds: float) -> AdapterInfo:
        """The same, with the seconds of decoding before those of the other stages."""
        return replace(self, seconds={"decode": seconds, **self.seconds})


_JSON = TypeAdapter(AdapterInfo)
