"""The search page: one file, and a policy under which a browser runs nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import FastAPI, Request
from starlette.responses import Response


def add_page(app: FastAPI) -> None:
    """``/``, with an ETag."""
    page = resources.files("serve").joinpath("ui/index.html").read_bytes()
    etag = f'"{hashlib.sha256(page).hexdigest()[:24]}"'
    headers = {"Content-Security-Policy": _page_policy(page.decode()), "Cache-Control": "no-cache", "ETag": etag}

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if request.headers.get("if-none-match") == etag:
            return Response(status_code=304, headers=headers)
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _page_policy(page: str) -> str:
    """A policy that runs the page's own script and style, named by their hashes, and nothing else."""

    def hashes(tag: str) -> str:
        bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in bodies)
        return " ".join(f"'sha256-{d}'" for d in digests)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
