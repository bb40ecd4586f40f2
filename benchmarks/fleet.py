"""A server of its own and many small videos to upload, for measurements over hundreds of adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from f2l_vllm import torch_shims
from f2l_vllm.server_process import ServerProcess

torch_shims.install()


def films(folder: Path, count: int, seed: int, fps: float) -> list[Path]:
    """`count` clips of training scenes in `folder`, 160 x 120 pixels and 2.5 seconds each."""
    from f2l_vllm.synthetic.render import write_mp4
    from f2l_vllm.synthetic.world import sample_scenes

    return [
        write_mp4(scene, folder / f"{index}.mp4", size=(160, 120), fps=fps, seconds=2.5)
        for index, scene in enumerate(sample_scenes(count, seed, "train"))
    ]


@contextmanager
def fleet(model: str, *flags: str, videos: int, seed: int, fps: float) -> Iterator[tuple[ServerProcess, list[Path]]]:
    """A ready server, and the paths of `videos` films.

    Args:
        flags: for `f2l-vllm serve`.
    """
    with tempfile.TemporaryDirectory(prefix="f2l-fleet-") as folder:
        paths = films(Path(folder), videos, seed, fps)
        server = ServerProcess(model, Path(folder) / "home", *flags, "--queue-limit", str(videos))
        try:
            server.wait_ready()
            yield server, paths
        finally:
            server.stop()
