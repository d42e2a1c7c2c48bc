"""A tiny stage-2 checkpoint, and the server over it: as a process of its own, or in a thread of this one."""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import RAGMaster
from openrlhf.serving.app import Limits, create_app
from openrlhf.serving.asking import Asker
from openrlhf.serving.documents import Library
from openrlhf.serving.engine import LocalEngine
from openrlhf.serving.turns import Turns
from tests.tiny import DOCS, new_model
from tests.trainer.launch import processes

WAIT_SECONDS = 180
TOKENS = 12
GIVEN = [{"id": f"d{i}", "title": "", "text": text, "page": i} for i, text in enumerate(DOCS)]


def settings(min_score: float = -1.0, temperature: float = 0.0, tokens: int = TOKENS, seed: int = 7, **more) -> dict:
    """The tiny models' cosines mean nothing, so that every document is above the bar."""
    generation = {"temperature": temperature, "max_new_tokens": tokens, "seed": seed}
    return {"reranking": {"min_score": min_score, "top_k": 2}, "generation": generation, **more}


def save_checkpoint(base: Path, folder: Path, **fields) -> Path:
    """A stage-2 checkpoint over a tiny base model."""
    model = new_model(base, **{"doc_max_length": 32, "compr_rate": 8, **fields})
    model.config.training_stage = "stage2"
    model.save_pretrained(folder)
    return folder


@dataclass
class Running:
    """A server that runs: where, and in a process of its own that and what it said; else its parts."""

    url: str
    process: Any = None
    said: Path | None = None
    app: Any = None
    asker: Any = None

    @property
    def output(self) -> str:
        """What it printed and logged."""
        return self.said.read_text(encoding="utf-8") if self.said else ""

    def signal(self, number: int) -> None:
        """Sends a signal."""
        os.kill(self.process.pid, number)

    def ended(self) -> int:
        """Waits for its end: the exit code, negative for a signal."""
        self.process.join(WAIT_SECONDS)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode


@contextmanager
def serving(
    checkpoint: Path,
    folder: Path,
    *flags: object,
    env: dict | None = None,
    store: Path | None | str = "",
    before: Callable | None = None,
    **more,
) -> Iterator[Running]:
    """The command at a free port over the store `folder/store`, or another, or none that it is told (None); in a
    process that is forked from one with the slow imports behind it, and that calls `before` first. Stopped with SIGTERM
    if it still runs then."""
    folder.mkdir(exist_ok=True)
    (folder / "rag_config.json").write_text(json.dumps({"rag_master": settings(**more)}))  # JSON is YAML
    said = folder / f"{time.monotonic_ns()}.log"
    line = ["--model", checkpoint, "--config", folder / "rag_config.json", "--port", "0", *flags]
    line += [] if store is None else ["--store", store or folder / "store"]
    process = processes().Process(target=_main, args=([str(word) for word in line], str(said), env or {}, before))
    said.touch()
    process.start()
    running = Running("", process, said)
    try:
        end = time.monotonic() + WAIT_SECONDS
        while not (found := re.search(r"listening at (http\S+),", running.output)):
            assert process.is_alive() and time.monotonic() < end, running.output
            time.sleep(0.05)
        running.url = found[1]
        yield running
    finally:
        if process.is_alive():
            process.terminate()
        try:
            running.ended()
        finally:
            process.kill()  # nobody waits for it at the end of the tests


def _main(arguments: list[str], said: str, env: dict, before: Callable | None) -> None:
    file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(env)
    from openrlhf.cli import serve

    if before is not None:
        before()
    serve.main(arguments)


@contextmanager
def in_thread(
    model: CLaRa, store: Path, api_key: str | None = None, limits: Limits | None = None, max_batch: int = 8, **more
) -> Iterator[Running]:
    """The app over a loaded model, served by uvicorn in this process."""
    before = model.router.lock
    model.router.lock = Turns()
    master = RAGMaster(model, config=RAGConfig.from_dict(settings(**more)))
    asker = Asker(master, Library(store, model), LocalEngine(model, max_batch))
    app = create_app(asker, api_key, limits)
    with socket.create_server(("127.0.0.1", 0)) as bound:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=10))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        try:
            yield Running(f"http://127.0.0.1:{bound.getsockname()[1]}", app=app, asker=asker)
        finally:
            server.should_exit = True
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), "the server does not end"
            asker.close()
            model.router.lock = before


def until(condition, what: str = "") -> None:
    """Waits for something that comes soon."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)
