"""Against a real vLLM server, where one runs; skipped where none is named.

    CHECKPOINT=… BASE=… VLLM_URL=http://127.0.0.1:8000 VLLM_MODEL=clara VLLM_DTYPE=float32 \
        python -m pytest tests/serving/test_real_vllm.py -s

CHECKPOINT is what the server's model was exported from, BASE its base model. In float32 every answer must be
RAGMaster's own; in bfloat16 two programs round differently, and how many agree is printed.
"""

import os
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.master import RAGMaster
from openrlhf.serving.vllm import VllmEngine
from tests.serving.conftest import rag_config
from tests.tiny import DOCS, QUESTIONS

URL, MODEL = os.environ.get("VLLM_URL", ""), os.environ.get("VLLM_MODEL", "clara")
pytestmark = pytest.mark.skipif(not URL, reason="VLLM_URL names no server")
MORE_DOCS = [
    "The lighthouse of Alexandria was built by Sostratus of Cnidus on the island of Pharos.",
    "Ada Lovelace wrote the first published algorithm for the Analytical Engine of Charles Babbage.",
]
MORE_QUESTIONS = [
    "Who built the lighthouse of Alexandria?",
    "What is the capital of Australia?",
    "How many strings has a violin?",
]
NEW = 32


@pytest.fixture(scope="module")
def real():
    """(engine, prepared, RAGMaster's own answers, dtype)."""
    dtype = os.environ.get("VLLM_DTYPE", "float32")
    model = CLaRa.from_pretrained(
        os.environ["CHECKPOINT"], decoder_model_name=os.environ["BASE"], dtype=getattr(torch, dtype)
    )
    limits = {"reranking": {"min_score": -1.0, "top_k": 3}, "generation": {"temperature": 0.0, "max_new_tokens": NEW}}
    questions, documents = [*QUESTIONS, *MORE_QUESTIONS], [*DOCS, *MORE_DOCS]
    with RAGMaster(model, config=rag_config(**limits)) as master:
        prepared = master.prepare(questions, documents)
        own = [answer for answer, _ in master.query_batch(questions, documents)]
    return VllmEngine(model, URL, MODEL), prepared, own, dtype


def test_answers_are_those_of_ragmaster(real):
    engine, prepared, own, dtype = real
    with ThreadPoolExecutor(len(prepared)) as pool:
        got = list(pool.map(lambda item: "".join(engine.submit(item, NEW, 0.0, 0)), prepared))
    whole = [engine.answer(item, NEW, 0.0, 0) for item in prepared]
    equal = sum(a == b for a, b in zip(got, own, strict=True))
    print(f"\n{equal} of {len(own)} answers are RAGMaster's own, in {dtype}")
    assert got == own if dtype == "float32" else all(got)
    assert whole == own if dtype == "float32" else all(whole)


def running() -> float:
    """Requests that the server works on."""
    with urllib.request.urlopen(f"{URL}/metrics", timeout=60) as reply:
        lines = reply.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def test_closing_cancels_at_the_server(real):
    engine, (item, *_), *_ = real
    pieces = engine.submit(item, 1500, 2.0, 5)  # so hot that it hardly ends by itself
    next(pieces)
    assert running() == 1
    pieces.close()
    deadline = time.monotonic() + 60
    while running() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert running() == 0
