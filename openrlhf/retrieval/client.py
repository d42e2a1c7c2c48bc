"""Asks the retrieval service (`openrlhf.retrieval.service`), over plain HTTP from the standard library.

Contract: a `RetrievalClient` called with queries gives the vectors that the service found, checked for shape and
finiteness, or raises in words; lost connections, timeouts and 5xx are tried again for a while, refusals are not. The
store behind a URL must stay the one that `check` saw. Proxies of the environment are not used, redirections not
followed. Imports nothing of ours; knows nothing about models or training.

Shape suffixes: B queries, N documents of a query, L memory tokens, D hidden size, E = L·D.
"""

import base64
import http.client
import json
import logging
import time
from typing import Any
from urllib.parse import urlsplit

import torch

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0
# Pauses between attempts; together they outlast the restart of a service.
PAUSES_SECONDS = (1.0, 2.0, 4.0, 8.0, 16.0)
# Of an answer, beside its vectors.
_MARGIN_BYTES = 2**22


class RetrievalError(OSError):
    """The service could not be asked, or what it said cannot be used; may be one rank's alone."""


def wrong_url(url: str) -> str | None:
    """What is wrong with a service's URL, None where nothing is."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        return f"{url!r} is not the URL of a service: give one such as http://127.0.0.1:5004"
    return None


class RetrievalClient:
    """A service at a URL.

    Args:
        url: such as http://127.0.0.1:5004.
        api_key: the service's key, where it has one.
        timeout: seconds to wait for a connection, and for each piece of an answer; TIMEOUT_SECONDS by default.
        pauses: seconds before each further attempt; PAUSES_SECONDS by default.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        timeout: float | None = None,
        pauses: tuple[float, ...] | None = None,
    ):
        if wrong_url(url):
            raise ValueError(wrong_url(url))
        self.url, self.api_key = url.rstrip("/"), api_key
        self.timeout = TIMEOUT_SECONDS if timeout is None else timeout
        self.pauses = PAUSES_SECONDS if pauses is None else pauses
        self.fingerprint: str | None = None

    def check(self, queries: int, n: int) -> dict:
        """What /health says, once: that the service is there, and gives `n` documents to each of so many queries.

        Raises:
            RetrievalError: it is not there, or cannot.
        """
        found = self._once("GET", "/health", None, _MARGIN_BYTES)
        try:
            numbers = found["memory_vectors"] * found["width"]
            limits, vectors = found["limits"], found["vectors"]
            self.fingerprint = str(found["fingerprint"])
            answer = queries * n * numbers * 2 * 4 / 3
            wrong = {
                "needs its key: set CLARA_API_KEY to what it was started with": found["key"] and not self.api_key,
                f"holds {vectors} different documents, {n} are to be found for each question": vectors < n,
                f"takes {limits['queries']} queries at once (--max_queries), not {queries}": limits["queries"]
                < queries,
                f"gives {limits['k']} documents a query (--max_k), not {n}": limits["k"] < n,
                f"cannot answer {queries} queries with {n} documents at once": limits["answer_bytes"] < answer,
            }
            if not isinstance(found["made_by"], dict):
                raise TypeError("made_by")
        except (KeyError, TypeError) as error:
            raise self._strange(f"/health without {error}") from None
        for problem, is_so in wrong.items():
            if is_so:
                raise RetrievalError(f"the retrieval service at {self.url} {problem}")
        return found

    def __call__(self, query_BE: torch.Tensor, n: int) -> torch.Tensor:
        """The n nearest documents of each query, best first.

        Args:
            query_BE: `[B, E]`, any float type and device.

        Returns:
            their flattened vectors `[B, N, E]` bfloat16, on the CPU.

        Raises:
            RetrievalError: the service is gone, refuses, has another store than before, or answers what is no answer.
        """
        dtype = query_BE.dtype if query_BE.dtype == torch.bfloat16 else torch.float32
        rows = query_BE.detach().to("cpu", dtype).contiguous().view(torch.uint8).numpy()
        queries = [base64.b64encode(row).decode() for row in rows]
        body = json.dumps({"queries": queries, "k": n, "encoding": "base64", "dtype": "bfloat16"}).encode()
        found = self._patiently("/queries", body, _MARGIN_BYTES + 3 * query_BE.numel() * n)
        return self._vectors(found, len(query_BE), n, query_BE.shape[1])

    def _vectors(self, found: dict, queries: int, n: int, numbers: int) -> torch.Tensor:
        try:
            texts, fingerprint = found["retrieved_embeddings"], found["fingerprint"]
            counts = [len(row) for row in texts]
            data = b"".join(base64.b64decode(text, validate=True) for row in texts for text in row)
        except (KeyError, TypeError, ValueError) as error:
            raise self._strange(f"an answer that cannot be read ({type(error).__name__}: {error})") from None
        if self.fingerprint not in (None, fingerprint):
            raise RetrievalError(f"the retrieval service at {self.url} has another store than when the run began")
        if counts != [n] * queries or len(data) != 2 * queries * n * numbers:
            raise self._strange(
                f"{counts} documents of {len(data)} bytes to {queries} queries for {n} of {2 * numbers}"
            )
        docs_BNE = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(queries, n, numbers)
        if not docs_BNE.isfinite().all():
            raise self._strange("vectors with NaN or infinity")
        return docs_BNE

    def _patiently(self, path: str, body: bytes, limit: int) -> dict:
        for pause in self.pauses:
            try:
                return self._once("POST", path, body, limit)
            except _Again as error:
                logger.warning("%s; trying again in %g s", error, pause)
                time.sleep(pause)
        return self._once("POST", path, body, limit)

    def _once(self, method: str, path: str, body: bytes | None, limit: int) -> dict:
        """One request; the answer's JSON object."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(str(parts.hostname), parts.port, timeout=self.timeout)
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        try:
            connection.request(method, parts.path + path, body, headers)
            response = connection.getresponse()
            status, data = response.status, response.read(limit)  # what is longer is cut, and no JSON
        except TimeoutError:
            raise _Again(f"the retrieval service at {self.url} gave no answer within {self.timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise _Again(f"no retrieval service answers at {self.url} ({reason}): start it there") from None
        finally:
            connection.close()
        if status != 200:
            raise self._refused(status, data)
        return self._parsed(data)

    def _parsed(self, data: bytes) -> dict:
        try:
            found = json.loads(data)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._strange(f"{data[:60]!r}" + (" …" if len(data) > 60 else ""))
        return found

    def _refused(self, status: int, data: bytes) -> "RetrievalError":
        reason = _reason(data)
        if status >= 500:
            return _Again(f"the retrieval service at {self.url} failed with status {status} ({reason})")
        hint = ". Set CLARA_API_KEY to the key it was started with" if status == 401 else ""
        return RetrievalError(f"the retrieval service at {self.url} refuses with status {status} ({reason}){hint}")

    def _strange(self, what: str) -> "RetrievalError":
        return RetrievalError(f"what listens at {self.url} is no retrieval service, or a damaged one: it gave {what}")


class _Again(RetrievalError):
    """What may be better the next time."""


def _reason(data: bytes) -> Any:
    """What a refusal says; the beginning of it where it is none of the service's."""
    try:
        return json.loads(data)["error"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return ascii(data[:60].decode(errors="replace"))
