"""`f2l-vllm upload`: many videos to a running server, each once, and a line of JSON for each of them.

What the server has already is known by its SHA-256 and is not sent. So a run that was cut off, or that failed for some
files, goes on when the same command is run again.
"""

from __future__ import annotations

import glob
import json
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from f2l_vllm.cli.options import api_url
from f2l_vllm.cli.progress import progress
from f2l_vllm.files import write_whole
from f2l_vllm.store.manifest import sha256_of

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import FileObject

SUFFIXES = tuple(f".{kind}" for kind in ("3gp", "avi", "flv", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ogv", "webm"))
_TRIES = 5  # while the server cannot be reached or has no room
_LONGEST_PAUSE = 30.0
_POLL_SECONDS = 0.5
_console = Console(stderr=True)


def upload(
    sources: Sequence[str], url: str, api_key: str, output: Path | None, parallel: int, wait: bool, expires: int | None
) -> None:
    """Send videos, and write the manifest to `output`, or to standard output.

    Raises:
        typer.BadParameter: there is nothing to send.
        typer.Exit: 1 if the server could not be asked, or a file failed.
    """
    from openai import APIError, OpenAI

    paths = find(sources)
    client = OpenAI(base_url=api_url(url), api_key=api_key, max_retries=0, timeout=600)
    try:
        known = {_sha256(file): file for file in client.files.list() if _lasts(file)}
    except APIError as error:
        _say(url, error)
        raise typer.Exit(1) from error
    sending = _Sending(client, known, expires)
    rows: dict[Path, dict[str, Any]] = {}
    with progress(_console) as tell, ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(sending.row, path, wait): path for path in paths}
        try:
            for count, future in enumerate(as_completed(futures), 1):
                rows[futures[future]] = future.result()
                tell("videos", count, len(paths))
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            _console.print("stopped: run the same command again, and what has arrived is not sent again")
            raise
    lines = "".join(f"{json.dumps(rows[path], ensure_ascii=False)}\n" for path in paths)
    if output is None:
        typer.echo(lines, nl=False)
    else:
        write_whole(output, lines)
    failed = sum("error" in row for row in rows.values())
    told = f"{len(paths)} videos: {sending.sent} sent, {failed} failed, the others were there already"
    _console.print(told, highlight=False)
    if failed:
        raise typer.Exit(1)


def find(sources: Iterable[str]) -> list[Path]:
    """The files that these name: files, patterns, and folders with all videos below them. Each once, sorted.

    Raises:
        typer.BadParameter: one of them names nothing.
    """
    found: set[Path] = set()
    for source in sources:
        path = Path(source)
        if path.is_dir():
            named = [one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file()]
            named = [one for one in named if not any(part.startswith(".") for part in one.relative_to(path).parts)]
        elif path.exists():
            named = [path]
        else:
            named = [one for one in map(Path, glob.iglob(source, recursive=True)) if one.is_file()]
        if not named:
            raise typer.BadParameter(f"there is no video in {source}: name files, folders, or a pattern in quotes")
        found.update(named)
    return sorted(found)


class _Sending:
    """Sends files from several threads, the same bytes once.

    Args:
        known: what the server has, by hash.
    """

    def __init__(self, client: OpenAI, known: dict[str, FileObject], expires: int | None) -> None:
        self._client, self._expires = client, expires
        self._lock = threading.Lock()
        self._files: dict[str, Future[FileObject]] = {sha256: _done(file) for sha256, file in known.items()}
        self._pause_until = 0.0
        self.sent = 0

    def row(self, path: Path, wait: bool) -> dict[str, Any]:
        """The manifest's line about a file, once it is there, with `wait` once it is processed."""
        from openai import APIError

        row: dict[str, Any] = {"path": str(path)}
        try:
            row["sha256"] = sha256 = sha256_of(path)
            entry = self._entry(path, sha256)
            if wait:
                entry = self._client.files.wait_for_processing(
                    entry.id, poll_interval=_POLL_SECONDS, max_wait_seconds=float("inf")
                )
            row |= {"id": entry.id, "bytes": entry.bytes, "status": entry.status}
            if entry.status == "error":
                row["error"] = _extra(entry)["error"]
        except (APIError, OSError) as error:
            row["error"] = _envelope(error)
        if "error" in row:
            _say(str(path), row["error"])
        return row

    def _entry(self, path: Path, sha256: str) -> FileObject:
        """The server's file with these bytes. Who comes first sends them; the others wait for it."""
        with self._lock:
            is_first = sha256 not in self._files
            future = self._files.setdefault(sha256, Future())
        if is_first:
            try:
                future.set_result(self._send(path, sha256))
            except BaseException as error:
                future.set_exception(error)
            else:
                with self._lock:
                    self.sent += 1
        return future.result()

    def _send(self, path: Path, sha256: str) -> FileObject:
        from openai import APIConnectionError, InternalServerError, RateLimitError

        options: dict[str, Any] = {}
        if self._expires is not None:
            options["expires_after"] = {"anchor": "created_at", "seconds": self._expires}
        tries = 0
        while True:
            while (left := self._pause_until - time.monotonic()) > 0:
                time.sleep(left)
            try:
                with path.open("rb") as file:
                    entry = self._client.files.create(file=(path.name, file), purpose="vision", **options)
                break
            except RateLimitError as error:  # the queue is full: workers make room, however long it takes
                self._pause(float(error.response.headers.get("Retry-After", _LONGEST_PAUSE)))
            except (APIConnectionError, InternalServerError):
                tries += 1
                if tries == _TRIES:
                    raise
                self._pause(2.0**tries)
        if _sha256(entry) != sha256:
            self._client.files.delete(entry.id)
            raise OSError("it changed while it was sent: send it again")
        return entry

    def _pause(self, seconds: float) -> None:
        """Nobody sends anything for so long: a whole video is refused as late as a small one."""
        self._pause_until = time.monotonic() + min(seconds, _LONGEST_PAUSE)


def _lasts(file: FileObject) -> bool:
    """Whether it may stand for the same bytes in a manifest: it has not failed, and does not go by itself."""
    return file.status != "error" and file.expires_at is None and _sha256(file) != ""


def _extra(file: FileObject) -> dict[str, Any]:
    found: dict[str, Any] = (file.model_extra or {}).get("f2l") or {}
    return found


def _sha256(file: FileObject) -> str:
    return str(_extra(file).get("sha256", ""))


def _done(file: FileObject) -> Future[FileObject]:
    future: Future[FileObject] = Future()
    future.set_result(file)
    return future


def _envelope(error: Exception) -> dict[str, str]:
    """Code and message of an error, as the server's errors have them."""
    code = getattr(error, "code", None) or type(error).__name__
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return {"code": str(code), "message": str(message or error)}


def _say(what: str, error: Exception | dict[str, str]) -> None:
    told = error if isinstance(error, dict) else _envelope(error)
    _console.print(f"{what}: {told['code']}: {told['message']}", markup=False, highlight=False, soft_wrap=True)
