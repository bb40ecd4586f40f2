"""A real `f2l-vllm serve` in a process of its own, with a client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from openai import OpenAI
from openai.types import FileObject

from f2l_vllm.server_process import ServerProcess


class Server(ServerProcess):
    """Serves in fp32, so that answers can be compared with transformers'; small KV cache, no retries in the client."""

    def __init__(
        self,
        model: Path | str,
        home: Path,
        *flags: str,
        api_key: str = "none",
        port: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        common = ("--served-model-name", "base", "--dtype", "float32", "--kv-cache-memory-bytes", "200000000")
        super().__init__(str(model), home, *common, *flags, port=port, env=env)
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, timeout=120)

    def __enter__(self) -> Self:
        """It is ready, and stops with the block."""
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def adapter_folder(self, name: str) -> Path:
        """Where an adapter lies, or would lie if it was not made by a worker."""
        folder = self.home / "adapters"
        return next(folder.glob(f"{name}.*"), folder / name)

    def upload(self, path: Path | tuple[str, bytes], **options: Any) -> FileObject:
        """Upload a video and wait until it is processed, or has failed."""
        file = self.client.files.create(file=path, purpose="vision", **options)
        return self.wait(file.id)

    def wait(self, file_id: str) -> FileObject:
        """A file once it is processed, or has failed."""
        return self.client.files.wait_for_processing(file_id, poll_interval=0.02, max_wait_seconds=120)
