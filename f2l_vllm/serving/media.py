"""vLLM's own fetching of media for a question, held to this server's rules: same hosts, addresses, cap and deadline.

vLLM builds its media connector by name from a registry for every request that holds media; the name it asks for by
default is taken here, so that nothing need be configured.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm.connections import HTTPConnection
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from f2l_vllm.settings import Settings
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import FetchPolicy, fetch

CONNECTOR = "http"


class GuardedConnection(HTTPConnection):
    """Fetches under a policy, whatever the caller asks for."""

    def __init__(self, policy: FetchPolicy) -> None:
        super().__init__()
        self._policy = policy

    def get_bytes(self, url: str, **limits: Any) -> bytes:
        """As `async_get_bytes`, for vLLM's threads."""
        return asyncio.run(self.async_get_bytes(url, **limits))

    async def async_get_bytes(self, url: str, *, max_bytes: int | None = None, **_limits: Any) -> bytes:
        """The bytes at a URL, up to `max_bytes` if the caller takes less than the policy.

        Raises:
            VLLMValidationError: what `fetch` refuses, in its words.
        """
        with tempfile.TemporaryDirectory(prefix="f2l-media-") as folder:
            target = Path(folder) / "media"
            try:
                cap = min(max_bytes or self._policy.max_bytes, self._policy.max_bytes)
                await fetch(url, target, replace(self._policy, max_bytes=cap))
            except VideoError as error:
                raise VLLMValidationError(error.message) from error
            return await asyncio.to_thread(target.read_bytes)


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class GuardedMediaConnector(MediaConnector):
    """vLLM's connector over a guarded connection."""

    def __init__(self, media_io_kwargs: dict[str, dict[str, Any]] | None = None, **options: Any) -> None:
        settings = Settings()
        # What is fetched here is read into memory, as the bytes of files are for answers from their frames.
        cap = min(settings.max_upload_bytes, settings.max_frames_bytes)
        super().__init__(media_io_kwargs, GuardedConnection(replace(settings.fetch_policy, max_bytes=cap)), **options)
