"""The command: what it refuses before it loads anything, how it stops, and that nothing is lost when it is killed."""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import httpx
import openai
import pytest

from openrlhf.cli.serve import main
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import open_store
from openrlhf.retrieval.store import Store
from openrlhf.serving.asking import Asker
from openrlhf.serving.export_vllm import plan, write
from tests.serving.served import GIVEN, WAIT_SECONDS, save_checkpoint, serving, until
from tests.serving.vllm_stub import VllmStub
from tests.tiny import DOCS, new_model
from tests.trainer.launch import ENVIRONMENT

LONG = 400
KEY = "s3cret-0816"


def ask(text: str = "Why?", **more) -> dict:
    return {"model": "clara", "messages": [{"role": "user", "content": text}], **more}


def upload(url: str, documents: list[dict]) -> httpx.Response:
    return httpx.post(f"{url}/v1/documents", json={"documents": documents}, timeout=120)


def listed(url: str) -> list[str]:
    return [one["id"] for one in httpx.get(f"{url}/v1/documents?limit=1000", timeout=60).json()["data"]]


def long_question(url: str, tokens: int) -> tuple[dict, str]:
    """A request whose answer has this many tokens, and the answer: a random model ends some of them early."""
    for i in range(30):
        body = ask(f"Why {i}?", max_tokens=tokens)
        found = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).json()
        if found["usage"]["completion_tokens"] == tokens:
            return {**body, "stream": True}, found["choices"][0]["message"]["content"]
    raise AssertionError("no answer is long enough")


@pytest.fixture
def refused(capsys, monkeypatch, checkpoint):
    """What the command says where it refuses to start, without having loaded a model."""

    def loads(*_, **__):
        raise AssertionError("a model is loaded for what should be refused before")

    def run(*flags: object, loading: bool = False) -> str:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
            if not loading:
                patch.setattr(CLaRa, "from_pretrained", loads)
            main(["--model", str(checkpoint), "--port", "0", *map(str, flags)])
        said = capsys.readouterr()
        assert ended.value.code == 2 and "listening" not in said.out
        return said.err.strip().splitlines()[-1]

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_cannot_be_served_is_refused_before_a_model_is_loaded(refused, mistral, tmp_path):
    other = new_model(mistral)
    with open_store(tmp_path / "other", other):
        pass
    stage1 = tmp_path / "stage1"
    new_model(mistral, query=False).save_pretrained(stage1)
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "thesis.txt").write_text("")
    (tmp_path / "bad.yaml").write_text("rag_master: {nothing: 1}")
    store = ("--store", tmp_path / "store")
    for flags, reason in (
        ((*store, "--model", tmp_path / "none"), "no checkpoint at"),
        ((*store, "--model", stage1), "a stage2 checkpoint is needed"),
        (("--store", tmp_path / "other"), "was not made by this model: doc_max_length is 16 there, 32 here"),
        (("--store", tmp_path / "some"), "is not a store and not empty (thesis.txt is there)"),
        ((*store, "--read_only"), "is not a store"),
        ((*store, "--config", tmp_path / "bad.yaml"), "unknown key nothing"),
        ((*store, "--documents", tmp_path / "none"), "does not exist"),
        ((*store, "--documents", tmp_path / "some"), "no .txt or .md file with text"),
        ((*store, "--documents", tmp_path, "--read_only"), "--read_only changes no documents"),
        ((*store, "--device", "gpu"), "--device gpu cannot be used"),
        ((*store, "--host", "192.0.2.1"), "cannot listen at --host 192.0.2.1"),
        ((*store, "--max_batch", 0), "--max_batch must be positive"),
        ((*store, "--port", 70000), "--port must be between"),
        ((*store, "--engine", "vllm"), "--engine vllm needs --vllm_url and --vllm_model"),
        ((*store, "--vllm_url", "http://x"), "--engine vllm needs"),
    ):
        assert reason in refused(*flags), flags
    assert not (tmp_path / "store").exists()


def test_a_store_of_another_compressor_is_refused(refused, mistral, tmp_path):
    """Of the same sizes: only its weights tell."""
    checkpoint = save_checkpoint(mistral, tmp_path / "checkpoint", lora_r=8)
    other = CLaRa.from_pretrained(checkpoint)
    with open_store(tmp_path / "store", other):
        pass
    assert "was not made by this model: compressor is" in refused("--store", tmp_path / "store")


