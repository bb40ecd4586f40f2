"""Makes vLLM read a question's media under this server's rules: the same hosts, addresses, caps and deadline.

For every message with media, vLLM builds its media connector by name from a registry. This module registers the
default name, so that nothing needs to be configured. Fetched media wait on disk until all media of their question are
there. They are then decoded in a separate process, a few questions at a time: tenants take turns, and a question keeps
its place until vLLM has reduced its pixels.
"""

from __future__ import annotations

import asyncio
import contextvars
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cache, partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from f2l_vllm.engine.base_models.video_loader import SampledVideoLoader
from f2l_vllm.server.chat.content import check_address
from f2l_vllm.server.errors import APIError, bad_request
from f2l_vllm.server.local_videos import LocalVideo, video_at
from f2l_vllm.server.media.turns import Turns
from f2l_vllm.server.tenants import asking_tenant
from f2l_vllm.settings import current
from f2l_vllm.store.manifest import sha256_of
from f2l_vllm.video.decoder import DecodeLimits, Decoders
from f2l_vllm.video.errors import VideoError
from f2l_vllm.video.fetch import fetch

CONNECTOR = "http"
PLACES = 2  # questions whose media are decoded and processed at the same time
_PICTURE_SECONDS = 20.0
_PICTURE_MEMORY = 2 << 30
_NICE = 10  # decoding gives way to answering
_OF_PICTURES = {"decode_failed": "invalid_image", "video_too_large_to_decode": "image_too_large"}


class MediaOfQuestion:
    """The media of one question: fetched in parallel, then decoded one by one in one of the server's places."""

    def __init__(self, turns: Turns, tenant: str) -> None:
        self._turns = turns
        self._tenant = tenant
        self._fetching = 0
        self._fetched = asyncio.Event()
        self._fetched.set()
        self._decoding = asyncio.Lock()
        self._has_place = False
        self._work: asyncio.Future[Any] | None = None
        self.pixels_left: int | None = None  # that its pictures may still have; None before the first picture

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Keep the question from taking a place while one of its media is fetched: addresses may be slow."""
        self._fetching += 1
        self._fetched.clear()
        try:
            yield
        finally:
            self._fetching -= 1
            if not self._fetching:
                self._fetched.set()

    async def decode(self, work: Callable[..., Any], *args: Any) -> Any:
        """Call `work` in a thread when all media are fetched and it is the question's turn."""
        await self._fetched.wait()
        async with self._decoding:
            if not self._has_place:
                await self._turns.take(self._tenant)
                self._has_place = True
            loop, context = asyncio.get_running_loop(), contextvars.copy_context()
            self._work = loop.run_in_executor(_threads(), partial(context.run, work, *args))
            return await asyncio.shield(self._work)  # a thread cannot be cancelled

    def release(self) -> None:
        """Give the place back, when the media are processed or the question failed; work that still runs ends first."""
        if not self._has_place:
            return
        self._has_place = False
        if self._work is None or self._work.done():
            self._turns.give_back()
        else:
            self._work.add_done_callback(self._end)

    def _end(self, work: asyncio.Future[Any]) -> None:
        work.exception()  # nobody waits for it
        self._turns.give_back()


_question: ContextVar[MediaOfQuestion | None] = ContextVar("media_of_question", default=None)


@contextmanager
def question() -> Iterator[None]:
    """All media decoded within this context belong to one question."""
    media = MediaOfQuestion(_turns(), asking_tenant.get())
    token = _question.set(media)
    try:
        yield
    finally:
        _question.reset(token)
        media.release()


@cache
def _turns() -> Turns:
    return Turns(PLACES)


@cache
def _threads() -> ThreadPoolExecutor:
    """Separate threads, because they wait for decoders and all questions need the default ones."""
    return ThreadPoolExecutor(PLACES, thread_name_prefix="media")


