"""The console's static files, as they are sent: read once, with headers that let a browser run these files alone."""

from __future__ import annotations

import gzip
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

FOLDER = Path(__file__).parent / "static"
ROOT = "/console"
PACKED = ".gz"  # kept as they are sent
_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".txt": "text/plain; charset=utf-8",
}
# Nothing but this server's own files runs, and nothing else is asked. Pictures are fetched with the key and shown from
# memory (`blob:`). Text cannot become HTML by accident: without a policy for trusted types, setting HTML raises.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again with its tag, so that a new version shows at once
}


@dataclass(frozen=True)
class _Page:
    content: bytes
    headers: dict[str, str]


class Pages:
    """All static files by path; `paths` is what a browser may ask for without a key."""

    def __init__(self) -> None:
        files = sorted(FOLDER.rglob("*.*"))
        self._pages = {f"{ROOT}/{path.relative_to(FOLDER)}".removesuffix(PACKED): _page(path) for path in files}
        self._pages[f"{ROOT}/"] = self._pages.pop(f"{ROOT}/index.html")
        self.paths = frozenset({ROOT, *self._pages})

    async def answer(self, request: Request) -> Response:
        """The file of this path. The page itself is `/console/`, so that its addresses are relative to any prefix that
        a proxy puts before it."""
        path = request.url.path.removeprefix(request.scope.get("root_path", ""))
        if path == ROOT:
            return RedirectResponse("console/")
        page = self._pages[path]
        if request.headers.get("if-none-match") == page.headers["ETag"]:
            return Response(status_code=304, headers=page.headers)
        if "Content-Encoding" in page.headers and "gzip" not in request.headers.get("accept-encoding", ""):
            plain = {name: value for name, value in page.headers.items() if name != "Content-Encoding"}
            return Response(gzip.decompress(page.content), headers=plain)
        return Response(page.content, headers=page.headers)


def _page(path: Path) -> _Page:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
    kind = _TYPES[Path(path.name.removesuffix(PACKED)).suffix]
    packed = {"Content-Encoding": "gzip", "Vary": "Accept-Encoding"} if path.suffix == PACKED else {}
    return _Page(content, {**_HEADERS, "Content-Type": kind, "ETag": tag, **packed})
