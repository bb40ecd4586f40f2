"""A data folder through many deaths: its server, its videos, what each of them answers, and what may be left behind."""

from __future__ import annotations

import sqlite3
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from f2l_vllm.client import metric, upload
from f2l_vllm.store import manifest
from tests.support.disk import open_disk
from tests.support.server import Server
from tests.support.stages import Processes, Stages, until
from tests.support.videos import write_video

QUESTION = [{"role": "user", "content": "What is shown?"}]
GREEDY = {"temperature": 0, "max_tokens": 40}
PATIENT = {"f2l": {"wait": 300}}
LONG = {"temperature": 0, "max_tokens": 1500, "extra_body": {"ignore_eos": True}}
FLAGS = ("--worker-cpus", "0.3", "--chunk-seconds", "10", "--max-chunks", "3")  # long videos are decoded in three parts


class Life:
    """`kept` is a ready video that stays, and `whole` a long answer about it; `clips` are those that come and go."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self.disk = open_disk(folder / "home")
        self.home = self.disk.seen
        fast = {"preset": "ultrafast", "g": "100000"}  # one key frame: the last chunk is decoded from the beginning
        self.clips = [
            write_video(folder / "kept.mp4", frames=20, fps=8),
            write_video(folder / "long.mp4", frames=600, fps=20, size=(640, 360), options=fast),
            write_video(folder / "longer.mp4", frames=900, fps=30, size=(640, 480), options=fast),
            write_video(folder / "square.mp4", frames=27, fps=9, size=(128, 128)),
            write_video(folder / "upright.mp4", frames=34, fps=10, size=(240, 320)),
        ]
        self.start()
        files = [file.id for file in upload(self.server.client, *self.clips)]
        # What every later life is held to.
        self.answers = dict(zip(self.clips, [self.ask(file_id) for file_id in files], strict=True))
        assert len(set(self.answers.values())) == len(self.clips)
        self.kept, *others = files
        self.whole = "".join(self.stream(self.kept))
        for file_id in others:
            self.server.client.files.delete(file_id)

    def start(self, workers: int = 3) -> None:
        """Serve the data folder, with as many jobs at a time as there are workers."""
        flags = ("--hypernetwork-workers", str(workers), *FLAGS)
        self.server = self.disk.run(lambda: Server(self._model, self.disk.folder, *flags))
        self.server.wait_ready()

    def end(self) -> None:
        """Stop in order, whatever state it is in."""
        with suppress(subprocess.TimeoutExpired):
            self.server.stop()
        self.disk.close()

    def upload(self, clip: Path) -> str:
        return self.server.client.files.create(file=clip, purpose="vision").id

    def ask(self, file_id: str, **options: Any) -> str:
        response = self.server.client.chat.completions.create(model=file_id, messages=QUESTION, **{**GREEDY, **options})
        return response.choices[0].message.content

    def stream(self, file_id: str) -> Iterator[str]:
        """A long answer as it comes; it has begun when this returns."""
        chunks = self.server.client.chat.completions.create(model=file_id, messages=QUESTION, stream=True, **LONG)
        texts = (chunk.choices[0].delta.content or "" for chunk in chunks)
        first = next(texts) + next(texts)

        def rest() -> Iterator[str]:
            yield first
            yield from texts

        return rest()

    def stage(self, file_id: str) -> str:
        return self.server.client.files.retrieve(file_id).model_extra["f2l"]["stage"]

    @property
    def published(self) -> float:
        """Jobs that this life of the server has seen done."""
        return metric(self.server.url, "f2l_internalized_total", outcome="published")

    @contextmanager
    def at_every_stage(self) -> Iterator[tuple[Processes, dict[str, Path]]]:
        """Four videos by file id: one decoding, one encoding, one being published, one waiting for a worker."""
        for file in self.server.client.files.list():  # of a test that failed
            if file.id != self.kept:
                self.server.client.files.delete(file.id)
        until(lambda: metric(self.server.url, "f2l_workers") == 3, "three workers")
        self.stages = Stages(self.server, self.home, self.stage)
        files: dict[str, Path] = {}
        _, decoded, encoded, published, waiting = self.clips
        try:
            for stage, clip in (("decoding", decoded), ("encoding", encoded), ("publishing", published)):
                stop = partial(self.stages.stop_at, stage, partial(self.upload, clip))
                files[stop(self.server.client.files.delete)] = clip
            files[self.upload(waiting)] = waiting
            assert [self.stage(file_id) for file_id in files] == ["decoding", "encoding", "publishing", "uploaded"]
            yield Processes(self.server), files
        finally:
            self.stages.release()

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No room is left for uploads and adapters."""
        processes = Processes(self.server)
        with self.disk.full(processes.server | processes.workers):
            yield

    def logged(self, text: str) -> int:
        """How often the server has said this."""
        return self.server.log.read_text(errors="replace").count(text)

    def check(self, files: dict[str, Path]) -> None:
        """Every one of these videos becomes ready and answers as itself, and nothing else is there."""
        with ThreadPoolExecutor() as threads:
            answers = threads.map(lambda file_id: self.ask(file_id, timeout=300, extra_body=PATIENT), files)
            found = dict(zip(files, answers, strict=True))
        assert found == {file_id: self.answers[clip] for file_id, clip in files.items()}
        assert {file.id for file in self.server.client.files.list()} == {self.kept, *files}
        self.check_disk(1 + len(files))
        for file_id in files:
            self.server.client.files.delete(file_id)
        self.check_disk(1)

    def check_disk(self, count: int) -> None:
        """So many videos and as many adapters, all whole; no job, and no work in progress."""
        adapters = [path.name for path in (self.home / "adapters").iterdir()]
        assert len(adapters) == count
        for name in adapters:
            manifest.verify(self.home / "adapters" / name, name)
        assert len([path for path in (self.home / "videos").rglob("*") if path.is_file()]) == count
        assert list((self.home / "tmp").glob("*/*")) == []
        assert self.query("SELECT * FROM jobs") == []

    def query(self, sql: str) -> list[Any]:
        """Ask the catalog."""

        def ask() -> list[Any]:
            with closing(sqlite3.connect(self.disk.folder / "catalog.sqlite3")) as connection:
                return connection.execute(sql).fetchall()

        return self.disk.run(ask)
