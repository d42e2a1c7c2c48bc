"""The synthesis against a real server with a real small model: llama.cpp's, an optional extra.

Runs where the package is installed and CLARA_TEST_GGUF names a model in GGUF form (SmolLM2-135M-Instruct's lies in the
package that scripts/get_base_model.py downloads). LLAMA_PYTHON may name the interpreter of another environment that has
llama-cpp-python[server]. So small a model writes few true questions: what is shown is that requests, schemas, checks
and counts work, and that its nonsense is dropped.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from openrlhf.pipeline import verify
from openrlhf.pipeline.synthesis import source_of
from scripts.synthesize_data import main
from tests.pipeline.test_synthesis import chunks, lines_of, report_of, write

GGUF = Path(os.environ.get("CLARA_TEST_GGUF", "absent"))
PYTHON = os.environ.get("LLAMA_PYTHON") or (sys.executable if importlib.util.find_spec("llama_cpp") else None)

pytestmark = pytest.mark.skipif(
    PYTHON is None or not GGUF.is_file(), reason="needs llama-cpp-python[server] and CLARA_TEST_GGUF"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Address of llama.cpp's server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(tmp_path_factory.mktemp("llama") / "log", "w")  # noqa: SIM115
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(GGUF), "--model_alias", "smollm2", "--port", str(port),
               "--n_ctx", "4096", "--n_threads", "1", "--n_threads_batch", "1"]  # fmt: skip
    process = subprocess.Popen(command, stdout=log, stderr=log)
    url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).read()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < until, Path(log.name).read_text()[-2000:]
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)
    log.close()


def test_a_real_model_behind_a_real_server(server, tmp_path, monkeypatch, capsys):
    rows = chunks(2)[:3]
    monkeypatch.setenv("BASE_URL", server)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    path = write(tmp_path, rows)
    options = ["--input_file", str(path), "--output_dir", str(tmp_path), "--model", "smollm2", "--rounds", "2",
               "--concurrency", "1", "--max_tokens", "300", "--timeout", "600"]  # fmt: skip
    began = time.monotonic()
    main(options)
    seconds, report, made = time.monotonic() - began, report_of(tmp_path), lines_of(tmp_path)
    with capsys.disabled():
        print(json.dumps({"seconds": round(seconds), **report["chunks"], **report["tokens"]}))
        print(json.dumps({"accepted": report["accepted"], "reasons": report["reasons"]}))
    assert [line["id"] for line in made] == [row["id"] for row in rows]
    assert report["chunks"]["failed"] == 0 and report["tokens"]["requests"] >= 3 * 5
    assert not report["tokens"]["estimated"] and report["tokens"]["completion"] > 100
    for row, line in zip(rows, made, strict=True):
        for pair in line["simple_qa"]:
            assert verify.ungrounded(pair["answer"], source_of(row), 0.8, pair["question"]) is None
    before = (tmp_path / "synthesized.jsonl").read_bytes()
    main(options)
    assert "this run    0 requests" in capsys.readouterr().out
    assert (tmp_path / "synthesized.jsonl").read_bytes() == before
