"""The server: OpenAI's API over a store of compressed documents, and a page to use it in a browser.

    POST   /v1/chat/completions   an answer from the documents, whole or as it is written, with its citations
    GET    /v1/models             the one model
    POST   /v1/embeddings         vectors of the query reasoner, or of the compressor with `"input_type": "document"`
    POST   /rerank, /v1/rerank    documents by their closeness to a query
    GET    /v1/documents          what is in the store, page by page
    POST   /v1/documents          adds JSON documents or .txt, .md and .jsonl files; whole or not at all
    DELETE /v1/documents/{id}     removes a document with its passages
    GET    /health, /metrics      "ready" or "stopping"; figures for Prometheus
    GET    /, /page/*             the page

Contract: whatever comes in is answered or refused in OpenAI's error format; nothing that runs long runs in the event
loop; a client that goes takes its answer's row with it. Knows nothing about flags, or about where it is bound.
"""

import base64
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import anyio
from anyio import to_thread
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.formparsers import MultiPartException
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from openrlhf.datasets.records import RecordError
from openrlhf.retrieval.corpus import parse_record
from openrlhf.retrieval.store import Document
from openrlhf.serving import schemas
from openrlhf.serving.asking import Asker, Question, Writing
from openrlhf.serving.documents import read_file
from openrlhf.serving.errors import answer_errors
from openrlhf.serving.guard import Guard
from openrlhf.serving.schemas import BadRequest
from openrlhf.serving.streams import EventStream, while_connected
from openrlhf.utils.http import COUNTER, GAUGE, SECONDS, Metrics, read_body, said

PAGE_FOLDER = Path(__file__).parent / "page"
# Work other than answering that goes on side by side; more only queues up before the model.
THREADS = 8
UPLOADS = 2
MAX_FILES = 1000
# Of a body that is no upload.
MAX_ASKED_BYTES = 8 * 2**20
MAX_EMBEDDING_BYTES = 2**28
NUMBER_BYTES = {"float": 24, "base64": 6}
METRICS = {
    "clara_requests_total": (COUNTER, "Requests by path and status."),
    "clara_request_seconds": (SECONDS, "Seconds from the choice of documents to the end of an answer."),
    "clara_prompt_tokens_total": (COUNTER, "Tokens read for answers."),
    "clara_completion_tokens_total": (COUNTER, "Tokens written."),
    "clara_refusals_total": (COUNTER, "Questions that no document answers."),
    "clara_cancelled_total": (COUNTER, "Answers whose client went before their end."),
    "clara_asked": (GAUGE, "Chat requests that are being answered or wait for it."),
    "clara_running": (GAUGE, "Answers that the local engine is writing."),
    "clara_documents": (GAUGE, "Documents in the store."),
}


@dataclass(frozen=True)
class Limits:
    """What the server takes.

    `asked`: chat requests at once, those that wait included; further ones get 429. `seconds`: for one request.
    """

    asked: int = 288
    seconds: float = 300.0
    body_bytes: int = 32 * 2**20


