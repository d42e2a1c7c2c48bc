"""What every request passes before it is looked at, and every answer before it leaves; knows nothing of what is asked.

A server at a loopback address has no key unless one is set, so that a web page of somebody else must not be able to use
it through the browser of the person it belongs to: requests that name another host (DNS rebinding) or come from another
origin are refused, and no CORS header is ever sent.
"""

import ipaddress
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from openrlhf.serving.errors import problem, told
from openrlhf.utils.http import Metrics, check_key, said

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


OPEN_PATHS = ("/", "/health", "/favicon.ico")
OPEN_FOLDER = "/page/"


class Guard:
    """ASGI middleware: foreign requests and those without the key go no further, all are counted.

    Args:
        metrics: has `clara_requests_total`.
        api_key: what `Authorization: Bearer …` must carry, but for the page and /health; None takes requests without.
        any_host: take requests for any host: where a key keeps strangers out, or the address is open to others anyway.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None = None, any_host: bool = False):
        self.app, self.metrics, self.api_key, self.any_host = app, metrics, api_key, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # of a client that went before its answer

        async def guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, guarded)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.add("clara_requests_total", path=path, status=status)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        foreign = ""
        if not self.any_host and not is_local(host):
            foreign = f"this server answers to localhost only, not to {host[:100]!r}"
        elif origin is not None and not same_origin(origin, host):
            foreign = f"this server takes no requests from web pages of others ({origin[:100]!r})"
        if foreign:
            return said(problem(403, foreign, None, "foreign_request"), 403)
        if scope["path"] in OPEN_PATHS or scope["path"].startswith(OPEN_FOLDER):
            return None
        try:
            check_key(Request(scope), self.api_key)
        except HTTPException as error:
            return said(told(error)[1], error.status_code, error.headers)
        return None


def is_local(host: str) -> bool:
    """Whether a Host header names this machine."""
    name = hostname(f"//{host}")
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def same_origin(origin: str, host: str) -> bool:
    """Whether an Origin header names the host that the request is for."""
    try:
        theirs, scheme = urlsplit(origin), urlsplit(origin).scheme
        ours = urlsplit(f"{scheme}://{host}")
        default = {"http": 80, "https": 443}.get(scheme)
        ports = [one.port or default for one in (theirs, ours)]
        return (
            bool(theirs.hostname) and theirs.hostname == ours.hostname and ports[0] == ports[1] and default is not None
        )
    except ValueError:
        return False


def hostname(url: str) -> str:
    """The host of a URL, empty where it has none."""
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""
