"""The files of the page. They load nothing from elsewhere, and the browser holds them to it."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Route

_FOLDER = Path(__file__).parent / "static"
_INDEX = "index.html"
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> Iterator[Route]:
    """Yield a route for each file; the page itself is at the root."""
    for path in sorted(_FOLDER.iterdir()):
        place = "/" if path.name == _INDEX else f"/{path.name}"
        yield Route(place, partial(_file, path=path))


async def _file(request: Request, path: Path) -> Response:
    return FileResponse(path, headers=_HEADERS)
