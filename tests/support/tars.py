"""Tar files of videos in webdataset's layout, and a web server that gives parts of files."""

import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from f2l_vllm.train.data.manifest import Example


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write_shards(folder: Path, examples: Sequence[Example], videos_each: int) -> str:
    """Put the examples' videos and texts into tar files; the pattern of their names, without the folder."""
    videos: dict[Path, list[dict[str, Any]]] = {}
    for one in examples:
        row = {name: getattr(one, name) for name in ("id", "prompt", "target_text", "task_type", "dataset", "split")}
        videos.setdefault(one.video_path, []).append(row | {"metadata": one.metadata})
    paths = list(videos)
    count = -(-len(paths) // videos_each)
    for number in range(count):
        with tarfile.open(folder / f"shard-{number:03}.tar", "w") as tar:
            for path in paths[number * videos_each : (number + 1) * videos_each]:
                add(tar, path.name, path.read_bytes())
                add(tar, f"{path.stem}.json", json.dumps(videos[path]).encode())
    return f"shard-{{000..{count - 1:03}}}.tar"


class Site:
    """A folder at `url`; `parts` are the ranges that were asked for. `broken` answers are errors of the server."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.url = folder, ""
        self.parts: list[tuple[str, int, int]] = []
        self.broken = 0
        self.whole = False


@contextmanager
def running_site(folder: Path) -> Iterator[Site]:
    """A web server for a folder, until the block ends."""
    site = Site(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = site.folder / self.path.lstrip("/")
            if site.broken > 0 or not path.is_file():
                site.broken -= path.is_file()
                self.send_error(500 if path.is_file() else 404)
                return
            content = path.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if asked and not site.whole:
                first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
                site.parts.append((path.name, first, last + 1))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
                content = content[first : last + 1]
            else:
                self.send_response(200)
            if not site.whole:
                self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
