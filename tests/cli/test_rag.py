"""The command for a folder: answer and sources, what is compressed again, and what is refused before a model loads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf.cli import rag
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.store import Store
from tests.tiny import new_model

ROOT = Path(__file__).parents[2]
FAST = ["--min_score", "-1", "--temperature", "0", "--max_new_tokens", "5"]


@pytest.fixture(scope="module")
def checkpoint(mistral, tmp_path_factory) -> Path:
    model = new_model(mistral, doc_max_length=32, compr_rate=8)
    model.config.training_stage = "stage2"
    folder = tmp_path_factory.mktemp("rag") / "checkpoint"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / "documents"
    (made / "below").mkdir(parents=True)
    (made / "lamp.txt").write_text("The harbour lamp was lit in 1874.")
    (made / "below" / "bread.md").write_text("# Bread\n\nBread is made from rye.")
    return made


def test_a_folder_is_asked_and_only_what_changed_is_compressed_again(checkpoint, folder, tmp_path, capsys, monkeypatch):
    compressed = []
    rows = CLaRa.compress_rows
    monkeypatch.setattr(
        CLaRa, "compress_rows", lambda self, given, *more: compressed.append(len(given)) or rows(self, given, *more)
    )
    given = ["--documents", str(folder), "--model", str(checkpoint), "--store", str(tmp_path / "store"), *FAST]
    rag.main(["Who lit the harbour lamp?", *given])
    shown = capsys.readouterr()
    assert "[1] " in shown.out and "lamp.txt" in shown.out and "below/bread.md" in shown.out and "score" in shown.out
    assert "The harbour lamp was lit in 1874." in shown.out and "2 passages" in shown.err
    asked = compressed[:]
    compressed.clear()
    rag.main(["Who lit the harbour lamp?", *given])
    assert sum(compressed) == sum(asked) - 2, "the question alone"
    assert capsys.readouterr().out == shown.out
    (folder / "lamp.txt").unlink()
    (folder / "tower.txt").write_text("The tower has 318 steps.")
    rag.main(["How many steps?", *given])
    shown = capsys.readouterr()
    assert "lamp.txt" not in shown.out and "tower.txt" in shown.out
    with Store.open(tmp_path / "store") as store:
        assert {document.id for document, _ in store.texts()} == {"tower.txt", "below/bread.md"}


def test_a_store_is_asked_as_it_is_and_the_default_place_is_a_cache(checkpoint, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rag.main(["Who?", "--documents", str(folder), "--model", str(checkpoint), *FAST])
    first = capsys.readouterr()
    (made,) = (tmp_path / "cache" / "clara").iterdir()
    assert str(made) in first.err and not list(folder.glob(".*"))
    rag.main(["Who?", "--documents", str(made), "--model", str(checkpoint), *FAST])
    assert capsys.readouterr().out == first.out


def test_nothing_above_the_bar_is_said_so(checkpoint, folder, tmp_path, capsys):
    given = ["--documents", str(folder), "--model", str(checkpoint), "--store", str(tmp_path / "store"), *FAST]
    rag.main(["Who?", *given, "--min_score", "1"])
    shown = capsys.readouterr().out
    assert "The documents do not answer this question" in shown and "[1]" not in shown


def test_a_checkpoint_is_asked_with_the_settings_it_carries(checkpoint, folder, tmp_path, capsys):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    (copy / "rag_config.yaml").write_text(
        "rag_master:\n  reranking: {top_k: 1, min_score: -1.0}\n  generation: {temperature: 0.0, max_new_tokens: 5}\n"
        "  compression: {passage_tokens: 6}\n"
    )
    given = ["Who?", "--documents", str(folder), "--store", str(tmp_path / "store"), "--model"]
    rag.main([*given, str(copy)])
    carried = capsys.readouterr().out
    rag.main([*given, str(checkpoint), "--top_k", "1", "--config", str(copy / "rag_config.yaml"), *FAST])
    assert capsys.readouterr().out == carried and "[1]" in carried and "[2]" not in carried
    with Store.open(tmp_path / "store") as store:
        assert {document.id for document, _ in store.texts()} >= {"lamp.txt#1", "lamp.txt#2"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--documents": "nowhere"}, "nowhere does not exist"),
        ({"--model": "nowhere"}, "nowhere"),
        ({"--model": None}, "example/checkpoint is not in this directory"),
        ({"--min_score": "7"}, "between -1 and 1"),
        ({"--top_k": "0"}, "reranking.top_k must be positive"),
        ({"--config": "nowhere.yaml"}, "nowhere.yaml"),
        ({"question": " "}, "the question is empty"),
    ],
)
def test_what_is_wrong_is_said_before_the_model_loads(
    checkpoint, folder, tmp_path, capsys, monkeypatch, change, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLaRa, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    flags = {"--documents": str(folder), "--model": str(checkpoint), **change}
    question = flags.pop("question", "Who?")
    given = [part for key, value in flags.items() if value is not None for part in (key, value)]
    with pytest.raises(SystemExit) as ended:
        rag.main([question, *given])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("rag: ") and len(said.strip().splitlines()) == 1


def test_a_checkpoint_from_before_stage_2_is_refused(checkpoint, mistral, folder, tmp_path, capsys):
    early = tmp_path / "early"
    new_model(mistral, query=False).save_pretrained(early)
    with pytest.raises(SystemExit):
        rag.main(["Who?", "--documents", str(folder), "--model", str(early)])
    assert "a stage2 checkpoint is needed" in capsys.readouterr().err


def test_a_checkpoint_whose_generator_trained_on_is_asked_with_the_reasoner_it_kept(
    checkpoint, folder, tmp_path, capsys
):
    model = CLaRa.from_pretrained(checkpoint)
    model.config.training_stage = "stage1_2"
    model.save_pretrained(tmp_path / "kept")
    given = ["Who?", "--documents", str(folder), "--store", str(tmp_path / "store"), *FAST]
    rag.main([*given, "--model", str(tmp_path / "kept")])
    assert "[1]" in capsys.readouterr().out


def test_the_command_runs_as_people_type_it(checkpoint, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"id": "7", "title": "Lamp", "text": "It was lit in 1874.", "page": 3}) + "\n")
    command = [sys.executable, "-m", "openrlhf.cli.rag", "Who?", "--documents", str(corpus), "--model", str(checkpoint)]
    command += ["--store", str(tmp_path / "store"), *FAST]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    assert "[1] 7 (Lamp), page 3  score" in done.stdout
