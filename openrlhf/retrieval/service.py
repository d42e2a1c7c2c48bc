"""The retrieval service: exact search over a store of compressed documents, by HTTP.

    POST /queries   {"queries": [[number …] …], "k": n}   the n nearest documents of each query
                    {"texts": ["question" …], "k": n}     the same, where the service has a model
    GET  /health    status, what the store holds, and what the service takes; needs no key, but a wrong one is refused
    GET  /metrics   counts and seconds, in Prometheus' text format

An answer is {"retrieved_embeddings": [[[number …] …] …], "ids": [[id …] …], "scores": [[cosine …] …], "fingerprint": …}
with one list a query, best first, and shorter lists where the store holds fewer than k. Documents with one text have
one vector and come once, under the id that came first. With `"encoding": "base64"` every vector, asked or answered, is
a base64 string of little-endian numbers instead of a list: a query's are float32 or bfloat16, which its length tells,
an answer's are of `"dtype"`, float32 or bfloat16.

Contract: what cannot be answered is refused with a 4xx and {"error": one sentence}; what another process adds to the
store is found from its commit on. Searches run in threads of their own, so that /health answers meanwhile. Knows
nothing about flags, training or where it is bound.

Shape suffixes: B queries, K documents of a query, U distinct rows, L memory tokens, D hidden size, E = L·D.
"""

import base64
import binascii
import hashlib
import json
import logging
import threading
import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import anyio
import torch
from fastapi import FastAPI, HTTPException, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException as AnyHTTPException

from openrlhf.retrieval.search import check_queries, exact_search
from openrlhf.retrieval.store import Store
from openrlhf.utils.http import COUNTER, GAUGE, SECONDS, Metrics, check_key, read_body, said

if TYPE_CHECKING:  # a service without a model starts without loading transformers' models
    from openrlhf.models.modeling_clara import CLaRa

logger = logging.getLogger(__name__)

MAX_QUERIES, MAX_K = 256, 1000
# Of a question; the query reasoner reads no more than some hundred tokens of it anyway.
MAX_CHARACTERS = 20_000
# Bytes that a number takes in JSON, and what an answer may come to: a thousand documents of 65,536 numbers to 256
# queries would be hundreds of gigabytes.
NUMBER_BYTES = 24
MAX_ANSWER_BYTES = 2**30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# More searches at once only take the memory's bandwidth from each other.
SEARCHES = 2
# Rows that were found may be deleted or moved before they are read.
ATTEMPTS = 3
METRICS = {
    "clara_requests_total": (COUNTER, "Requests to /queries by status."),
    "clara_errors_total": (COUNTER, "Requests to /queries that were refused or failed."),
    "clara_queries_total": (COUNTER, "Queries that were answered."),
    "clara_request_seconds": (SECONDS, "Seconds from a request to its answer."),
    "clara_documents": (GAUGE, "Documents in the store."),
}
# Of a store's header, what says nothing about the model that made its vectors.
_NOT_OF_THE_MODEL = ("format", "rows_per_shard", "base_model", "dtype")


