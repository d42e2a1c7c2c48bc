"""Documents over HTTP: what is uploaded is there whole, is replaced whole, is listed, and goes."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import compressed_text
from openrlhf.retrieval.corpus import Corpus
from openrlhf.retrieval.store import Document, Store
from openrlhf.serving import documents as documents_module
from openrlhf.serving.app import THREADS
from openrlhf.serving.documents import Library
from tests.serving.served import GIVEN, in_thread, until
from tests.tiny import DOCS, QUESTIONS

LONG = "\n\n".join(f"{DOCS[i % 6]} This is paragraph {i}." for i in range(12))


@pytest.fixture
def running(model, tmp_path):
    with in_thread(model, tmp_path / "store") as made:
        yield made


def call(running, method: str = "GET", path: str = "", **more) -> tuple[int, dict]:
    got = httpx.request(method, f"{running.url}/v1/documents{path}", timeout=120, **more)
    return got.status_code, got.json()


def put(running, *documents: dict) -> dict:
    status, found = call(running, "POST", json={"documents": list(documents)})
    assert status == 200, found
    return found


def send(running, *files: tuple[str, bytes]) -> tuple[int, dict]:
    return call(running, "POST", files=[("files", one) for one in files])


def ids(running) -> list[str]:
    return [one["id"] for one in call(running, path="?limit=1000")[1]["data"]]


def test_json_documents_are_added_replaced_and_left(running):
    first = put(running, GIVEN[0], GIVEN[2])
    assert first == {"added": 2, "replaced": 0, "unchanged": 0, "ids": ["d0", "d2"]}
    again = put(running, GIVEN[0], {**GIVEN[2], "text": "Another."}, {"text": "Without an id.", "title": "T"})
    assert [again[name] for name in ("added", "replaced", "unchanged")] == [1, 1, 1] and len(again["ids"]) == 3
    named = {one["id"]: one for one in call(running)[1]["data"]}
    assert named["d2"] == {"id": "d2", "title": "", "page": 2, "characters": len("Another.")}
    assert [one["title"] for one in named.values()] == ["", "", "T"]


def test_long_texts_are_cut_and_nothing_of_an_older_version_stays(running, model):
    found = put(
        running, {"id": "long", "title": "Long", "text": LONG, "page": 4}, {"id": "long#x", "text": "Not of it."}
    )
    passages = found["ids"][:-1]
    assert passages == [f"long#{n}" for n in range(1, len(passages) + 1)] and len(passages) > 5
    store = running.asker.library.store
    for one in store.get(passages):
        assert one.title == "Long" and one.page == 4
        assert len(model.tokens.plain_ids([compressed_text(one)])[0]) <= model.config.doc_max_length
    assert "".join("".join(one.text.split()) for one in store.get(passages)) == "".join(LONG.split())
    shorter = put(running, {"id": "long", "title": "Long", "text": LONG[: len(LONG) // 2], "page": 4})["ids"]
    assert sorted(ids(running)) == sorted([*shorter, "long#x"]) and len(shorter) < len(passages)
    put(running, {"id": "long", "text": "Short."})
    assert sorted(ids(running)) == ["long", "long#x"]


def test_files_are_taken_as_corpora_are(running):
    lines = "\n".join(json.dumps(one) for one in GIVEN[3:])
    status, found = send(
        running, ("a.txt", b"A violin."), ("b.MD", b"\xef\xbb\xbf# Title"), ("c.jsonl", lines.encode())
    )
    assert status == 200 and found["added"] == 5 and found["ids"] == ["a.txt", "b.MD", "d3", "d4", "d5"]
    assert [one.text for one in running.asker.library.store.get(["a.txt", "b.MD", "d4"])] == [
        "A violin.",
        "# Title",
        DOCS[4],
    ]
    assert send(running, ("long.txt", LONG.encode()))[1]["ids"][:2] == ["long.txt#1", "long.txt#2"]
    assert call(running, "DELETE", "/long.txt")[1]["deleted"] > 5 and "long.txt#1" not in ids(running)


BAD_FILES = [
    (("a.pdf", b"%PDF"), "a.pdf: only .txt, .md and .jsonl files are taken"),
    (("a.txt", b"\xff\xfe"), "a.txt: not UTF-8 at byte 0"),
    (("a.md", b" \n"), "a.md: holds no text"),
    (("a.jsonl", b'{"text": "x"}\n{"text": 1}'), "a.jsonl:2: text must be a text, got 1"),
    (("a.jsonl", b"[" * 100_000), "a.jsonl:1: not JSON"),
    (("a.jsonl", b"\n"), "a.jsonl: holds no usable line"),
]


@pytest.mark.parametrize(("file", "reason"), BAD_FILES, ids=[reason[:24] for _, reason in BAD_FILES])
def test_of_an_upload_with_a_bad_file_nothing_is_added(running, file, reason):
    status, found = send(running, ("good.txt", b"A violin."), file)
    assert status == 400 and reason in found["error"]["message"]
    assert len(running.asker.library) == 0


def test_forms_that_cannot_be_read_are_refused(running):
    url, kind = f"{running.url}/v1/documents", "multipart/form-data"
    for headers, body in (
        ({"Content-Type": kind}, b"x"),
        ({"Content-Type": f"{kind}; boundary=a"}, b"--a\r\nnothing"),
        (
            {"Content-Type": f"{kind}; boundary=a"},
            b'--a\r\nContent-Disposition: form-data; name="f"\r\n\r\nno file\r\n--a--',
        ),
        ({"Content-Type": f"{kind}; boundary=a"}, b""),
    ):
        got = httpx.post(url, headers=headers, content=body, timeout=60)
        assert got.status_code == 400 and "the form" in got.json()["error"]["message"]


def test_the_list_comes_page_by_page_and_survives_what_happens_between(running):
    put(running, *GIVEN)
    status, first = call(running, path="?limit=3")
    assert status == 200 and [one["id"] for one in first["data"]] == ["d0", "d1#1", "d1#2"] and first["total"] == 7
    assert call(running, "DELETE", "/d1")[1] == {"id": "d1", "object": "document.deleted", "deleted": 2}
    put(running, {"id": "late", "text": "Came later."})
    _, second = call(running, path=f"?limit=3&after={first['next']}")
    _, third = call(running, path=f"?limit=3&after={second['next']}")
    assert [one["id"] for one in second["data"] + third["data"]] == ["d2", "d3", "d4", "d5", "late"]
    assert third["next"] is None and third["total"] == 6
    for wrong in ("limit=0", "limit=1001", "limit=x", "after=x", f"after={10**30}", "after=-2"):
        assert call(running, path=f"?{wrong}")[0] == 400


ODD = ["a/b", "/a", "a//b/", "ä ö#?&%2F", "<img src=x onerror=alert(1)>", "a" * 500, "a.b/../c", "😀"]


@pytest.mark.parametrize("name", ODD)
def test_any_id_can_be_deleted_and_is_unknown_then(running, name):
    put(running, {"id": name, "text": "A violin."}, {"id": "other", "text": "Other."})
    path = "/" + quote(name, safe="")
    assert call(running, "DELETE", path)[1] == {"id": name, "object": "document.deleted", "deleted": 1}
    status, found = call(running, "DELETE", path)
    assert status == 404 and found["error"]["code"] == "document_not_found" and ids(running) == ["other"]


def test_what_is_added_is_found_and_what_is_deleted_is_not(running):
    body = {"model": "clara", "messages": [{"role": "user", "content": "Which lamp?"}]}

    def sources() -> list[str]:
        got = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60).json()
        return sorted(one["id"] for one in got["citations"])

    assert sources() == []
    put(running, {"id": "lamp", "text": "The lamp."})
    assert sources() == ["lamp"]
    put(running, {"id": "second", "text": "A second lamp."})
    assert sources() == ["lamp", "second"]
    call(running, "DELETE", "/lamp")
    assert sources() == ["second"]


def test_too_many_passages_for_one_commit_are_refused(running, monkeypatch):
    monkeypatch.setattr(running.asker.library, "max_passages", 3)
    status, found = call(running, "POST", json={"documents": [{"id": "long", "text": LONG}]})
    assert status == 413 and "more than 3 passages" in found["error"]["message"] and len(running.asker.library) == 0


def test_an_upload_whose_client_goes_adds_nothing(running, monkeypatch):
    begun, free, ended = threading.Event(), threading.Event(), threading.Event()
    compress, add = CLaRa.compress_rows, running.asker.library.add

    def slow(self, *given):
        begun.set()
        assert free.wait(60)
        return compress(self, *given)

    def told(*given):
        try:
            return add(*given)
        finally:
            ended.set()

    monkeypatch.setattr(CLaRa, "compress_rows", slow)
    monkeypatch.setattr(running.asker.library, "add", told)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{running.url}/v1/documents", json={"documents": GIVEN}, timeout=httpx.Timeout(60, read=2))
    assert begun.is_set()
    time.sleep(0.5)  # for the server to see that the client has gone
    free.set()
    assert ended.wait(60)
    assert len(running.asker.library) == 0
    monkeypatch.undo()
    assert put(running, GIVEN[0])["added"] == 1


def test_questions_are_answered_while_deletions_wait_for_an_upload(running, monkeypatch):
    put(running, GIVEN[0])
    begun, free, add = threading.Event(), threading.Event(), documents_module.add_documents

    def slow(*given):
        begun.set()
        assert free.wait(100)
        return add(*given)

    monkeypatch.setattr(documents_module, "add_documents", slow)
    with ThreadPoolExecutor(1 + 2 * THREADS) as pool:
        added = pool.submit(put, running, GIVEN[1])
        assert begun.wait(60)
        deleted = [pool.submit(call, running, "DELETE", f"/none{i}") for i in range(2 * THREADS)]
        try:
            body = {"model": "clara", "messages": [{"role": "user", "content": QUESTIONS[0]}]}
            until(lambda: running.app.state.server.deletions.statistics().tasks_waiting == 2 * THREADS - 1)
            got = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=60)
            assert got.status_code == 200 and not any(one.done() for one in deleted)
        finally:
            free.set()
        assert added.result(60)["added"] > 0 and {one.result(60)[0] for one in deleted} == {404}


def test_a_library_cuts_passages_as_short_as_it_is_told(model, tmp_path):
    library = Library(tmp_path / "short", model, passage_tokens=9)
    library.add([Document("long", LONG)])
    texts = [document.text for document, _ in library.store.texts()]
    library.close()
    assert max(len(row) for row in model.tokens.plain_ids(texts)) <= 9 < model.config.doc_max_length
    assert "".join("".join(text.split()) for text in texts) == "".join(LONG.split())


def test_what_a_folder_lost_is_deleted_and_nothing_else(model, tmp_path):
    folder, other = tmp_path / "folder", tmp_path / "other.jsonl"
    folder.mkdir()
    (folder / "kept.txt").write_text("A lamp.")
    (folder / "lost.txt").write_text(LONG)
    (folder / "replaced.txt").write_text("A violin.")
    other.write_text('{"id": "line", "text": "A bell.", "z": 1, "a": [2]}\n')

    def fill(path: Path) -> None:
        library = Library(tmp_path / "store", model)
        library.fill(Corpus(path))
        library.close()

    fill(folder)
    fill(other)
    library = Library(tmp_path / "store", model)
    assert library.store.named("lost.txt") and len(library) > 4
    library.add([Document("uploaded", "A drum."), Document("replaced.txt", "Another violin.")])
    library.close()
    (folder / "lost.txt").unlink()
    (folder / "replaced.txt").unlink()
    for _ in range(2):
        fill(folder)
    library = Library(tmp_path / "store", model)
    left = {document.id: document.text for document, _ in library.store.texts()}
    library.close()
    assert left == {
        "kept.txt": "A lamp.", "line": "A bell.", "uploaded": "A drum.", "replaced.txt": "Another violin."
    }  # fmt: skip


def test_a_library_that_is_only_read_changes_nothing(model, tmp_path):
    with Store.create(tmp_path / "store", {"n_memory": 1, "width": 1}):
        pass
    with pytest.raises(ValueError, match="was not made by this model"):
        Library(tmp_path / "store", model, read_only=True)
    writer = Library(tmp_path / "own", model)
    reader = Library(tmp_path / "own", model, read_only=True)
    writer.add([Document("a", "A violin.")])
    assert len(reader) == 1
    with pytest.raises(documents_module.ReadOnly, match="--read_only"):
        reader.add([Document("b", "Two.")])
    with pytest.raises(documents_module.ReadOnly):
        reader.delete("a")
    with pytest.raises(ValueError, match="being written by another process"):
        Library(tmp_path / "own", model)
    reader.close()
    writer.close()
    assert not Path(tmp_path / "own" / "index.sqlite-wal").exists()
