"""The retrieval service as others meet it: the real command, at a loopback port, asked by plain HTTP."""

import base64
import http.client
import json
import re
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch

from openrlhf.cli.serve_retrieval import main
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval import search
from openrlhf.retrieval.search import exact_search
from openrlhf.retrieval.service import Searcher
from openrlhf.retrieval.store import Document, Store
from tests.retrieval.served import in_thread, make_store, serving
from tests.trainer.facts import DOCS, FACTS
from tests.trainer.launch import BASE_MODEL
from tests.trainer.test_numbers import CHECKPOINT

L, D = 2, 4
E = L * D
KEY = "s3cret-0815"


def vectors(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, L, D, generator=torch.Generator().manual_seed(seed)).bfloat16()


def fill(store: Store, numbers: range) -> None:
    """Documents whose ids and vectors are functions of their numbers."""
    keys = [f"key {i}".encode() for i in numbers]
    documents = [Document(f"document {i}", f"text {i}") for i in numbers]
    store.add(documents, keys, {key: vectors(1, seed=i)[0] for i, key in zip(numbers, keys, strict=True)})


def new_store(path: Path, n: int) -> Path:
    with Store.create(path, {"n_memory": L, "width": D, "rows_per_shard": 8}) as store:
        fill(store, range(n))
    return path


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return new_store(tmp_path_factory.mktemp("service") / "store", 20)


@pytest.fixture(scope="module")
def service(store):
    with serving(store, "--max_queries", 4, "--max_k", 50) as running:
        yield running


