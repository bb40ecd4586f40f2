"""Streams that are pulled from their source by the server that looks after all of them."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import shutil
import tempfile
from pathlib import Path

from f2l_vllm.catalog.stream_tables import StreamRecord, StreamState
from f2l_vllm.server import metrics
from f2l_vllm.server.errors import APIError
from f2l_vllm.server.streams.live import LiveStreams
from f2l_vllm.store.errors import Unavailable
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.pull import Puller

logger = logging.getLogger(__name__)
_TICK_SECONDS = 1.0
_AGAIN_SECONDS = 2.0  # after a fault of this server's; the segment is tried again
_ATTEMPTS = 30


class Pulls:
    """Lives on the API server's event loop.

    Args:
        folder: where segments are while they are taken; they are the server's own.
    """

    def __init__(self, live: LiveStreams, folder: Path) -> None:
        self._live, self._catalog, self._folder = live, live.service.catalog, folder
        self._pulling: dict[str, asyncio.Task[None]] = {}  # by stream

    async def run(self) -> None:
        """Pull, until cancelled."""
        shutil.rmtree(self._folder, ignore_errors=True)  # of a server that was killed
        try:
            while True:
                try:
                    await self.look()
                except Unavailable as error:
                    logger.info("streams are pulled later: %s", error)
                except Exception:
                    logger.exception("streams are pulled later")
                await asyncio.sleep(_TICK_SECONDS)
        finally:
            for task in self._pulling.values():
                task.cancel()
            await asyncio.gather(*self._pulling.values(), return_exceptions=True)

    async def look(self) -> None:
        """Begin to pull what is live, and stop what is no longer, or no longer this server's.

        Raises:
            Unavailable: the catalog cannot be asked.
        """
        mine = self._live.has_duty and not self._live.service.is_stopping
        known = await asyncio.to_thread(self._catalog.open_streams) if mine or self._pulling else []
        wanted = {stream.id: stream for stream in known if mine and stream.source and stream.state is StreamState.LIVE}
        for name in [name for name in self._pulling if name not in wanted or self._pulling[name].done()]:
            self._pulling.pop(name).cancel()
        for name, stream in wanted.items():
            if name not in self._pulling:
                self._pulling[name] = asyncio.create_task(self._pull(stream))

    async def _pull(self, stream: StreamRecord) -> None:
        await asyncio.to_thread(self._folder.mkdir, parents=True, exist_ok=True)
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._folder))
        states: asyncio.Queue[tuple[str, str | None]] = asyncio.Queue()
        telling = asyncio.create_task(self._tell(stream, states))
        policy = self._live.service.settings.fetch_policy

        said = ""

        def on_state(state: str, why: str | None) -> None:
            nonlocal said
            if state not in (said, "connecting"):
                metrics.STREAM_SOURCES.labels(state).inc()
            said = state
            states.put_nowait((state, why))

        puller = Puller(stream.source or "", stream.segment_seconds, policy, folder, on_state=on_state)
        try:
            async for path in puller.segments():
                await self._take(stream, path)
            await self._live.end(stream)
        except VideoError as error:
            logger.warning("%s is pulled no more: %s", stream.id, error)
            on_state("failed", f"{error.code}: {error.message}")
            await self._live.end(stream)
        except APIError as error:
            logger.info("%s is pulled no more: %s", stream.id, error)
        finally:
            await puller.close()
            states.put_nowait(("", None))
            await asyncio.wait([telling], timeout=_AGAIN_SECONDS)
            telling.cancel()
            await asyncio.to_thread(shutil.rmtree, folder, True)

    async def _take(self, stream: StreamRecord, path: Path) -> None:
        """Enter a segment, however long the catalog is away, so that none is lost."""
        sha256, size = await asyncio.to_thread(_hashed, path)
        for attempt in range(_ATTEMPTS):
            try:
                await self._live.add(stream, path.name, path, size, sha256)
            except (Unavailable, APIError) as error:
                passes = isinstance(error, Unavailable) or error.status.value in (429, 503)
                if not passes or attempt == _ATTEMPTS - 1:
                    if isinstance(error, APIError) and error.code == "stream_ended":
                        raise
                    logger.warning("a segment of %s is lost: %s", stream.id, error)
                    break
                await asyncio.sleep(_AGAIN_SECONDS)
            else:
                break
        await asyncio.to_thread(path.unlink, True)

    async def _tell(self, stream: StreamRecord, states: asyncio.Queue[tuple[str, str | None]]) -> None:
        """Show in the stream's object how it is with its source."""
        while (told := await states.get())[0]:
            shown = {"state": told[0], "why": told[1], "since": int(self._catalog.now())}
            details = {**stream.details, "source": shown}
            try:
                await self._live.service.change(self._catalog.note_stream, stream, details=details)
            except Unavailable as error:
                logger.info("the state of %s is not shown: %s", stream.id, error)


def _hashed(path: Path) -> tuple[str, int]:
    data = path.read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)