def test_the_real_command_line_starts_answers_and_stops(checkpoint, tmp_path):
    line = [
        sys.executable,
        "-m",
        "openrlhf.cli.serve",
        "--model",
        checkpoint,
        "--store",
        tmp_path / "store",
        "--port",
        0,
    ]
    process = subprocess.Popen(list(map(str, line)), env={"PATH": "", **ENVIRONMENT}, stdout=subprocess.PIPE, text=True)
    limit = threading.Timer(WAIT_SECONDS, process.kill)  # ends the reading of what it prints
    limit.start()
    try:
        assert process.stdout.readline() == f"serving {tmp_path / 'store'}: 0 documents, engine local\n"
        url = re.search(r"listening at (http\S+), key not needed", process.stdout.readline())[1]
        assert httpx.get(f"{url}/health", timeout=60).json()["status"] == "ready"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        limit.cancel()
        process.kill()
        process.wait(60)


@pytest.fixture(scope="module")
def served(checkpoint, tmp_path_factory):
    with serving(checkpoint, tmp_path_factory.mktemp("serve"), env={"CLARA_API_KEY": KEY}) as running:
        yield running


def test_a_server_says_where_it_is_and_never_its_key(served):
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key=KEY, timeout=120)
    assert client.models.list().data[0].id == "clara"
    assert client.chat.completions.create(**ask()).choices[0].message.content.endswith("there are none.")
    assert served.url.startswith("http://127.0.0.1:") and "key needed" in served.output
    assert "serving" in served.output and KEY not in served.output and "anybody" not in served.output


def test_a_second_server_on_one_store_is_refused_or_reads(served, checkpoint, refused):
    store = served.said.parent / "store"
    told = refused("--store", store, loading=True)
    assert f"is being written by another process ({served.process.pid})" in told
    good = {"Authorization": f"Bearer {KEY}"}
    body = {"documents": GIVEN[:2]}
    httpx.post(f"{served.url}/v1/documents", json=body, headers=good, timeout=60).raise_for_status()
    with serving(checkpoint, served.said.parent / "second", "--read_only", store=store) as second:
        assert "d0" in listed(second.url)
        denied = upload(second.url, GIVEN[2:])
        assert denied.status_code == 403 and denied.json()["error"]["code"] == "read_only"
        answer = httpx.post(f"{second.url}/v1/chat/completions", json=ask(DOCS[0]), timeout=60).json()
        assert answer["citations"][0]["id"] == "d0"
        body = {"documents": [GIVEN[2]]}
        httpx.post(f"{served.url}/v1/documents", json=body, headers=good, timeout=60).raise_for_status()
        assert "d2" in listed(second.url)


def test_an_address_that_all_can_reach_without_a_key_warns(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path, "--host", "0.0.0.0") as running:
        assert "anybody who reaches 0.0.0.0 can read and change the documents: set CLARA_API_KEY" in running.output


def test_documents_are_there_again_after_a_restart_and_a_folder_is_added_to_them(checkpoint, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "lamp.txt").write_text("The harbour lamp.")
    with serving(checkpoint, tmp_path / "run", "--documents", folder) as first:
        assert listed(first.url) == ["lamp.txt"]
        upload(first.url, GIVEN[:1])
        answers = [httpx.post(f"{first.url}/v1/chat/completions", json=ask(), timeout=60).json()]
    assert first.ended() == 0
    (folder / "later.md").write_text("A violin.")
    with serving(checkpoint, tmp_path / "run") as second:
        assert listed(second.url) == ["lamp.txt", "d0"]
        answers.append(httpx.post(f"{second.url}/v1/chat/completions", json=ask(), timeout=60).json())
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["citations"] == answers[1]["citations"]
    with serving(checkpoint, tmp_path / "run", "--documents", folder) as third:
        assert listed(third.url) == ["lamp.txt", "d0", "later.md"]


def test_a_server_that_is_killed_while_it_takes_uploads_loses_nothing_and_keeps_no_half(checkpoint, tmp_path):
    """Uploads of ten documents each follow one another; at three moments the process is killed without warning."""
    number, answered = 0, set()
    for delay in (0.0, 0.13, 0.31):
        with serving(checkpoint, tmp_path / "run") as running:
            there = set(listed(running.url))
            assert answered <= there, "an upload that was answered is lost"
            assert all(sum(name.startswith(f"u{n}-") for name in there) in (0, 10) for n in range(number)), (
                "half an upload"
            )
            stop = threading.Event()

            def send(url=running.url, stop=stop) -> None:
                nonlocal number
                while not stop.is_set():
                    batch, number = number, number + 1
                    documents = [{"id": f"u{batch}-{i}", "text": f"{DOCS[2]} {batch} {i}"} for i in range(10)]
                    try:
                        if upload(url, documents).status_code == 200:
                            answered.update(one["id"] for one in documents)
                    except httpx.HTTPError:
                        return

            before = len(answered)
            thread = threading.Thread(target=send, daemon=True)
            thread.start()
            until(lambda before=before: len(answered) > before)
            time.sleep(delay)
            running.process.kill()
            stop.set()
            thread.join(120)
    with serving(checkpoint, tmp_path / "run") as running:
        there = set(listed(running.url))
        assert answered <= there and len(answered) >= 30
        assert all(sum(name.startswith(f"u{n}-") for name in there) in (0, 10) for n in range(number))
        assert upload(running.url, GIVEN[:1]).status_code == 200
    with Store.open(tmp_path / "run" / "store") as store:
        assert store.verify() == []


