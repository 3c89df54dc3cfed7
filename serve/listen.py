"""The ingress's own HTTP socket: on one machine, nothing stands between a user and it.

Behind Ray Serve's proxy, a request crosses two more processes' event loops and comes back as a stream of messages: most
of what a search used to cost, and as much for one that is refused, which waits there before it can be. Where the
ingress runs on the machine that is to listen (``ace serve``), it can listen itself. Under ``serve deploy`` Ray Serve's
proxies find the ingress, and nothing of this module runs.

What a proxy does for a request is done here: whoever takes too long to send it is told so, and the work for whoever
went away is cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import uvicorn
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_STOP_SECONDS = 5
_KEEP_ALIVE_SECONDS = 90


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, host: str, port: int, *, body_seconds: float) -> AsyncIterator[int]:
    """Answer HTTP with ``app`` as long as the context lasts; yields the port (the one taken, for port 0).

    Args:
        body_seconds: how long a request may take to arrive.

    Raises:
        OSError: the address cannot be used.
    """
    # Unlike a bare bind, this takes a port whose last owner was killed a moment ago.
    sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=1024)
    config = uvicorn.Config(
        Listened(app, body_seconds),
        lifespan="off",  # it belongs to whoever holds the context
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Longer than clients and balancers keep an idle connection, or they would send into one that just ended.
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]  # not its process
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield sock.getsockname()[1]
    finally:
        server.should_exit = True
        await serving


class Listened:
    """ASGI middleware: a limit on how long a request takes to arrive, and an end of the work when its client leaves."""

    def __init__(self, app: ASGIApp, body_seconds: float) -> None:
        self._app = app
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        latest = asyncio.get_running_loop().time() + self._body_seconds
        leaving: asyncio.Task[Message] | None = None

        async def leave() -> Message:
            message = await receive()
            work.cancel()
            return message

        async def arriving() -> Message:
            nonlocal leaving
            if leaving is not None:
                return await asyncio.shield(leaving)
            try:
                async with asyncio.timeout_at(latest):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the request did not arrive within {self._body_seconds:g} s") from None
            if message["type"] == "http.request" and not message.get("more_body", False):
                # The next message can only say that the client is gone.
                leaving = asyncio.create_task(leave())
            return message

        work: asyncio.Task[None] = asyncio.create_task(self._app(scope, arriving, send))  # type: ignore[arg-type]
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            work.cancel()
            await asyncio.wait([work])
            if leaving is None or not leaving.done():
                raise  # the server stops; otherwise it was the client, and nobody listens any more
        finally:
            if leaving is not None:
                leaving.cancel()
