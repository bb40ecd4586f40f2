"""Videos to ask about: scenes of moving shapes filmed at one frame a second, so that a video of n seconds is n frames.

Every decoded frame is read. With more frames a second, the arms that read frames would pay for unread ones at every
question, the others only once.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from f2l_vllm import torch_shims
from f2l_vllm.files import atomic_path

torch_shims.install()

from f2l_vllm.synthetic.render import fit, write_mp4  # noqa: E402
from f2l_vllm.synthetic.world import sample_scenes  # noqa: E402


class Films:
    """Films in a folder, each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def make(self, frames: int, edge: int, *name: object) -> Path:
        """A film, 4:3.

        Args:
            frames: number of frames, and of seconds.
            edge: the longer edge, pixels.
            name: a different name gives a different scene.
        """
        label = "-".join(str(part) for part in name)
        path = self._folder / f"{frames}-frames-{edge}px-{label}.mp4"
        if not path.exists():
            seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big")
            scene = sample_scenes(1, seed, "train")[0]
            with atomic_path(path) as staging:
                write_mp4(scene, staging, size=fit((4, 3), edge), fps=1, seconds=frames)
        return path
