"""The synthetic world as a manifest: scenes filmed as real mp4 files, and questions about them with true answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from f2l_vllm.files import atomic_path
from f2l_vllm.synthetic import phrases
from f2l_vllm.synthetic.render import FRAME_SIZES, write_mp4
from f2l_vllm.synthetic.world import Scene, sample_scenes
from f2l_vllm.train.data.manifest import Example, write_manifest
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.probe import probe

DATASET = "f2l-world"
MANIFEST, VIDEOS = "manifest.jsonl", "videos"
KINDS = (*phrases.QUESTION_TYPES, phrases.CAPTION)
_SECONDS = (2.5, 4.0, 6.0, 8.0, 10.0)
_RATES = (10, 24, 30)


@dataclass(frozen=True)
class Film:
    """How a scene is filmed: (width, height) in pixels, frames per second, length in seconds."""

    size: tuple[int, int]
    fps: int
    seconds: float

    @classmethod
    def draw(cls, rng: random.Random) -> Film:
        """Sizes, rates and lengths as cameras, phones and screens make them."""
        return cls(rng.choice(FRAME_SIZES), rng.choice(_RATES), rng.choice(_SECONDS))

    def shoot(self, scene: Scene, path: Path) -> None:
        """Write the file; it appears only when it is complete."""
        with atomic_path(path) as staging:
            write_mp4(scene, staging, self.size, self.fps, self.seconds)

    def shot(self, path: Path) -> bool:
        """True when the file exists and is such a film, complete to its last frame."""
        try:
            info = probe(path)
        except (VideoError, FileNotFoundError):
            return False
        found = ((info.width, info.height), round(info.fps), info.frame_count)
        return found == (self.size, self.fps, max(1, round(self.seconds * self.fps)))


def write_world(
    folder: Path,
    *,
    videos: int,
    seed: int,
    split: str = "train",
    questions_per_video: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, int]:
    """Write `manifest.jsonl` and `videos/` into a folder; videos that exist already are not filmed again.

    A video and its questions depend only on seed, split and the video's number: asking for more leaves the first ones
    as they are.

    Args:
        questions_per_video: that many types of `KINDS`, drawn for each video; one of each when None.
        on_progress: called with the number of videos done and of all.

    Returns:
        The manifest and the number of videos filmed in this call.

    Raises:
        ValueError: an unknown split, or more questions than there are types.
    """
    if questions_per_video is not None and not 0 < questions_per_video <= len(KINDS):
        raise ValueError(f"questions per video must be 1 to {len(KINDS)}, one of each type, not {questions_per_video}")
    scenes = sample_scenes(videos, seed, split)
    (folder / VIDEOS).mkdir(parents=True, exist_ok=True)
    examples: list[Example] = []
    filmed = 0
    for number, scene in enumerate(scenes):
        name = f"{split}-{seed}-{number:06d}"
        rng = random.Random(f"{DATASET}:{name}")
        film, path = Film.draw(rng), folder / VIDEOS / f"{name}.mp4"
        if not film.shot(path):
            film.shoot(scene, path)
            filmed += 1
        kinds = KINDS if questions_per_video is None else rng.sample(KINDS, questions_per_video)
        examples += [_example(scene, film, path, split, kind, rng) for kind in kinds]
        if on_progress:
            on_progress(number + 1, videos)
    write_manifest(folder / MANIFEST, examples)
    return folder / MANIFEST, filmed


def _example(scene: Scene, film: Film, path: Path, split: str, kind: str, rng: random.Random) -> Example:
    question, answer, _ = phrases.ask(scene, kind, rng)
    return Example(
        id=f"{path.stem}-{kind.replace(' ', '-')}",
        video_path=path,
        prompt=question,
        target_text=answer,
        task_type=kind,
        dataset=DATASET,
        split=split,
        metadata={"scene": scene.key, "size": list(film.size), "fps": film.fps, "seconds": film.seconds},
    )
