"""Every benchmark runs, on a tiny model, and times nothing before its two ways agree."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import ANSWERS, DOCS, QUESTIONS

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SETTINGS = ["--device", "cpu", "--dtype", "float32", "--rounds", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The three training files, small."""
    folder = tmp_path_factory.mktemp("data")
    documents = [f"{doc} {number}" for number in range(4) for doc in DOCS]
    qa = [
        {"data_type": "qa", "question": QUESTIONS[:1], "answers": ANSWERS[:1], "docs": [document]}
        for document in documents
    ]
    asked = [
        {"question": question, "docs": documents[i : i + 6], "answer": answer, "pos_index": [0]}
        for i, (question, answer) in enumerate(zip(QUESTIONS * 4, ANSWERS * 4, strict=True))
    ]
    for name, records in (("pretrain", qa), ("instruction", asked), ("end_to_end", asked)):
        (folder / f"{name}_data.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    return folder


@pytest.fixture
def run(monkeypatch, mistral, tmp_path):
    """Runs a benchmark's main with flags; its JSON."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def call(name: str, *flags: str) -> dict:
        out = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--base", str(mistral), "--out", str(out), *SETTINGS, *flags])
        importlib.import_module(name).main()
        return json.loads(out.read_text())

    yield call
    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)


def test_compress(run, data, capsys):
    found = run("compress", "--data", str(data / "pretrain_data.jsonl"), "--documents", "8", "--batch", "4", "--merge")
    assert found["difference"] < 1e-3 and found["ceiling"] > 1 and set(found["ratio"]) == set(found["seconds"])
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in found["seconds"].values())
    assert {"date", "torch", "command", "name", "flags"} <= found.keys()
    assert "| ours, merged |" in capsys.readouterr().out


def test_the_summary_shows_what_was_measured_and_says_what_was_not(run, data, tmp_path):
    run(
        "first_token",
        "--data",
        str(data / "pretrain_data.jsonl"),
        "--documents",
        "1",
        "--doc_tokens",
        "32",
        "--rate",
        "8",
    )
    page = importlib.import_module("summary").page(tmp_path)
    assert "| 1 × 32 " in page and "first_token.py" in page
    assert page.count("On a GPU: not measured.") == 9


def test_compress_times_nothing_when_the_ways_differ(run, data, monkeypatch):
    importlib.import_module("public_way")
    real = sys.modules["public_way"].compress
    monkeypatch.setattr(sys.modules["public_way"], "compress", lambda *args: real(*args) * 1.01)
    with pytest.raises(SystemExit, match="nothing was timed"):
        run("compress", "--data", str(data / "pretrain_data.jsonl"), "--documents", "4")


def test_stage1_step(run, data):
    found = run("stage1_step", "--data", str(data / "pretrain_data.jsonl"), "--records", "6", "--micro_batch", "3")
    assert found["difference"]["loss"] < 1e-4 and found["difference"]["gradients"] < 1e-3
    assert found["operations"] > 0 and found["ceiling"] > 1


def test_stage2_step_counts_what_an_epoch_has_not_seen_before(run, data):
    records = [json.loads(line) for line in (data / "end_to_end_data.jsonl").read_text().splitlines()]
    flags = ["--data", str(data / "end_to_end_data.jsonl"), "--questions", "2", "--micro_batch", "1", "--steps", "3"]
    found = run("stage2_step", *flags)
    assert found["candidates"] == sum(len(record["docs"]) for record in records)
    assert found["distinct"] == len({doc for record in records for doc in record["docs"]})
    assert len(found["missing"]) == 3 and sum(found["missing"]) <= found["distinct"]
    assert all(len(seconds) == 3 for seconds in found["seconds"].values())


def test_first_token(run, data):
    flags = ["--documents", "1", "2", "--doc_tokens", "32", "--rate", "8"]
    found = run("first_token", "--data", str(data / "pretrain_data.jsonl"), *flags)
    short, full = found["cases"][1]["tokens"]
    assert full - short >= 2 * (32 - 4 - 2), "the text of two documents against four vectors and a separator each"


def test_decode(run, data):
    flags = ["--data", str(data / "end_to_end_data.jsonl"), "--batches", "1", "3", "--new_tokens", "5"]
    found = run("decode", *flags)
    assert [case["equal"][0] for case in found["cases"]] == [1, 3]


def test_serve(run, data):
    flags = ["--data", str(data / "end_to_end_data.jsonl"), "--batches", "4", "--requests", "6", "--new_tokens", "8"]
    found = run("serve", *flags)
    assert found["equal"] == {"1": 6, "4": 6} and set(found["ratio"]) == {"1", "4"} and found["tokens"] > 6


@pytest.mark.parametrize("way", ["ours", "public way"])
def test_memory_measures_a_step(run, data, monkeypatch, capsys, way):
    with pytest.raises(FileNotFoundError):  # the child that measures writes no file, only a line
        run("memory", "--data", str(data), "--measure", "stage2", way, "2")
    loaded, peak = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert 0 < loaded <= peak


def test_scaling(run, data):
    flags = ["--data", str(data / "pretrain_data.jsonl"), "--questions", str(data / "end_to_end_data.jsonl")]
    found = run("scaling", *flags, "--sizes", "2", "8", "--batches", "2", "6", "--parts", "documents", "batch")
    assert set(found["parts"]) == {"documents compressed", "questions in a stage-2 step"}
    exponent = sys.modules["scaling"].exponent
    assert exponent([1, 10, 100], [2.0, 20.0, 200.0]) == pytest.approx(1)
    assert exponent([1, 10, 100], [5.0, 5.0, 5.0]) == pytest.approx(0)


def test_search(run):
    pytest.importorskip("faiss")
    found = run("search", "--sizes", "50", "1200", "--memory_tokens", "2", "--width", "24")
    assert [(case["kind"], case["documents"]) for case in found["cases"]] == [
        (kind, size) for kind in ("random", "clustered") for size in (50, 1200)
    ]
    assert all(
        set(case["seconds"]) == {"exact, 1", "two steps, 1", "exact, 32", "two steps, 32"} for case in found["cases"]
    )
    assert all(0 < case["recall"]["5"] <= 1 and case["build"] > 0 for case in found["cases"])
    assert len(found["exponents"]) == 8 and found["memory_bytes_a_second"] > 0


def test_search_times_nothing_when_the_ways_score_differently(run, monkeypatch):
    pytest.importorskip("faiss")
    from openrlhf.retrieval.search import TwoStepIndex

    real = TwoStepIndex.search
    monkeypatch.setattr(TwoStepIndex, "search", lambda *args: (real(*args)[0] * 1.001, real(*args)[1]))
    with pytest.raises(SystemExit, match="nothing was timed"):
        run("search", "--sizes", "50", "--memory_tokens", "2", "--width", "24")


def test_the_public_way_runs_pefts_own_layers(run, mistral):
    from peft.tuners.lora import Linear

    from tests.tiny import new_model

    public_way, model = importlib.import_module("public_way"), new_model(mistral)
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        own = Linear.forward
        patch.setattr(Linear, "forward", lambda self, *args: calls.append(self) or own(self, *args))
        with public_way.stock_layers(model), torch.no_grad():
            model.hidden("encoder_adapter", torch.randn(1, 3, 32), torch.ones(1, 3, dtype=torch.long))
    assert len(calls) == len(model.router.layers)
    assert all("forward" not in vars(layer) for layer in model.router.layers)
