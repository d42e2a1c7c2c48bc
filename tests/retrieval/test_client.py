"""The client against services that fail in every way it has words for."""

import base64
import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from openrlhf.retrieval.client import RetrievalClient, RetrievalError, wrong_url

B, N, E = 2, 3, 8
HEALTH = {
    "status": "ok", "documents": 9, "vectors": 9, "memory_vectors": 2, "width": 4, "fingerprint": "abc", "key": False,
    "made_by": {}, "limits": {"queries": 4, "k": 5, "answer_bytes": 2**30},
}  # fmt: skip


@contextmanager
def answering(answer: Callable):
    """A server; `answer(path, body, headers)` gives (status, bytes). Yields its URL and the requests it got."""
    seen: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append((self.path, body, dict(self.headers)))
            status, data = answer(self.path, body, len(seen))
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)
            except OSError:  # the client did not wait
                pass

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(60)


def docs(n: int = N, numbers: int = E, value: float | None = None) -> torch.Tensor:
    found = torch.randn(B, n, numbers, generator=torch.Generator().manual_seed(1)).bfloat16()
    return found if value is None else found.fill_(value)


def reply(docs_BNE: torch.Tensor, **more) -> bytes:
    """An answer of the service."""
    texts = [[base64.b64encode(row).decode() for row in rows.view(torch.uint8).numpy()] for rows in docs_BNE]
    return json.dumps({"retrieved_embeddings": texts, "fingerprint": "abc", **more}).encode()


QUERIES = torch.randn(B, E, generator=torch.Generator().manual_seed(2))


