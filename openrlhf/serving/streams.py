"""Work that ends with its client, and answers in pieces (server-sent events). Knows nothing about what is sent."""

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from openrlhf.serving.errors import told

# For a last word to a client that may not be reading.
LAST_SECONDS = 5
HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
Result = TypeVar("Result")


async def while_connected(receive: Receive, work: Callable[[], Awaitable[Result]]) -> Result | None:
    """What `work` gives; it is cancelled where the client goes before, and the result is None.

    Args:
        receive: of a request whose body was read.
    """
    outcome: list[Result] = []
    failure: list[Exception] = []
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            outcome.append(await work())
        except Exception as error:  # raised below, where it is not wrapped into a group of exceptions
            failure.append(error)
        group.cancel_scope.cancel()
    if failure:
        raise failure[0]
    return outcome[0] if outcome else None


class EventStream(Response):
    """An answer whose pieces are sent as they come.

    An error before the first piece is raised, so that it becomes an answer with its own status; a later one is the last
    piece.

    Args:
        write: calls what it is given with one object after another.
        seconds: for the whole of it, a client that reads slowly included.
    """

    def __init__(self, write: Callable[[Callable[[Any], Awaitable[None]]], Awaitable[None]], seconds: float):
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]
        self._write, self._seconds, self._begun = write, seconds, False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            with anyio.fail_after(self._seconds):
                await while_connected(receive, partial(self._write, partial(self._send, send)))
        except Exception as error:
            if not self._begun:
                raise
            with anyio.move_on_after(LAST_SECONDS):
                await self._send(send, told(error)[1])
            if not isinstance(error, TimeoutError) and told(error)[0] == 500:
                raise
        if self._begun:
            with anyio.move_on_after(LAST_SECONDS):
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, what: Any) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        data = what if isinstance(what, str) else json.dumps(what)
        await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