class Server:
    """What the endpoints share."""

    def __init__(self, asker: Asker, limits: Limits, name: str):
        self.asker, self.limits, self.name = asker, limits, name
        self.metrics = Metrics(METRICS)
        self.created = int(time.time())
        self.asked = 0
        self.stopping = False
        self.threads: Any = None
        self.waiting: Any = None
        self.uploads: Any = None
        self.deletions: Any = None

    async def in_thread(self, work: Callable, *arguments: Any) -> Any:
        """Runs what takes long elsewhere; a request that is cancelled does not wait for it."""
        return await to_thread.run_sync(work, *arguments, limiter=self.threads, abandon_on_cancel=True)

    @contextmanager
    def place(self) -> Iterator[None]:
        """Counts a chat request; refuses it where there are too many."""
        if self.stopping:
            raise HTTPException(503, "the server is stopping")
        if self.asked >= self.limits.asked:
            raise HTTPException(429, f"{self.asked} questions are being answered or wait: ask again")
        self.asked += 1
        try:
            yield
        finally:
            self.asked -= 1

    async def pieces(self, writing: Writing) -> AsyncIterator[str]:
        """An answer's text; when this is closed or cancelled, so is the answer."""
        began = time.monotonic()
        try:
            next_piece = partial(next, writing, None)
            while (
                piece := await to_thread.run_sync(next_piece, limiter=self.waiting, abandon_on_cancel=True)
            ) is not None:
                yield piece
        finally:
            if not writing.finish_reason:
                self.metrics.add("clara_cancelled_total")
            writing.close()
            self.metrics.observe("clara_request_seconds", time.monotonic() - began)
            self.metrics.add("clara_prompt_tokens_total", writing.prompt_tokens)
            self.metrics.add("clara_completion_tokens_total", writing.completion_tokens)

    async def ask(self, chat: schemas.Chat) -> Writing:
        """The beginning of an answer."""
        text, history, instructions = chat.turns()
        question = Question(
            text, history, instructions, chat.max_completion_tokens or chat.max_tokens, chat.temperature, chat.seed,
            chat.stops,
        )  # fmt: skip
        given: list[Writing] = []
        gone = threading.Event()

        def begin() -> None:
            if not gone.is_set():
                given.append(self.asker.ask(question))
            if gone.is_set() and given:
                given[0].close()

        try:
            await self.in_thread(begin)
        except ValueError as error:
            raise BadRequest(str(error), "messages", code="context_length_exceeded") from None
        except BaseException:  # the client went while its documents were looked for
            gone.set()
            if given:
                given[0].close()
            raise
        (writing,) = given
        if not writing.prompt_tokens:
            self.metrics.add("clara_refusals_total")
        return writing

    def check_model(self, model: str | None) -> None:
        """Raises BadRequest unless the model is the one that is served."""
        if model not in (None, self.name):
            raise BadRequest(
                f"there is no model {model[:100]!r} here, only {self.name!r}", "model", 404, "model_not_found"
            )