def client(url: str, **options) -> RetrievalClient:
    return RetrievalClient(url, **{"timeout": 30, "pauses": (0.01, 0.01), **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_queries_go_out_and_vectors_come_back_unchanged(dtype):
    with answering(lambda *_: (200, reply(docs()))) as (url, seen):
        found = client(url, api_key="k")(QUERIES.to(dtype).requires_grad_(), N)
    assert torch.equal(found, docs()) and found.dtype == torch.bfloat16
    ((path, body, headers),) = seen
    asked = json.loads(body)
    assert (path, asked["k"], asked["encoding"], asked["dtype"]) == ("/queries", N, "base64", "bfloat16")
    sent = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    rows = [torch.frombuffer(bytearray(base64.b64decode(row)), dtype=sent) for row in asked["queries"]]
    assert torch.equal(torch.stack(rows), QUERIES.to(dtype).to(sent))
    assert headers["Authorization"] == "Bearer k"


def test_no_key_is_sent_where_there_is_none():
    with answering(lambda *_: (200, reply(docs()))) as (url, seen):
        client(url)(QUERIES, N)
    assert "Authorization" not in seen[0][2]


@pytest.mark.parametrize("status", [500, 502, 503])
def test_what_may_pass_is_tried_again(status, caplog):
    with answering(lambda path, body, n: (status, b"<html>") if n < 3 else (200, reply(docs()))) as (url, seen):
        found = client(url)(QUERIES, N)
    assert torch.equal(found, docs()) and len(seen) == 3
    assert len({body for _, body, _ in seen}) == 1
    assert sum("trying again in 0.01 s" in line.getMessage() for line in caplog.records) == 2


def failed(answer: Callable, **options) -> tuple[str, int]:
    """What the client says, and how often it asked."""
    with answering(answer) as (url, seen):
        with pytest.raises(RetrievalError) as caught:
            client(url, **options)(QUERIES, N)
        return str(caught.value).replace(url, "URL"), len(seen)


def test_pauses_grow_and_end():
    from openrlhf.retrieval import client as module

    assert list(module.PAUSES_SECONDS) == sorted(module.PAUSES_SECONDS) and 20 < sum(module.PAUSES_SECONDS) < 60
    assert RetrievalClient("http://a").pauses == module.PAUSES_SECONDS
    said, asked = failed(lambda *_: (503, b'{"error": "the store is damaged"}'))
    assert said == "the retrieval service at URL failed with status 503 (the store is damaged)" and asked == 3


def test_a_refusal_is_not_tried_again():
    said, asked = failed(lambda *_: (422, b'{"error": "k is 9"}'))
    assert said == "the retrieval service at URL refuses with status 422 (k is 9)" and asked == 1
    said, asked = failed(lambda *_: (401, b'{"error": "no"}'))
    assert said.endswith("Set CLARA_API_KEY to the key it was started with") and asked == 1


def test_redirections_are_not_followed():
    said, asked = failed(lambda *_: (302, b""))
    assert "refuses with status 302" in said and asked == 1


def test_a_service_that_is_gone_is_named():
    with answering(lambda *_: (200, b"")) as (url, _):
        pass
    with pytest.raises(RetrievalError, match=f"no retrieval service answers at {url} .*: start it there"):
        client(url)(QUERIES, N)
    with pytest.raises(RetrievalError, match="no retrieval service answers at http://no.such.host.invalid:1 "):
        client("http://no.such.host.invalid:1")(QUERIES, N)


def test_a_service_that_is_too_slow_is_named_and_tried_again():
    done = threading.Event()
    said, asked = failed(lambda *_: (200, b"late" if done.wait(1) else b"later"), timeout=0.2, pauses=(0.01,))
    assert said == "the retrieval service at URL gave no answer within 0.2 s" and asked == 2


ROW = base64.b64encode(bytes(2 * E)).decode()
RAGGED = [[ROW] * 2, [ROW] * 4]
STRANGE = [
    (b"", "b''"),
    (b"<html>" + b"x" * 100, "b'<html>xxx"),
    (b"[1]", "b'[1]'"),
    (b"[" * 100_000, "b'[[[["),
    (b"{}", "an answer that cannot be read (KeyError: 'retrieved_embeddings')"),
    (reply(docs(), retrieved_embeddings=None), "an answer that cannot be read (TypeError"),
    (reply(docs(), retrieved_embeddings=[[1] * N] * B), "an answer that cannot be read (TypeError"),
    (reply(docs(), retrieved_embeddings=[["%%%%"] * N] * B), "an answer that cannot be read (Error"),
    (reply(docs(n=N - 1)), f"[2, 2] documents of {B * 2 * E * 2} bytes to 2 queries for 3 of 16"),
    (reply(docs(numbers=E - 1)), f"[3, 3] documents of {B * N * (E - 1) * 2} bytes to 2 queries for 3 of 16"),
    (reply(docs()[:1]), "[3] documents of 48 bytes to 2 queries for 3 of 16"),
    (reply(docs(), retrieved_embeddings=RAGGED), "[2, 4] documents of 96 bytes to 2 queries for 3 of 16"),
    (reply(docs(value=float("nan"))), "vectors with NaN or infinity"),
    (reply(docs(value=float("inf"))), "vectors with NaN or infinity"),
    (b'{"a": "' + b"x" * 5 * 2**20 + b'"}', 'b\'{"a": "xxxx'),
]


@pytest.mark.parametrize(("answer", "what"), STRANGE, ids=range(len(STRANGE)))
def test_what_is_no_answer_of_the_service_is_named(answer, what):
    said, asked = failed(lambda *_: (200, answer))
    assert said.startswith(f"what listens at URL is no retrieval service, or a damaged one: it gave {what}")
    assert asked == 1 and len(said) < 300


def test_another_store_behind_the_same_url_is_noticed():
    def answer(path, body, n):
        return 200, json.dumps(HEALTH).encode() if path == "/health" else reply(docs(), fingerprint="abc" * (3 - n))

    with answering(answer) as (url, _):
        asking = client(url)
        assert asking.check(B, N)["vectors"] == 9
        assert torch.equal(asking(QUERIES, N), docs())
        with pytest.raises(RetrievalError, match="has another store than when the run began"):
            asking(QUERIES, N)


TOO_LITTLE = [
    ({"vectors": 2}, "holds 2 different documents, 3 are to be found for each question"),
    ({"limits": {**HEALTH["limits"], "queries": 1}}, "takes 1 queries at once (--max_queries), not 2"),
    ({"limits": {**HEALTH["limits"], "k": 2}}, "gives 2 documents a query (--max_k), not 3"),
    ({"limits": {**HEALTH["limits"], "answer_bytes": 100}}, "cannot answer 2 queries with 3 documents at once"),
    ({"key": True}, "needs its key: set CLARA_API_KEY"),
    ({"made_by": None}, "it gave /health without"),
    ({"width": None}, "it gave /health without"),
    ({"limits": {}}, "it gave /health without 'queries'"),
]


@pytest.mark.parametrize(("change", "reason"), TOO_LITTLE, ids=[reason for _, reason in TOO_LITTLE])
def test_a_service_that_cannot_give_as_much_is_named_at_once(change, reason):
    with answering(lambda *_: (200, json.dumps({**HEALTH, **change}).encode())) as (url, seen):
        with pytest.raises(RetrievalError) as caught:
            client(url).check(B, N)
        assert reason in str(caught.value) and url in str(caught.value) and len(seen) == 1


def test_a_service_that_is_not_there_at_the_start_is_not_waited_for():
    began = time.monotonic()
    with pytest.raises(RetrievalError, match="start it there"):
        client("http://127.0.0.1:9", pauses=(60.0,)).check(B, N)
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("url", ["", "127.0.0.1:5004", "ftp://a", "http://", "http://a:x", "http://a:99999", "http://a?b",
                                 "http://me:pw@a"])  # fmt: skip
def test_what_is_no_url_is_refused(url):
    assert "is not the URL of a service: give one such as http://127.0.0.1:5004" in (wrong_url(url) or "")
    with pytest.raises(ValueError, match="is not the URL of a service"):
        RetrievalClient(url)


@pytest.mark.parametrize("url", ["http://127.0.0.1:5004", "http://[::1]:80/", "https://host.example/clara"])
def test_urls_may_have_paths_and_other_protocols(url):
    assert wrong_url(url) is None
