"""Stores of true facts, and the retrieval service over a store, in a thread or as a process of its own."""

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from openrlhf.models.document_cache import document_keys
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import open_store
from openrlhf.retrieval.service import Searcher, create_app
from openrlhf.retrieval.store import Document, Store
from tests.trainer.facts import DOCS
from tests.trainer.launch import BASE_MODEL, ENVIRONMENT, LIMIT_SECONDS
from tests.trainer.test_numbers import CHECKPOINT


def make_store(path: Path, texts: list[str], checkpoint: Path = CHECKPOINT) -> Path:
    """A store of these texts, compressed one at a time as a training run on a CPU does."""
    model = CLaRa.from_pretrained(checkpoint, decoder_model_name=str(BASE_MODEL))
    model.inference_batch = 1
    keys = [document_keys(*model.tokens.encoder_batch(model.tokens.encoder_rows([text])))[0] for text in texts]
    docs_NLD, _ = model.compress_documents(texts)
    with open_store(path, model) as store:
        documents = [Document(f"fact {DOCS.index(text)}", text) for text in texts]
        store.add(documents, keys, dict(zip(keys, docs_NLD, strict=True)))
    return path


@dataclass
class Service:
    """A running service."""

    url: str
    process: subprocess.Popen
    said: Path

    @property
    def output(self) -> str:
        """What it printed and logged."""
        return self.said.read_text(encoding="utf-8")


@contextmanager
def serving(store: Path, *flags: object, env: dict | None = None) -> Iterator[Service]:
    """The real command over a store, at a free port; stopped with SIGTERM."""
    said = store.parent / f"{store.name}-{time.monotonic_ns()}.log"
    line = [sys.executable, "-m", "openrlhf.cli.serve_retrieval", "--store", store, "--port", "0", *flags]
    with open(said, "w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(word) for word in line], env={"PATH": "", **ENVIRONMENT, **(env or {})}, stdout=file, stderr=file
        )
    service = Service("", process, said)
    try:
        until = time.monotonic() + LIMIT_SECONDS
        while not (found := re.search(r"listening at (http\S+),", service.output)):
            assert process.poll() is None and time.monotonic() < until, service.output
            time.sleep(0.05)
        service.url = found[1]
        yield service
    finally:
        process.terminate()
        try:
            process.wait(LIMIT_SECONDS)
        finally:
            process.kill()


@contextmanager
def in_thread(store: Path, model: CLaRa | None = None, api_key: str | None = None) -> Iterator[str]:
    """The app over a store, served by uvicorn in this process at a free port; yields its URL."""
    with Store.open(store) as opened, socket.create_server(("127.0.0.1", 0)) as bound:
        app = create_app(Searcher(opened, model), api_key)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(LIMIT_SECONDS)
            assert not thread.is_alive(), "the service does not end"