class Asked(BaseModel):
    """The body of POST /queries."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    queries: list[list[float]] | list[str] | None = None
    texts: list[Annotated[str, Field(max_length=MAX_CHARACTERS)]] | None = None
    k: int = Field(ge=1)
    encoding: Literal["json", "base64"] = "json"
    dtype: Literal["float32", "bfloat16"] = "float32"


class Searcher:
    """Answers bodies of POST /queries; may be called by several threads.

    Args:
        store: open for reading.
        model: encodes texts; its fingerprint must fit the store's header.
        max_queries: of one request.
        max_k: documents for a query.
        device: where blocks of the store are scored; the CPU by default.
    """

    def __init__(
        self,
        store: Store,
        model: "CLaRa | None" = None,
        max_queries: int = MAX_QUERIES,
        max_k: int = MAX_K,
        device: str | torch.device | None = None,
    ):
        self.store, self.model, self.max_queries, self.max_k, self.device = store, model, max_queries, max_k, device
        self.numbers = store.n_memory * store.width
        self.max_body = 2**20 + max_queries * self.numbers * NUMBER_BYTES
        self.made_by = {key: value for key, value in store.header.items() if key not in _NOT_OF_THE_MODEL}
        self.fingerprint = hashlib.sha256(json.dumps(self.made_by, sort_keys=True).encode()).hexdigest()[:16]
        self._encoding = threading.Lock()  # the model is routed through one adapter at a time

    def health(self) -> dict:
        """The answer of GET /health."""
        limits = {"queries": self.max_queries, "k": self.max_k, "answer_bytes": MAX_ANSWER_BYTES}
        return {
            "status": "ok",
            "documents": len(self.store),
            "vectors": self.store.n_rows(),
            "memory_vectors": self.store.n_memory,
            "width": self.store.width,
            "fingerprint": self.fingerprint,
            "made_by": self.made_by,
            "texts": self.model is not None,
            "limits": limits,
        }

    def answer(self, body: bytes) -> tuple[bytes, int]:
        """The answer to a body, and the number of its queries.

        Raises:
            HTTPException: it cannot be answered; the detail says why.
        """
        asked = parse(body)
        self._check(asked)
        query_BE = self._encoded(asked.texts) if asked.texts is not None else self._vectors(asked)
        try:
            check_queries(self.store, query_BE, asked.k)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        self._check_size(asked, len(query_BE))
        docs_UE, place_BK, ids, scores_BK = self._search(query_BE, asked.k)
        shown = shown_vectors(docs_UE, asked.encoding, asked.dtype)
        found = {
            "retrieved_embeddings": [[shown[u] for u in place_K] for place_K in place_BK.tolist()],
            "ids": [[ids[u] for u in place_K] for place_K in place_BK.tolist()],
            "scores": scores_BK.tolist(),
            "fingerprint": self.fingerprint,
        }
        return json.dumps(found, allow_nan=False).encode(), len(query_BE)

    def _check(self, asked: Asked) -> None:
        if (asked.queries is None) == (asked.texts is None):
            raise HTTPException(422, "give either queries (vectors) or texts")
        number = len(asked.queries if asked.queries is not None else asked.texts or ())
        if number == 0:
            raise HTTPException(422, "there are no queries: give at least one")
        if number > self.max_queries:
            raise HTTPException(422, f"{number} queries at once are too many: this service takes {self.max_queries}")
        if asked.k > self.max_k:
            raise HTTPException(422, f"k is {asked.k}, and this service gives at most {self.max_k} documents a query")

    def _check_size(self, asked: Asked, queries: int) -> None:
        size = NUMBER_BYTES if asked.encoding == "json" else 4 / 3 * DTYPES[asked.dtype].itemsize
        documents = int(MAX_ANSWER_BYTES / (queries * self.numbers * size))
        if asked.k > documents and self.store.n_rows() > documents:
            raise HTTPException(
                422,
                f"{queries} queries with {asked.k} documents of {self.numbers} numbers each are an answer of more than "
                f"{MAX_ANSWER_BYTES:,} bytes: ask for less at once, or for base64 and bfloat16",
            )

    def _encoded(self, texts: list[str]) -> torch.Tensor:
        if self.model is None:
            raise HTTPException(
                422, "this service has no model to encode texts with: give queries, or start it with one"
            )
        with self._encoding:
            return self.model.encode_queries(texts).cpu()

    def _vectors(self, asked: Asked) -> torch.Tensor:
        """Queries `[B, E]`."""
        rows, wanted = asked.queries or [], "base64" if asked.encoding == "base64" else "json"
        if isinstance(rows[0], str) != (wanted == "base64"):
            kind = "base64 strings" if wanted == "base64" else "lists of numbers"
            raise HTTPException(422, f"with the encoding {wanted} queries are {kind}")
        if wanted == "base64":
            return torch.stack([self._decoded(str(row)) for row in rows])
        lengths = {len(row) for row in rows}
        if lengths != {self.numbers}:
            wrong = next(length for length in lengths if length != self.numbers)
            raise HTTPException(422, f"a query has {wrong} numbers, those of this store have {self.numbers}")
        return torch.tensor(rows, dtype=torch.float32)

    def _decoded(self, row: str) -> torch.Tensor:
        try:
            data = base64.b64decode(row, validate=True)
        except (binascii.Error, ValueError):
            raise HTTPException(422, "a query is not base64") from None
        for dtype in DTYPES.values():
            if len(data) == self.numbers * dtype.itemsize:
                return torch.frombuffer(bytearray(data), dtype=dtype).float()
        raise HTTPException(
            422,
            f"a query has {len(data)} bytes; {self.numbers} numbers are {4 * self.numbers} as float32 and "
            f"{2 * self.numbers} as bfloat16",
        )

    def _search(self, query_BE: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, list[str], torch.Tensor]:
        """Distinct vectors `[U, E]`, which of them each query found `[B, K]`, their ids, and the scores `[B, K]`."""
        for attempt in range(ATTEMPTS):
            try:
                scores_BK, rows_BK = exact_search(self.store, query_BE, k, self.device)
                rows_U, place_BK = rows_BK.unique(return_inverse=True)
                documents = self.store.documents_at(rows_U)
                if all(documents):
                    ids = [found[0].id for found in documents]
                    return self.store.vectors(rows_U).flatten(1), place_BK, ids, scores_BK
            except ValueError as error:
                if attempt == ATTEMPTS - 1:
                    logger.error("a search failed: %s", error)
                    raise HTTPException(503, str(error)) from None
        raise HTTPException(503, "the store changes while it is searched: ask again")


def parse(body: bytes) -> Asked:
    """The body of a request.

    Raises:
        HTTPException: 400 where it is no JSON, 422 where it is not what is asked for.
    """
    try:
        return Asked.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise HTTPException(400, f"the body is not JSON: {first['ctx']['error']}") from None
        place = ".".join(str(part) for part in first["loc"] if not str(part).startswith("list["))
        raise HTTPException(422, f"{place or 'the body'}: {first['msg']}") from None


def shown_vectors(docs_UE: torch.Tensor, encoding: str, dtype: str) -> list:
    """Each vector as a list of numbers, or as base64 of little-endian numbers."""
    if encoding == "json":
        return docs_UE.float().tolist()
    rows = docs_UE.to(DTYPES[dtype]).contiguous().view(torch.uint8).numpy()
    return [base64.b64encode(row).decode() for row in rows]


def create_app(searcher: Searcher, api_key: str | None = None) -> FastAPI:
    """The service over a store, for any ASGI server.

    Args:
        api_key: what `Authorization: Bearer …` must carry, but for /health; None takes requests without.
    """
    app = FastAPI(title="CLaRa retrieval", docs_url=None, redoc_url=None)
    metrics = Metrics(METRICS)
    searches = anyio.CapacityLimiter(SEARCHES)
    body = {"requestBody": {"required": True, "content": {"application/json": {"schema": Asked.model_json_schema()}}}}

    @app.exception_handler(AnyHTTPException)
    def refuse(request: Request, error: Any) -> Response:
        return said({"error": str(error.detail)}, error.status_code, error.headers)

    @app.exception_handler(Exception)
    def fail(request: Request, error: Exception) -> Response:
        return said({"error": "the service failed; its log says why"}, 500)

    @app.get("/health")
    def health(request: Request) -> Response:
        if "authorization" in request.headers:
            check_key(request, api_key)
        return said({**searcher.health(), "key": api_key is not None})

    @app.get("/metrics")
    def show_metrics(request: Request) -> Response:
        check_key(request, api_key)
        return Response(metrics.text(clara_documents=len(searcher.store)), media_type="text/plain; version=0.0.4")

    @app.post("/queries", openapi_extra=body)
    async def queries(request: Request) -> Response:
        began, status, number = time.monotonic(), 500, 0
        try:
            check_key(request, api_key)
            asked = await read_body(request, searcher.max_body)
            found, number = await anyio.to_thread.run_sync(searcher.answer, asked, limiter=searches)
            status = 200
            return Response(found, media_type="application/json")
        except HTTPException as error:
            status = error.status_code
            raise
        finally:
            metrics.add("clara_requests_total", status=status)
            metrics.add("clara_errors_total", status >= 400)
            metrics.add("clara_queries_total", number)
            metrics.observe("clara_request_seconds", time.monotonic() - began)

    return app
