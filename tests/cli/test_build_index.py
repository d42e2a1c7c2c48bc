"""The command that builds a store's indexes: where they lie, what is printed, and what is refused."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openrlhf.cli import build_index
from openrlhf.rag.config import RAGConfig
from openrlhf.rag.master import INDEX_FOLDER, RAGMaster
from openrlhf.retrieval.compress import add_documents, open_store
from openrlhf.retrieval.hybrid import Bm25Index
from openrlhf.retrieval.search import TwoStepIndex, evenly, measure_recall
from openrlhf.retrieval.store import Document, Store
from openrlhf.utils.logging import set_up_logging
from tests.retrieval.stores import new_store
from tests.tiny import DOCS, QUESTIONS, new_model

faiss = pytest.importorskip("faiss")
L, D = 2, 8


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def path(tmp_path) -> Path:
    """A store of 600 documents; nobody has it open."""
    with new_store(tmp_path / "store", normal(600, L, D), [f"violin number {i}" for i in range(600)]) as made:
        return made.path


def printed(capsys, *words) -> str:
    build_index.main([str(word) for word in words])
    return capsys.readouterr().out


def refused(capsys, *words) -> str:
    with pytest.raises(SystemExit) as ended:
        build_index.main([str(word) for word in words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_both_indexes_lie_where_rag_master_looks_and_the_figures_are_theirs(path, capsys):
    said = printed(capsys, "--store", path)
    folder = path / INDEX_FOLDER
    with Store.open(path) as store:
        two, words = TwoStepIndex.open(store, folder), Bm25Index.open(store, folder)
        assert two.factory == "Flat" and words.search("number 17", 1)[1].tolist() == [17]
        query_BE = store.vectors(evenly(store.rows(), 200)).flatten(1).float()
        recall = measure_recall(store, two, query_BE, 10)
    assert f"recall@10    {recall:.3f} of the exact search's, over 200 of the store's own vectors" in said
    for kind, name in (("two-step", "two_step"), ("words", "bm25")):
        (shown,) = re.findall(rf"^{kind} .*?([\d.,]+) MB$", said, re.M)
        size = sum(file.stat().st_size for file in folder.glob(f"{name}-*/*"))
        assert shown == f"{size / 1e6:,.1f}"
    assert "600 documents, 600 vectors of 2 x 8" in said and str(folder) in said


def test_flags_reach_the_index(path, capsys):
    said = printed(capsys, "--store", path, "--factory", "IVF16,Flat", "--projection_dim", 4, "--probe", 3)
    with Store.open(path) as store:
        opened = TwoStepIndex.open(store, path / INDEX_FOLDER)
        assert opened.factory == "IVF16,Flat" and "IVF16,Flat" in said
        assert faiss.extract_index_ivf(opened._index).nprobe == 3 and opened._index.d == 4
        narrow = float(re.search(r"recall@10 +([\d.]+)", said)[1])
    whole = float(re.search(r"recall@10 +([\d.]+)", printed(capsys, "--store", path, "--sample", 50))[1])
    assert whole == 1 and narrow < 1, "16 numbers hold all that 2 vectors of 8 are, 4 numbers in 3 of 16 lists do not"


@pytest.fixture(scope="module")
def asked(mistral, tmp_path_factory) -> tuple[Path, Path, Path]:
    """A checkpoint, a store that it made, and questions."""
    root = tmp_path_factory.mktemp("asked")
    model = new_model(mistral, training_stage="stage2")
    model.save_pretrained(root / "checkpoint")
    with open_store(root / "store", model) as store:
        add_documents(store, model, [Document(f"d{i}", text) for i, text in enumerate(DOCS)])
    (root / "questions.jsonl").write_text("".join(json.dumps({"question": q, "docs": []}) + "\n" for q in QUESTIONS))
    return root / "checkpoint", root / "store", root / "questions.jsonl"


def test_questions_measure_it_as_they_will_use_it_and_rag_master_does(asked, capsys, monkeypatch):
    checkpoint, store_path, questions = asked
    said = printed(capsys, "--store", store_path, "--questions", questions, "--model", checkpoint)
    assert re.search(rf"recall@{len(DOCS)} +1.000 of the exact search's, over {len(QUESTIONS)} questions of", said)
    searched, search = [], TwoStepIndex.search
    monkeypatch.setattr(TwoStepIndex, "search", lambda *args: searched.append(1) or search(*args))
    settings = RAGConfig.from_dict({"reranking": {"min_score": -1.0}})
    with Store.open(store_path) as store, RAGMaster(checkpoint, config=settings) as master:
        assert len(master.retrieve(QUESTIONS[0], store)) == 5 and searched


def test_what_is_wrong_is_said_and_the_index_that_was_there_stays(path, asked, capsys, tmp_path, monkeypatch):
    printed(capsys, "--store", path)
    checkpoint, other, questions = asked
    empty = tmp_path / "empty"
    new_store(empty, torch.empty(0, L, D)).close()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"question": "Who?"}\n{"query": "What?"}\n')
    (tmp_path / "none.txt").write_text("\n \n")
    wrong = {
        "is not a store": ["--store", tmp_path / "nothing"],
        "holds no documents": ["--store", empty],
        "FAISS cannot make 'NONSENSE'": ["--store", path, "--factory", "NONSENSE"],
        "FAISS cannot make 'IVF4096,Flat' of 600 rows": ["--store", path, "--factory", "IVF4096,Flat"],
        "'Flat' has 0 lists": ["--store", path, "--probe", 4],
        "'IVF8,Flat' has 8 lists": ["--store", path, "--factory", "IVF8,Flat", "--probe", 9],
        "between 1 and 1024 numbers, asked for 0": ["--store", path, "--projection_dim", 0],
        "--questions and --model go together": ["--store", path, "--questions", questions],
        "--sample must be at least 1": ["--store", path, "--sample", 0],
        "no checkpoint at": ["--store", path, "--questions", questions, "--model", tmp_path / "nothing"],
        "bad.jsonl:2: not a JSON object with a question": ["--store", other, "--questions", bad, "--model", checkpoint],
        "holds no questions": ["--store", other, "--questions", tmp_path / "none.txt", "--model", checkpoint],
        "was not made by this model": ["--store", path, "--questions", questions, "--model", checkpoint],
    }
    for reason, words in wrong.items():
        assert reason in refused(capsys, *words)
    monkeypatch.setattr(build_index.importlib.util, "find_spec", lambda name: None)
    assert "pip install faiss-cpu" in refused(capsys, "--store", path)
    with Store.open(path) as store:
        assert TwoStepIndex.open(store, path / INDEX_FOLDER).factory == "Flat"
        assert len(Bm25Index.open(store, path / INDEX_FOLDER).search("violin", 5)[1]) == 5


KILLED = """
import os, signal
from openrlhf.cli import build_index
from openrlhf.retrieval import binding
binding.write_whole = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
build_index.main()
"""


def test_a_killed_command_leaves_the_index_that_was_there_and_can_be_given_again(path, capsys):
    printed(capsys, "--store", path)
    words = ["--store", str(path), "--factory", "HNSW16"]
    command = [sys.executable, "-c", KILLED, *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    with Store.open(path) as store:
        assert TwoStepIndex.open(store, path / INDEX_FOLDER).factory == "Flat"
    printed(capsys, *words)
    with Store.open(path) as store:
        assert TwoStepIndex.open(store, path / INDEX_FOLDER).factory == "HNSW16"


def test_libraries_that_log_for_debugging_are_not_heard(path, capfd):
    """bm25s sets its own logger to DEBUG, which passes by the level of the root."""
    before, level = logging.getLogger().handlers[:], logging.getLogger().level
    try:
        set_up_logging(0)
        with Store.open(path) as store:
            Bm25Index.build(store, path / INDEX_FOLDER)
        logging.getLogger("openrlhf").info("a line of ours")
        said = capfd.readouterr().err
        assert "a line of ours" in said and "Building index" not in said
    finally:
        logging.getLogger().handlers[:] = before
        logging.getLogger().setLevel(level)