def test_a_full_disk_is_told_and_the_server_lives(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path) as running:
        assert upload(running.url, GIVEN[:2]).status_code == 200
        before = listed(running.url)
        _, hard = resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (1024, hard))  # no file grows beyond this
        full = upload(running.url, [{"id": f"new {i}", "text": f"{DOCS[2]} {i} {'x ' * 20}"} for i in range(20)])
        assert full.status_code == 507 and "could not be written" in full.json()["error"]["message"]
        assert listed(running.url) == before
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=ask(), timeout=60)
        assert answer.status_code == 200 and len(answer.json()["citations"]) == 2
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (hard, hard))
        assert upload(running.url, GIVEN[2:3]).json()["added"] == 1
        assert listed(running.url) == [*before, "d2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_running_answers_end(checkpoint, tmp_path, number):
    with serving(checkpoint, tmp_path) as running:
        upload(running.url, GIVEN)
        body, whole = long_question(running.url, LONG)
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=120) as got:
            lines = got.iter_lines()
            first = [next(lines) for _ in range(5)]
            running.signal(number)
            rest = [line for line in [*first, *lines] if line]
        assert rest[-1] == "data: [DONE]"
        pieces = [json.loads(line[6:])["choices"][0]["delta"].get("content", "") for line in rest[:-1]]
        assert "".join(pieces) == whole
        assert running.ended() == 0 and "Traceback" not in running.output
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.url}/health")


def test_a_second_interrupt_stops_at_once(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path, "--shutdown_seconds", 300) as running:
        upload(running.url, GIVEN)
        body, _ = long_question(running.url, 900)
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=120) as got:
            lines = got.iter_lines()
            next(lines)
            running.signal(signal.SIGINT)
            time.sleep(0.3)
            running.signal(signal.SIGINT)
            assert running.ended() == 130
    assert "Traceback" not in running.output


def test_an_answer_that_takes_longer_than_shutdown_seconds_is_cut_off(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path, "--shutdown_seconds", 1) as running:
        upload(running.url, GIVEN)
        body, _ = long_question(running.url, 900)
        with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=body, timeout=120) as got:
            lines = got.iter_lines()
            next(lines)
            running.process.terminate()
            assert running.ended() == 0
            assert "data: [DONE]" not in _rest(lines)


def rank_for_ever() -> None:
    Asker.rerank = lambda *_: time.sleep(600)  # type: ignore[assignment,method-assign]


def test_work_that_was_given_up_does_not_hold_the_process(checkpoint, tmp_path):
    with serving(checkpoint, tmp_path, "--shutdown_seconds", 1, before=rank_for_ever) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/rerank", json={"query": "Why?", "documents": ["A."]}, timeout=2)
        running.process.terminate()
        assert running.ended() == 0


def _rest(lines: Iterator[str]) -> list[str]:
    """What comes until the connection breaks."""
    found = []
    with suppress(httpx.HTTPError):
        for line in lines:
            found.append(line)
    return found


def test_the_store_has_a_place_of_its_own_where_none_is_given(checkpoint, tmp_path):
    notes, home = tmp_path / "notes", tmp_path / "home"
    notes.mkdir()
    (notes / "a.txt").write_text("A violin.")
    options: dict = {"store": None, "env": {"XDG_CACHE_HOME": str(home)}}
    with serving(checkpoint, tmp_path / "run", "--documents", notes, **options) as running:
        assert f"serving {home / 'clara' / 'notes-'}" in running.output
        upload(running.url, GIVEN[:1])
    with serving(checkpoint, tmp_path / "run", "--documents", notes, **options) as running:
        assert listed(running.url) == ["a.txt", "d0"]


def test_a_vllm_server_writes_the_same_answers(checkpoint, tmp_path):
    write(plan(str(checkpoint), tmp_path / "export", dtype="float32"))
    stub = VllmStub.of_lora(tmp_path / "export")
    flags = ("--engine", "vllm", "--vllm_url", stub.url, "--vllm_model", "clara")
    said, cited = [], []
    try:
        for more in ((), flags):
            with serving(checkpoint, tmp_path / "kept", *more) as server:
                upload(server.url, GIVEN)
                whole = httpx.post(f"{server.url}/v1/chat/completions", json=ask(), timeout=120).json()
                with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
                    stream = client.chat.completions.create(**ask(), stream=True)
                    pieces = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
                said += [whole["choices"][0]["message"]["content"], pieces]
                cited.append(whole["citations"])
    finally:
        stub.close()
    assert said[0] and len(set(said)) == 1
    assert cited[0] and cited[0] == cited[1]
