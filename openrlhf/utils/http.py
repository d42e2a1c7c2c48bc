"""What our HTTP services share: keys, bounded bodies, answers, figures for Prometheus, and the socket they listen at.

Knows nothing about what is served.
"""

import hmac
import ipaddress
import json
import socket
import threading
from collections import Counter
from typing import Any

from fastapi import HTTPException, Request, Response
from starlette.requests import ClientDisconnect

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTER, GAUGE, SECONDS = "counter", "gauge", "histogram"
# A client that takes nothing of what is sent to it for so long is cut off.
UNREAD_SECONDS = 60


class Metrics:
    """Counts and seconds of this process in Prometheus' text format, for any thread.

    Args:
        described: of each metric its kind (`COUNTER`, `GAUGE` or `SECONDS`) and one line of help, in their order.
    """

    def __init__(self, described: dict[str, tuple[str, str]]) -> None:
        self._described, self._lock = described, threading.Lock()
        self._counts: dict[str, Counter[str]] = {name: Counter() for name in described}
        self._within = {name: [0] * len(BUCKETS) for name, (kind, _) in described.items() if kind == SECONDS}

    def add(self, name: str, number: float = 1, **labels: object) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name][",".join(f'{key}="{value}"' for key, value in labels.items())] += number  # type: ignore[assignment]

    def observe(self, name: str, seconds: float) -> None:
        """Counts one duration."""
        with self._lock:
            self._counts[name]["count"] += 1
            self._counts[name]["sum"] += seconds  # type: ignore[assignment]
            self._within[name] = [n + (seconds <= bound) for n, bound in zip(self._within[name], BUCKETS, strict=True)]

    def text(self, **gauges: float) -> str:
        """All metrics; `gauges` by their names."""
        lines = []
        with self._lock:
            for name, (kind, told) in self._described.items():
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
                if kind == GAUGE:
                    lines.append(f"{name} {gauges[name]}")
                elif kind == COUNTER:
                    counts = self._counts[name] or Counter({"": 0})
                    lines += [
                        f"{name}{{{labels}}} {n}" if labels else f"{name} {n}" for labels, n in sorted(counts.items())
                    ]
                else:
                    total = self._counts[name]["count"]
                    buckets = [*zip(map(str, BUCKETS), self._within[name], strict=True), ("+Inf", total)]
                    lines += [f'{name}_bucket{{le="{bound}"}} {n}' for bound, n in buckets]
                    lines += [f"{name}_sum {self._counts[name]['sum']:.6f}", f"{name}_count {total}"]
        return "\n".join(lines) + "\n"


def said(what: dict, status: int = 200, headers: Any = None) -> Response:
    """A JSON answer."""
    return Response(json.dumps(what), status, headers, "application/json")


def check_key(request: Request, api_key: str | None) -> None:
    """Raises HTTPException 401 unless the request carries the key."""
    given = request.headers.get("authorization", "").encode("latin-1")
    if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
        raise HTTPException(
            401, "this service needs its key: send Authorization: Bearer KEY", {"WWW-Authenticate": "Bearer"}
        )


async def read_body(request: Request, limit: int) -> bytes:
    """The body of a request, never holding more than `limit` bytes of it.

    Raises:
        HTTPException: 413 where it is longer, as soon as that is known.
    """
    too_long = HTTPException(413, f"the body has more than {limit:,} bytes", {"Connection": "close"})
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_long
    read = bytearray()
    try:
        async for part in request.stream():
            if len(read) + len(part) > limit:
                raise too_long
            read += part
    except ClientDisconnect:
        raise HTTPException(400, "the body ended before its end") from None
    return bytes(read)


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that connections are refused rather than left waiting while a model loads.

    Raises:
        OSError: in words.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; connections inherit it
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNREAD_SECONDS)
        bound.bind(address)
        return bound
    except OSError as error:
        raise OSError(f"cannot listen at --host {host} --port {port} ({error}): give another address or port") from None


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