def create_app(
    asker: Asker, api_key: str | None = None, limits: Limits | None = None, name: str = "clara", any_host: bool = False
) -> FastAPI:
    """The server, for any ASGI server.

    Args:
        api_key: what `Authorization: Bearer …` must carry, but for the page and /health; None takes requests without.
        limits: see `Limits`.
        name: of the model in the API.
        any_host: see `Guard`.
    """
    server = Server(asker, limits or Limits(), name)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.threads = anyio.CapacityLimiter(THREADS)
        server.waiting = anyio.CapacityLimiter(server.limits.asked + 1)
        server.uploads = anyio.CapacityLimiter(UPLOADS)
        server.deletions = anyio.CapacityLimiter(1)
        yield
        server.stopping = True

    app = FastAPI(title="CLaRa", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    app.state.server = server
    answer_errors(app)
    _answer(app, server)
    _encode(app, server)
    _keep_documents(app, server)
    _tell(app, server, api_key is not None)
    app.add_middleware(Guard, metrics=server.metrics, api_key=api_key, any_host=any_host)
    return app


def _answer(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        chat = await read(schemas.Chat, request, server)
        server.check_model(chat.model)
        if chat.stream:
            return EventStream(partial(_stream, server, chat), server.limits.seconds)
        with anyio.fail_after(server.limits.seconds):
            return said(await while_connected(request.receive, partial(_whole, server, chat)) or {})


async def read(kind: type[schemas.Kind], request: Request, server: Server) -> schemas.Kind:
    """The body of a request as an object of this kind."""
    with anyio.fail_after(server.limits.seconds):
        body = await read_body(request, min(server.limits.body_bytes, MAX_ASKED_BYTES))
    return await to_thread.run_sync(schemas.parse, kind, body)


async def _whole(server: Server, chat: schemas.Chat) -> dict:
    with server.place():
        writing = await server.ask(chat)
        async with aclosing(server.pieces(writing)) as pieces:  # type: ignore[type-var]
            text = "".join([piece async for piece in pieces])
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": writing.finish_reason, "logprobs": None}
    return {
        **_head(server, "chat.completion"),
        "choices": [choice],
        "usage": _usage(writing.prompt_tokens, writing.completion_tokens),
        "citations": [_cited(citation) for citation in writing.citations],
    }


async def _stream(server: Server, chat: schemas.Chat, send: Callable[[Any], Awaitable[None]]) -> None:
    head, with_usage = (
        _head(server, "chat.completion.chunk"),
        bool(chat.stream_options and chat.stream_options.include_usage),
    )
    usage: dict = {"usage": None} if with_usage else {}

    def chunk(delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**head, "choices": [choice], **usage}

    with server.place():
        writing = await server.ask(chat)
        async with aclosing(server.pieces(writing)) as pieces:  # type: ignore[type-var]
            cited = [_cited(citation) for citation in writing.citations]
            await send({**chunk({"role": "assistant", "content": ""}), "citations": cited})
            async for piece in pieces:
                await send(chunk({"content": piece}))
    await send(chunk({}, writing.finish_reason))
    if with_usage:
        await send({**head, "choices": [], "usage": _usage(writing.prompt_tokens, writing.completion_tokens)})
    await send("[DONE]")


def _head(server: Server, kind: str) -> dict:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": server.name}


def _usage(prompt: int, written: int = 0) -> dict:
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _cited(citation: Any) -> dict:
    return {name: getattr(citation, name) for name in ("id", "title", "page", "passage", "score")}


def _encode(app: FastAPI, server: Server) -> None:
    asker = server.asker

    async def run(request: Request, work: Callable, *arguments: Any) -> Any:
        with anyio.fail_after(server.limits.seconds):
            try:
                return await while_connected(request.receive, partial(server.in_thread, work, *arguments))
            except ValueError as error:
                raise BadRequest(str(error)) from None

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        asked = await read(schemas.Embed, request, server)
        server.check_model(asked.model)
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        numbers = server.asker.library.store.n_memory * server.asker.library.store.width
        if not all(text.strip() for text in texts):
            raise BadRequest("an input is empty: there is nothing to encode", "input")
        if asked.dimensions not in (None, numbers):
            raise BadRequest(f"vectors of this model have {numbers} numbers: leave dimensions out", "dimensions")
        if len(texts) * numbers * NUMBER_BYTES[asked.encoding_format] > MAX_EMBEDDING_BYTES:
            raise BadRequest(
                f"{len(texts)} vectors of {numbers} numbers are more than one answer holds: ask for fewer at once, or "
                "for encoding_format base64",
                "input",
            )
        body = await run(request, _embedded, server, texts, asked)
        return Response(body, media_type="application/json")

    async def rerank(request: Request) -> Response:
        asked = await read(schemas.Rerank, request, server)
        server.check_model(asked.model)
        if not asked.query.strip():
            raise BadRequest("the query is empty", "query")
        best = await run(request, asker.rerank, asked.query, asked.texts, asked.top_n) or []
        results = [
            {
                "index": i,
                "relevance_score": score,
                **({"document": {"text": asked.texts[i]}} if asked.return_documents else {}),
            }
            for i, score in best
        ]
        return said({"id": f"rerank-{uuid.uuid4().hex}", "model": server.name, "results": results})

    for path in ("/rerank", "/v1/rerank"):
        app.post(path)(rerank)


def _embedded(server: Server, texts: list[str], asked: schemas.Embed) -> bytes:
    """The whole answer to a request for vectors; floats are written in a thread, too."""
    vectors_NE = server.asker.embed(texts, asked.input_type == "document")
    if asked.encoding_format == "base64":
        shown: list = [base64.b64encode(row).decode() for row in vectors_NE.contiguous().numpy()]
    else:
        shown = vectors_NE.tolist()
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(shown)]
    used = _usage(sum(server.asker.count(text) for text in texts))
    del used["completion_tokens"]
    return json.dumps({"object": "list", "data": data, "model": server.name, "usage": used}).encode()


def _keep_documents(app: FastAPI, server: Server) -> None:
    library = server.asker.library

    @app.get("/v1/documents")
    async def listed(limit: str = "100", after: str = "-1") -> Response:
        if not limit.isdecimal() or not 1 <= int(limit) <= schemas.PAGE:
            raise BadRequest(f"limit must be a whole number from 1 to {schemas.PAGE}, got {limit[:20]!r}", "limit")
        if not (after == "-1" or after.isdecimal() and int(after) < 2**63):
            raise BadRequest(f"after must be what an earlier answer gave as next, got {after[:20]!r}", "after")
        found = await server.in_thread(library.listed, int(limit) + 1, int(after))
        page = found[: int(limit)]
        data = [{"id": d.id, "title": d.title, "page": d.page, "characters": len(d.text)} for _, d in page]
        total = await server.in_thread(len, library)
        return said(
            {
                "object": "list",
                "data": data,
                "total": total,
                "next": str(page[-1][0]) if len(found) > len(page) else None,
            }
        )

    @app.post("/v1/documents")
    async def add(request: Request) -> Response:
        async with server.uploads:
            with anyio.fail_after(server.limits.seconds):
                documents = await uploaded(request, server.limits.body_bytes)
            gone = threading.Event()

            def go_on() -> None:
                if gone.is_set():
                    raise Gone

            try:
                # Without a limit of time: a client that stays may upload as much as the body holds.
                done = await while_connected(request.receive, partial(server.in_thread, library.add, documents, go_on))
            except RecordError:
                raise
            except ValueError as error:
                raise BadRequest(str(error), "documents", 413) from None
            finally:
                gone.set()
        if done is None:
            return said({}, 499)
        counts, ids = done
        return said({"added": counts.new, "replaced": counts.replaced, "unchanged": counts.unchanged, "ids": ids})

    @app.delete("/v1/documents/{name:path}")
    async def delete(name: str) -> Response:
        # In a place of its own: it waits for the upload that is being compressed, and answers must not wait with it.
        deleted = await to_thread.run_sync(library.delete, name, limiter=server.deletions, abandon_on_cancel=True)
        if not deleted:
            raise BadRequest(f"there is no document {name[:200]!r}", "id", 404, "document_not_found")
        return said({"id": name, "object": "document.deleted", "deleted": deleted})


class Gone(Exception):
    """The client of an upload is not there any more."""


async def uploaded(request: Request, limit: int) -> list[Document]:
    """The documents of an upload, JSON or multipart/form-data with files.

    Raises:
        BadRequest, RecordError, HTTPException: what is wrong with it.
    """
    body = await read_body(request, limit)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        upload = await to_thread.run_sync(schemas.parse, schemas.Upload, body)
        return await to_thread.run_sync(_records, upload.documents)

    async def again() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, again).form(max_files=MAX_FILES) as form:
            files = [(one.filename, await one.read()) for _, one in form.multi_items() if not isinstance(one, str)]
    except (MultiPartException, AnyHTTPException) as error:
        raise BadRequest(f"the form cannot be read: {getattr(error, 'detail', None) or error}") from None
    if not files:
        raise BadRequest("the form holds no files")
    return await to_thread.run_sync(lambda: [d for name, content in files for d in read_file(name or "", content)])


def _records(given: list[dict]) -> list[Document]:
    found = []
    for number, record in enumerate(given):
        try:
            found.append(parse_record(record))
        except RecordError as error:
            raise RecordError(f"document {number}: {error}") from None
    return found


def _tell(app: FastAPI, server: Server, locked: bool) -> None:
    library, engine = server.asker.library, server.asker.engine

    @app.get("/v1/models")
    def models() -> Response:
        model = {"id": server.name, "object": "model", "created": server.created, "owned_by": "clara"}
        return said({"object": "list", "data": [model]})

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> Response:
        server.check_model(name)
        return said({"id": server.name, "object": "model", "created": server.created, "owned_by": "clara"})

    @app.get("/health")
    def health() -> Response:
        status = "stopping" if server.stopping else "ready"
        return said({"status": status, "documents": len(library), "key": locked}, 503 if server.stopping else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        gauges = {"asked": server.asked, "running": getattr(engine, "running", 0), "documents": len(library)}
        text = server.metrics.text(**{f"clara_{name}": value for name, value in gauges.items()})
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/")
    def page() -> Response:
        return FileResponse(PAGE_FOLDER / "index.html", headers={"Cache-Control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE_FOLDER))
