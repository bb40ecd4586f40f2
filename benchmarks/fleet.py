"""A server of its own and many small videos to upload, for measurements over hundreds of adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from f2l_vllm import torch_shims
from f2l_vllm.server_process import ServerProcess

torch_shims.install()


@contextmanager
def fleet(model: str, *flags: str, videos: int, seed: int, fps: float) -> Iterator[tuple[ServerProcess, list[Path]]]:
    """A ready server, and the paths of `videos` clips of training scenes, 160 x 120 pixels and 2.5 seconds each.

    Args:
        flags: for `f2l-vllm serve`.
    """
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    with tempfile.TemporaryDirectory(prefix="f2l-fleet-") as folder:
        paths = [
            write_mp4(scene, Path(folder) / f"{index}.mp4", size=(160, 120), fps=fps, seconds=2.5)
            for index, scene in enumerate(sample_scenes(videos, seed, "train"))
        ]
        server = ServerProcess(model, Path(folder) / "home", *flags, "--queue-limit", str(videos))
        try:
            server.wait_ready()
            yield server, paths
        finally:
            server.stop()