@cache
def _decoders(memory: int, pixels: int) -> Decoders:
    """Decoders for pictures."""
    return Decoders(PLACES, DecodeLimits(min(_PICTURE_MEMORY, memory), _PICTURE_SECONDS, 3 * pixels, _NICE))


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class GuardedMediaConnector(MediaConnector):
    """Replaces vLLM's connector, so that vLLM fetches and decodes nothing by itself."""

    def load_from_url(self, url: str, media_io: Any, **_limits: Any) -> Any:
        """Like `load_from_url_async`, for vLLM's threads."""
        return asyncio.run(self.load_from_url_async(url, media_io))

    async def load_from_url_async(self, url: str, media_io: Any, **_limits: Any) -> Any:
        """A picture or a video's frames, from an http(s) address or a data URI.

        Raises:
            APIError: what `check_address` and `fetch` refuse, `invalid_image`, `image_too_large`, and what is
                wrong with a video.
        """
        if (local := video_at(url)) is not None:
            return await self._load_local(local, media_io)
        check_address(url)
        settings = current()
        if isinstance(media_io, ImageMediaIO):
            cap = settings.max_image_bytes
        elif isinstance(media_io, VideoMediaIO):  # read into memory, like files for answers from frames
            cap = min(settings.max_upload_bytes, settings.max_frames_bytes)
        else:
            raise bad_request("unsupported_part", "This server takes pictures and videos, and no sound.", "messages")
        media = _question.get() or MediaOfQuestion(Turns(1), asking_tenant.get())
        with tempfile.TemporaryDirectory(prefix="f2l-media-") as folder:
            target = Path(folder) / "media"
            try:
                with media.fetching():
                    await asyncio.sleep(0)  # until the question's other media have begun
                    await fetch(url, target, replace(settings.fetch_policy, max_bytes=cap))
                if isinstance(media_io, ImageMediaIO):
                    return await media.decode(_picture, target, media, media_io.rgba_background_color)
                return await media.decode(_frames, target, media_io)
            except VideoError as error:
                raise _refused(error, isinstance(media_io, ImageMediaIO)) from error

    async def _load_local(self, video: LocalVideo, media_io: VideoMediaIO) -> Any:
        media = _question.get() or MediaOfQuestion(Turns(1), asking_tenant.get())
        try:
            return await media.decode(_frames, video.path, media_io, video.sha256)
        except VideoError as error:
            raise _refused(error, is_picture=False) from error
        except FileNotFoundError as error:
            message = "The video was deleted while its question was being read."
            raise APIError(HTTPStatus.NOT_FOUND, "video_not_found", message, param="messages") from error

    def fetch_image_embedding(self, data: str) -> Any:
        """Refused: vLLM would unpickle it.

        Raises:
            APIError: `unsupported_part`.
        """
        raise bad_request("unsupported_part", "Embeddings are not taken.", "messages")

    async def fetch_image_embedding_async(self, data: str) -> Any:
        """Refused, like `fetch_image_embedding`."""
        return self.fetch_image_embedding(data)

    fetch_audio_embedding = fetch_video_embedding = fetch_image_embedding
    fetch_audio_embedding_async = fetch_video_embedding_async = fetch_image_embedding_async


def _picture(path: Path, media: MediaOfQuestion, background: Sequence[int]) -> MediaWithBytes[Image.Image]:
    """Runs in a thread."""
    settings = current()
    if media.pixels_left is None:
        media.pixels_left = settings.max_image_pixels
    with _decoders(settings.decode_memory_bytes, settings.max_image_pixels).lend() as decoder:
        pixels = decoder.picture(path, media.pixels_left, background)
    media.pixels_left -= pixels.shape[0] * pixels.shape[1]
    return MediaWithBytes(Image.fromarray(pixels), _key(path))


def _frames(path: Path, media_io: VideoMediaIO, sha256: str | None = None) -> Any:
    """Runs in a thread."""
    video: Any
    try:
        if isinstance(media_io.video_loader, SampledVideoLoader):
            video = media_io.video_loader.load_path(path, num_frames=media_io.num_frames, **media_io.kwargs)
        else:  # the operator's choice
            video = media_io.load_bytes(path.read_bytes()).media
    except (FileNotFoundError, MemoryError):  # this server's, not the video's
        raise
    except ValueError as error:
        if isinstance(error.__cause__, VideoError):
            raise error.__cause__ from error
        raise
    except Exception as error:  # raised in a library by hostile bytes
        raise VideoError("decode_failed", "The video cannot be decoded: send another file.") from error
    return MediaWithBytes(video, _key(path, sha256))


def _key(path: Path, sha256: str | None = None) -> bytes:
    """vLLM's cache key for the processed medium, besides the processing options: its bytes and its owner."""
    settings = current()
    owner = asking_tenant.get() if settings.tenants is not None and not settings.share_caches else ""
    return hashlib.sha256(owner.encode()).digest() + bytes.fromhex(sha256 or sha256_of(path))


def _refused(error: VideoError, is_picture: bool) -> APIError:
    code: str = error.code
    message = error.message
    if is_picture and code in _OF_PICTURES:
        code, message = _OF_PICTURES[code], "The picture cannot be decoded within what it may cost: send a smaller one."
    elif is_picture:
        message = message.replace("video", "picture")
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if code == "file_too_large" else HTTPStatus.BAD_REQUEST
    return APIError(status, code, message, param="messages")