def ask(url: str, method: str = "POST", path: str = "/queries", body=None, **headers):
    """(status, answer) of one request; `body` is JSON unless it is bytes or an iterator."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    if isinstance(body, (dict, list)):
        body = json.dumps(body).encode()
    connection.request(method, path, body, given)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    is_json = response.headers.get_content_type() == "application/json"
    return response.status, json.loads(data) if is_json else data.decode()


def queries(n: int, seed: int = 99) -> torch.Tensor:
    return torch.randn(n, E, generator=torch.Generator().manual_seed(seed))


def expected(store: Path, query_BE: torch.Tensor, k: int) -> tuple[list, list, torch.Tensor]:
    """Ids, scores and vectors `[B, K, E]` of the exact search."""
    with Store.open(store) as opened:
        scores_BK, rows_BK = exact_search(opened, query_BE, k)
        ids = [[found[0].id for found in opened.documents_at(rows_K)] for rows_K in rows_BK]
        docs_BKE = torch.stack([opened.vectors(rows_K).flatten(1) for rows_K in rows_BK])
    return ids, scores_BK.tolist(), docs_BKE


def test_answers_are_those_of_the_exact_search(service, store):
    query_BE = queries(3)
    status, found = ask(service.url, body={"queries": query_BE.tolist(), "k": 5})
    ids, scores, docs_BKE = expected(store, query_BE, 5)
    assert status == 200 and found["ids"] == ids and found["scores"] == scores
    assert scores[0] == sorted(scores[0], reverse=True)
    assert torch.equal(torch.tensor(found["retrieved_embeddings"]).bfloat16(), docs_BKE)


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_base64_carries_the_same_numbers(service, store, asked, given):
    query_BE = queries(2).to(asked)
    rows = [base64.b64encode(row).decode() for row in query_BE.view(torch.uint8).numpy()]
    body = {"queries": rows, "k": 3, "encoding": "base64", "dtype": given}
    status, found = ask(service.url, body=body)
    ids, scores, docs_BKE = expected(store, query_BE, 3)
    assert status == 200 and found["ids"] == ids and found["scores"] == scores
    data = b"".join(base64.b64decode(text) for row in found["retrieved_embeddings"] for text in row)
    read = torch.frombuffer(bytearray(data), dtype=getattr(torch, given)).view(2, 3, E)
    assert torch.equal(read.bfloat16(), docs_BKE)
    little_endian = int.from_bytes(data[:2], "little") if given == "bfloat16" else None
    assert little_endian in (None, int(docs_BKE.flatten()[0].view(torch.int16)) % 2**16)


def test_more_documents_than_there_are_give_shorter_lists(service):
    _, found = ask(service.url, body={"queries": queries(2).tolist(), "k": 30})
    assert [len(ids) for ids in found["ids"]] == [20, 20] == [len(rows) for rows in found["retrieved_embeddings"]]
    assert [len(scores) for scores in found["scores"]] == [20, 20]


def test_an_empty_store_gives_empty_lists_until_something_is_added(tmp_path):
    path = new_store(tmp_path / "empty", 0)
    with in_thread(path) as url:
        status, found = ask(url, body={"queries": queries(2).tolist(), "k": 3})
        assert status == 200 and found["ids"] == found["scores"] == found["retrieved_embeddings"] == [[], []]
        with Store.open(path, write=True) as store:
            fill(store, range(2))
            _, found = ask(url, body={"queries": queries(1).tolist(), "k": 3})
            assert sorted(found["ids"][0]) == ["document 0", "document 1"]
            fill(store, range(2, 10))  # on into the next file
            store.delete(["document 0"])
            _, found = ask(url, body={"queries": queries(1).tolist(), "k": 20})
            assert sorted(found["ids"][0]) == [f"document {i}" for i in range(1, 10)]
            store.compact()
            _, again = ask(url, body={"queries": queries(1).tolist(), "k": 20})
            assert again["ids"] == found["ids"] and again["retrieved_embeddings"] == found["retrieved_embeddings"]
        assert ask(url, "GET", "/health")[1]["documents"] == 9


def test_documents_of_one_text_come_once(tmp_path):
    path = new_store(tmp_path / "twins", 2)
    with Store.open(path, write=True) as store:
        store.add([Document("twin", "text 0")], [b"key 0"], {})
    with in_thread(path) as url:
        _, found = ask(url, body={"queries": queries(1).tolist(), "k": 3})
        _, health = ask(url, "GET", "/health")
    assert sorted(found["ids"][0]) == ["document 0", "document 1"]
    assert (health["documents"], health["vectors"]) == (3, 2)


ROW = [0.5] * E
INFINITE = json.dumps({"queries": [ROW], "k": 1}).replace("0.5", "1e400", 1).encode()
NAN = json.dumps({"queries": [ROW], "k": 1}).replace("0.5", "NaN", 1).encode()
REFUSED = [
    (b"{", 400, "the body is not JSON: "),
    (b"", 400, "the body is not JSON: "),
    (b"\xff\xfe", 400, "the body is not JSON: "),
    (b"[" * 100_000, 400, "the body is not JSON: "),
    (b'{"texts": ["\\ud800"], "k": 1}', 400, "the body is not JSON: "),
    ([], 422, "the body: Input should be an object"),
    ({"k": 1}, 422, "give either queries (vectors) or texts"),
    ({"queries": [ROW], "texts": ["a"], "k": 1}, 422, "give either queries (vectors) or texts"),
    ({"queries": [ROW]}, 422, "k: Field required"),
    ({"queries": [ROW], "k": 0}, 422, "k: Input should be greater than or equal to 1"),
    ({"queries": [ROW], "k": 1.5}, 422, "k: Input should be a valid integer"),
    ({"queries": [ROW], "k": True}, 422, "k: Input should be a valid integer"),
    ({"queries": [ROW], "k": 51}, 422, "k is 51, and this service gives at most 50 documents a query"),
    ({"queries": [ROW], "k": 10**30}, 422, "and this service gives at most 50 documents a query"),
    ({"queries": [ROW] * 5, "k": 1}, 422, "5 queries at once are too many: this service takes 4"),
    ({"queries": [], "k": 1}, 422, "there are no queries: give at least one"),
    ({"texts": [], "k": 1}, 422, "there are no queries: give at least one"),
    ({"queries": [[]], "k": 1}, 422, "a query has 0 numbers, those of this store have 8"),
    ({"queries": [ROW, ROW[:3]], "k": 1}, 422, "a query has 3 numbers, those of this store have 8"),
    ({"queries": ROW, "k": 1}, 422, "queries.0: Input should be a valid "),
    ({"queries": [["a"]], "k": 1}, 422, "queries.0.0: Input should be a valid number"),
    ({"queries": ["AAAA"], "k": 1}, 422, "with the encoding json queries are lists of numbers"),
    ({"queries": [ROW], "k": 1, "encoding": "base64"}, 422, "with the encoding base64 queries are base64 strings"),
    ({"queries": ["%"], "k": 1, "encoding": "base64"}, 422, "a query is not base64"),
    ({"queries": ["AAAA"], "k": 1, "encoding": "base64"}, 422, "a query has 3 bytes; 8 numbers are 32 as float32"),
    ({"queries": ["//8" * 5 + "/"], "k": 1, "encoding": "base64"}, 422, "a query has 12 bytes"),
    ({"queries": [ROW], "k": 1, "encoding": "hex"}, 422, "encoding: Input should be 'json' or 'base64'"),
    ({"queries": [ROW], "k": 1, "dtype": "int8"}, 422, "dtype: Input should be 'float32' or 'bfloat16'"),
    ({"queries": [ROW], "k": 1, "top": 3}, 422, "top: Extra inputs are not permitted"),
    ({"texts": ["Who?"], "k": 1}, 422, "this service has no model to encode texts with"),
    (NAN, 422, "queries.0.0: Input should be a finite number"),
    (INFINITE, 422, "queries.0.0: Input should be a finite number"),
    ({"queries": [[1e39, *ROW[1:]]], "k": 1}, 422, "a query holds NaN or infinity"),
]


@pytest.mark.parametrize(("body", "status", "reason"), REFUSED, ids=[reason for _, _, reason in REFUSED])
def test_what_cannot_be_answered_is_refused_in_one_sentence(service, body, status, reason):
    found = ask(service.url, body=body)
    assert found[0] == status and set(found[1]) == {"error"}
    assert reason in found[1]["error"] and "\n" not in found[1]["error"]


def test_base64_of_what_is_no_number_is_refused(service):
    row = base64.b64encode(torch.tensor([float("nan")] * E).numpy()).decode()
    status, found = ask(service.url, body={"queries": [row], "k": 1, "encoding": "base64"})
    assert status == 422 and "a query holds NaN or infinity" in found["error"]


def test_bodies_that_are_too_long_are_refused_before_they_are_read(service):
    """By their Content-Length, and where none is given as soon as they are too long."""
    status, found = ask(service.url, body=b" ", Content_Length=str(10**12))
    assert status == 413 and found == {"error": "the body has more than 1,049,344 bytes"}
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
        raw.sendall(b"POST /queries HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nfffffff\r\n")
        raw.sendall(b" " * 1_049_345)  # of a chunk of 256 MiB
        assert raw.recv(2**16).startswith(b"HTTP/1.1 413")
    whole = json.dumps({"queries": [ROW], "k": 1}).encode()
    assert ask(service.url, body=iter([whole[:20], whole[20:]]))[0] == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/queries", 405), ("GET", "/nothing", 404)])
def test_other_paths_and_methods_are_refused_as_json(service, method, path, status):
    assert ask(service.url, method, path)[0] == status
    assert set(ask(service.url, method, path)[1]) == {"error"}


def test_a_body_that_ends_early_harms_nobody(service):
    parts = urlsplit(service.url)
    with socket.create_connection((parts.hostname, parts.port)) as raw:
        raw.sendall(b'POST /queries HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{"queries": ')
    assert ask(service.url, body={"queries": [ROW], "k": 1})[0] == 200
    assert "Traceback" not in service.output


def test_health_says_what_is_served(service, store):
    status, found = ask(service.url, "GET", "/health")
    assert status == 200
    fingerprint = found.pop("fingerprint")
    assert re.fullmatch("[0-9a-f]{16}", fingerprint) and f"fingerprint {fingerprint}" in service.output
    assert found == {
        "status": "ok", "documents": 20, "vectors": 20, "memory_vectors": L, "width": D, "texts": False, "key": False,
        "made_by": {"n_memory": L, "width": D}, "limits": {"queries": 4, "k": 50, "answer_bytes": 2**30},
    }  # fmt: skip
    assert ask(service.url, body={"queries": [ROW], "k": 1})[1]["fingerprint"] == fingerprint


def figures(url: str) -> dict[str, float]:
    """The samples of /metrics."""
    status, text = ask(url, "GET", "/metrics")
    assert status == 200
    samples = [line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in samples}


def test_metrics_count_requests_errors_queries_and_seconds(store):
    with in_thread(store) as url:
        ask(url, body={"queries": queries(3).tolist(), "k": 1})
        ask(url, body={"queries": queries(2).tolist(), "k": 1})
        ask(url, body=b"{")
        found = figures(url)
        _, text = ask(url, "GET", "/metrics")
    assert found['clara_requests_total{status="200"}'] == 2 and found['clara_requests_total{status="400"}'] == 1
    assert found["clara_errors_total"] == 1 and found["clara_queries_total"] == 5
    assert found["clara_request_seconds_count"] == 3 == found['clara_request_seconds_bucket{le="+Inf"}']
    assert found["clara_request_seconds_sum"] > 0 and found["clara_documents"] == 20
    within = [value for name, value in found.items() if "bucket" in name]
    assert within == sorted(within)
    for name in re.findall(r"^(clara_\w+?)(?:_bucket|_sum|_count)?[{ ]", text, re.MULTILINE):
        assert f"# TYPE {name} " in text


def test_where_there_is_a_key_it_is_needed_and_never_told(store):
    with serving(store, env={"CLARA_API_KEY": KEY}) as locked:
        body = {"queries": [ROW], "k": 1}
        for header in ({}, {"Authorization": "Bearer no"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
            status, found = ask(locked.url, body=body, **header)
            assert status == 401 and found == {"error": "this service needs its key: send Authorization: Bearer KEY"}
        good = {"Authorization": f"Bearer {KEY}"}
        assert ask(locked.url, body=body, **good)[0] == 200
        assert ask(locked.url, "GET", "/metrics")[0] == 401 and ask(locked.url, "GET", "/metrics", **good)[0] == 200
        assert (
            ask(locked.url, "GET", "/health")[1]["key"] is True and ask(locked.url, "GET", "/health", **good)[0] == 200
        )
        assert ask(locked.url, "GET", "/health", Authorization="Bearer no")[0] == 401
        assert "key needed" in locked.output and KEY not in locked.output


def test_a_service_that_all_can_reach_without_a_key_warns(service, store):
    with serving(store, "--host", "0.0.0.0") as open_to_all:
        assert "anybody who reaches 0.0.0.0 can read this store: set CLARA_API_KEY" in open_to_all.output
    assert "anybody" not in service.output and service.url.startswith("http://127.0.0.1:")


@pytest.fixture
def slow(store, monkeypatch):
    """A service whose searches take as long as an event is not set; (url, event)."""
    free, whole = threading.Event(), search.exact_search

    def wait(*what):
        assert free.wait(60)
        return whole(*what)

    monkeypatch.setattr("openrlhf.retrieval.service.exact_search", wait)
    with in_thread(store) as url:
        yield url, free
        free.set()


def test_health_and_refusals_come_while_searches_run(slow):
    url, free = slow
    with ThreadPoolExecutor(60) as pool:
        searches = [pool.submit(ask, url, body={"queries": [ROW], "k": 1}) for _ in range(50)]
        assert ask(url, "GET", "/health")[0] == 200
        assert ask(url, "GET", "/metrics")[0] == 200
        assert not any(search.done() for search in searches)
        free.set()
        assert [search.result()[0] for search in searches] == [200] * 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_requests_end(store, number):
    """A body that is half sent when the signal comes is still answered; then the service ends with 0."""
    body = json.dumps({"queries": [ROW], "k": 1}).encode()
    with serving(store) as running:
        parts = urlsplit(running.url)
        with socket.create_connection((parts.hostname, parts.port), timeout=60) as raw:
            raw.sendall(b"POST /queries HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body[:10])
            time.sleep(0.3)
            running.process.send_signal(number)
            time.sleep(0.5)
            assert running.process.poll() is None
            raw.sendall(body[10:])
            assert raw.recv(2**16).startswith(b"HTTP/1.1 200")
        assert running.process.wait(60) == 0
        assert "Traceback" not in running.output


def test_damage_in_the_store_is_told_in_words(tmp_path):
    path = new_store(tmp_path / "damaged", 3)
    with in_thread(path) as url:
        with open(path / "vectors" / "00000.bin", "r+b") as shard:
            shard.write(b"\x00\x3f" * E)
        status, found = ask(url, body={"queries": [ROW], "k": 3})
        assert status == 503 and "row 0 is damaged" in found["error"] and "--repair" in found["error"]
        assert ask(url, "GET", "/health")[0] == 200


def test_documents_deleted_while_they_are_searched_are_searched_again(tmp_path, monkeypatch):
    path, whole = new_store(tmp_path / "changing", 6), search.exact_search
    with Store.open(path, write=True) as writer:

        def change(*what):
            found = whole(*what)
            if len(writer) == 6:
                writer.delete(["document 2"])
            return found

        monkeypatch.setattr("openrlhf.retrieval.service.exact_search", change)
        with in_thread(path) as url:
            status, found = ask(url, body={"queries": [ROW], "k": 6})
        assert status == 200 and sorted(found["ids"][0]) == [f"document {i}" for i in (0, 1, 3, 4, 5)]
        monkeypatch.setattr(
            "openrlhf.retrieval.service.exact_search", lambda *_: (torch.zeros(1, 1), torch.tensor([[2]]))
        )
        with in_thread(path) as url:
            status, found = ask(url, body={"queries": [ROW], "k": 1})
        assert status == 503 and found == {"error": "the store changes while it is searched: ask again"}


def test_answers_that_would_not_fit_into_memory_are_refused(store, monkeypatch):
    from fastapi import HTTPException

    monkeypatch.setattr("openrlhf.retrieval.service.MAX_ANSWER_BYTES", 24 * E * 6)
    with Store.open(store) as opened:
        searcher = Searcher(opened)
        assert searcher.answer(json.dumps({"queries": [ROW] * 2, "k": 3}).encode())[1] == 2
        with pytest.raises(HTTPException) as refused:
            searcher.answer(json.dumps({"queries": [ROW] * 2, "k": 4}).encode())
        assert refused.value.status_code == 422 and "ask for less at once" in refused.value.detail
        row = base64.b64encode(torch.tensor(ROW).numpy()).decode()
        small = {"queries": [row] * 2, "k": 20, "encoding": "base64", "dtype": "bfloat16"}
        assert searcher.answer(json.dumps(small).encode())[1] == 2


# --- with a model


@pytest.fixture(scope="module")
def facts(tmp_path_factory) -> Path:
    return make_store(tmp_path_factory.mktemp("texts") / "store", DOCS[:6])


def test_texts_find_what_the_models_own_queries_find(facts):
    questions = [fact[1] for fact in FACTS[:3]]
    model = CLaRa.from_pretrained(CHECKPOINT, decoder_model_name=str(BASE_MODEL))
    query_BE = model.encode_queries(questions)
    ids, scores, docs_BKE = expected(facts, query_BE, 4)
    with serving(facts, "--model", CHECKPOINT, "--model_path", BASE_MODEL) as running:
        status, found = ask(running.url, body={"texts": questions, "k": 4})
        assert status == 200 and found["ids"] == ids
        assert found["scores"] == [pytest.approx(row, abs=1e-5) for row in scores]
        assert torch.equal(torch.tensor(found["retrieved_embeddings"]).bfloat16(), docs_BKE)
        assert ask(running.url, body={"queries": query_BE.tolist(), "k": 4})[1]["ids"] == ids
        assert ask(running.url, "GET", "/health")[1]["texts"] is True
        status, said = ask(running.url, body={"texts": ["a" * 20_001], "k": 1})
        assert status == 422 and said["error"] == "texts.0: String should have at most 20000 characters"
        with ThreadPoolExecutor(8) as pool:
            many = list(pool.map(lambda i: ask(running.url, body={"texts": [questions[i % 3]], "k": 4}), range(12)))
        assert [answer["ids"] for _, answer in many] == [[ids[i % 3]] for i in range(12)]


@pytest.fixture
def ended(capsys):
    """What the command says, and its exit code, where it ends by itself; in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}

    def serves(*_) -> None:
        raise AssertionError("the command serves what it should refuse")

    signal.signal(signal.SIGALRM, serves)
    signal.alarm(100)

    def run(*flags: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(list(map(str, flags)))
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    yield run
    signal.alarm(0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_what_cannot_be_served_is_refused_at_the_start(ended, store, facts, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    other = Path(shutil.copytree(facts, tmp_path / "other"))
    header = json.loads((other / "store.json").read_text())
    (other / "store.json").write_text(json.dumps({**header, "compressor": "0" * 32}))
    stage1 = CHECKPOINT.parent / "c8_stage1"
    base = ("--model_path", BASE_MODEL)
    cases = [
        (("--store", tmp_path / "none"), 2, "none is not a store: it has no store.json"),
        (("--store", store, "--port", port), 2, f"--port {port} ([Errno 98] Address already in use): give another"),
        (("--store", store, "--host", "192.0.2.1"), 2, "cannot listen at --host 192.0.2.1"),
        (("--store", store, "--max_k", 0), 2, "--max_k must be at least 1"),
        (("--store", store, "--port", 70000), 2, "--port must be between 0 and 65535"),
        (("--store", store, "--device", "gpu"), 2, "--device gpu cannot be used"),
        (("--store", store, *base), 2, "--model_path has no use without --model"),
        (("--store", facts, "--model", tmp_path / "none"), 2, "no checkpoint at"),
        (("--store", store, "--model", CHECKPOINT, *base), 2, "was not made by this model: doc_max_length is None"),
        (("--store", other, "--model", CHECKPOINT, *base, "--port", 0), 1, "was not made by this model: compressor is"),
        (("--store", facts, "--model", stage1, *base, "--port", 0), 1, "has no query reasoner, so it cannot encode"),
    ]
    with taken:
        for flags, expected_code, reason in cases:
            code, out, err = ended(*flags)
            assert code == expected_code and reason in err, (flags, err)
            assert "serving" not in out and err.count("serve_retrieval: ") == 1
