"""What decides where a question goes: the videos that it names."""

from __future__ import annotations

import json

from f2l_vllm.server.chat.request import videos
from f2l_vllm.server.errors import APIError


def key(body: bytes) -> str:
    """A name for the videos of a question, in order; empty for a question about none, or one that cannot be read.

    Spans are left out: chunks of a video are composed from one file.
    """
    try:
        asked = json.loads(body)
        if not isinstance(asked, dict):
            return ""
        messages, model = asked.get("messages", asked.get("input")), asked.get("model")
        named = videos(model if isinstance(model, str) else None, messages if isinstance(messages, list) else [])
    except (ValueError, RecursionError, APIError):
        return ""  # the engine says what is wrong
    return " ".join(dict.fromkeys(video.file_id or video.url or "" for video in named))
