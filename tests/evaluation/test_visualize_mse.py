"""Memory means against text means: the figures, the plane, the files read and written, and what is refused."""

import importlib.util
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import visualize_mse
from evaluation.visualize_mse import STATISTICS, main, means, names, project, read_documents, statistics
from openrlhf.datasets.records import RecordError
from openrlhf.models.adapters import ENCODER
from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import DOCS, new_model, shake


@pytest.fixture(autouse=True)
def cpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="module")
def model(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture(scope="module")
def checkpoints(mistral, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    model = new_model(mistral, query=False)
    for seed, name in enumerate(("with", "without")):
        shake(model, seed)
        model.save_pretrained(root / name / "stage1")
    return [root / "with" / "stage1", root / "without" / "stage1"]


@pytest.fixture
def documents_file(tmp_path) -> Path:
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"docs": [doc]}) + "\n" for doc in DOCS), encoding="utf-8")
    return path


def test_the_figure_called_mse_is_the_mse_loss(model, monkeypatch):
    monkeypatch.setattr(visualize_mse, "INFERENCE_BATCH", 2)
    memory_ND, text_ND = means(model, DOCS)
    vectors_NLD, mse = model.compress_documents(DOCS)
    assert statistics(memory_ND, text_ND)["mse"] == pytest.approx(mse.item(), rel=1e-5)
    assert torch.allclose(memory_ND, vectors_NLD.mean(1), atol=1e-5)


def test_the_means_are_those_of_each_document_alone_without_padding(model):
    memory_ND, text_ND = means(model, DOCS)
    n_memory = model.config.n_memory_tokens
    for i, doc in enumerate(DOCS):
        ids = torch.tensor([model.tokens.encoder_rows([doc])[0] + model.tokens.memory_ids])
        with torch.no_grad():
            states = model.hidden(ENCODER, model.embed(ids), torch.ones_like(ids))[0].double().numpy()
        np.testing.assert_allclose(memory_ND[i], states[-n_memory:].mean(0), atol=1e-5)
        np.testing.assert_allclose(text_ND[i], states[:-n_memory].mean(0), atol=1e-5)


def test_dropout_is_off_and_the_mode_comes_back(model):
    model.train()
    first, again = means(model, DOCS), means(model, DOCS)
    assert model.training
    model.eval()
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_an_overflow_is_said(model, monkeypatch):
    monkeypatch.setattr(model, "hidden", lambda _, embeds, __: embeds * math.inf)
    with pytest.raises(ValueError, match="give --dtype float32"):
        means(model, DOCS)


def test_statistics_equal_plain_loops(monkeypatch):
    monkeypatch.setattr(visualize_mse, "CHUNK", 2)
    generator = torch.Generator().manual_seed(0)
    memory_ND = torch.randn(5, 3, generator=generator) + 1
    text_ND = memory_ND + 0.7 * torch.randn(5, 3, generator=generator)
    memory, text = memory_ND.double().tolist(), text_ND.double().tolist()

    def cosine(x, y):
        return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    centres = [[sum(column) / 5 for column in zip(*cloud, strict=True)] for cloud in (memory, text)]
    squares = [math.dist(x, c) ** 2 for cloud, c in zip((memory, text), centres, strict=True) for x in cloud]
    between, spread = math.dist(*centres), math.sqrt(sum(squares) / 10)
    nearest = [max(range(5), key=lambda j: cosine(x, text[j])) for x in memory]
    assert 0 < sum(i == j for i, j in enumerate(nearest)) < 5
    assert statistics(memory_ND, text_ND) == pytest.approx(
        {
            "mse": sum(math.dist(m, t) ** 2 for m, t in zip(memory, text, strict=True)) / 15,
            "distance_matched": sum(map(math.dist, memory, text)) / 5,
            "distance_mismatched": sum(math.dist(memory[i], text[j]) for i, j in pairs) / 20,
            "cosine_matched": sum(map(cosine, memory, text)) / 5,
            "cosine_mismatched": sum(cosine(memory[i], text[j]) for i, j in pairs) / 20,
            "centroid_distance": between,
            "spread": spread,
            "centroid_over_spread": between / spread,
            "nearest_is_own": sum(i == j for i, j in enumerate(nearest)) / 5,
        }
    )
    assert list(statistics(memory_ND, text_ND)) == list(STATISTICS)


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("n", [3, 40])
def test_few_and_many_documents_have_a_plane_that_a_seed_repeats(method, n):
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(n, 8, generator=generator), torch.randn(n, 8, generator=generator)
    points = project(*clouds, method, seed=3)
    assert points.shape == (2 * n, 2) and np.isfinite(points).all()
    assert np.array_equal(points, project(*clouds, method, seed=3))


def test_pca_separates_two_clouds_and_keeps_the_memory_means_first():
    generator = torch.Generator().manual_seed(0)
    wide, narrow = torch.randn(9, 8, generator=generator) + 50, 0.01 * torch.randn(9, 8, generator=generator)
    points = project(wide, narrow, "pca", 0)
    assert len({x > 0 for x in points[:9, 0]}) == len({x > 0 for x in points[9:, 0]}) == 1
    assert points[:9].std(0).max() > 10 * points[9:].std(0).max()


def test_documents_are_read_once_each_in_their_order(tmp_path):
    path = tmp_path / "mixed.jsonl"
    records = [{"docs": ["b", "a"], "question": "?"}, {"context": "c"}, {"content": ["a", "d", "e"]}, {"docs": ["e"]}]
    path.write_text("\ufeff" + "\n\n".join(json.dumps(r) for r in records), encoding="utf-8")
    assert read_documents(path, 4000) == ["b", "a", "c", "d", "e"]
    assert read_documents(path, 3) == ["b", "a", "c"]
    assert read_documents(path, 4) == ["b", "a", "c", "d"]
    plain = tmp_path / "plain.txt"
    plain.write_text('second {"docs": 1}\n\n first\nsecond {"docs": 1}\nthird\n', encoding="utf-8")
    assert read_documents(plain, 4000) == ['second {"docs": 1}', "first", "third"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"docs": ["a", "b", "c"]}\n{"question": "?"}', r":2: docs is missing"),
        (b'{"docs": ["a"', r":1: "),
        (b"[1]", r":1: a record must be a JSON object"),
        (b'{"docs": ["a", " "]}', r":1: docs\[1\] must be a non-empty text"),
        (b'{"docs": ["caf\xe9"]}', r":1: 'utf-8' codec can't decode"),
        (b'{"docs": ["a", "b", "a"]}', r"has 2 different documents: at least 3"),
        (b"", r"has 0 different documents: at least 3"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(content, message, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(RecordError, match=f"bad.jsonl ?{message}"):
        read_documents(path, 10)


def test_panels_are_named_by_what_tells_them_apart():
    assert names([Path("/a/with/stage1"), Path("/a/without/stage1")]) == ["with/stage1", "without/stage1"]
    assert names([Path("/a/stage1"), Path("/a/stage2")]) == ["stage1", "stage2"]
    assert names([Path("/a/stage1")]) == names([Path("/a/stage1")] * 2)[:1] == ["stage1"]


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_the_command_measures_and_draws_both_checkpoints(method, checkpoints, documents_file, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--checkpoint", str(checkpoints[0]), "--compare_to", str(checkpoints[1]), "--method", method]
    main([*flags, "--documents", str(documents_file), "--output_dir", str(out)])
    printed = capsys.readouterr().out
    result = json.loads((out / "memory_vs_text.json").read_text(encoding="utf-8"))
    assert sorted(p.name for p in out.iterdir()) == ["memory_vs_text.json", "memory_vs_text.png"]
    assert (out / "memory_vs_text.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert result["documents"] == len(DOCS) and len(result["checkpoints"]) == 2
    for root, figures in zip(checkpoints, result["checkpoints"], strict=True):
        mse = CLaRa.from_pretrained(root).compress_documents(DOCS)[1].item()
        assert figures["mse"] == pytest.approx(mse, rel=1e-5)
        assert figures["training_stage"] == "stage1" and f"{mse:.4f}" in printed
    assert "column 2: without/stage1" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--documents", "nowhere.jsonl"], "nowhere.jsonl does not exist: give --documents"),
        (["--documents", "two.txt"], "two.txt has 2 different documents"),
        (["--documents", "ok.txt", "--max_documents", "2"], "--max_documents must be at least 3"),
        (["--documents", "ok.txt", "--seed", "-1"], "--seed must be"),
        (["--documents", "ok.txt", "--method", "umap"], "invalid choice: 'umap'"),
        (["--documents", "ok.txt", "--compare_to", "nowhere"], "nowhere is no directory"),
        (["--documents", "ok.txt", "--output_dir", "ok.txt"], "give another --output_dir"),
        (["--documents", "ok.txt", "--model_path", "./no"], "give its directory or Hub id with --model_path"),
        ([], "--documents"),
    ],
)
def test_mistakes_are_one_line_before_any_model_loads(flags, message, checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CLaRa, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    Path("two.txt").write_text("one\ntwo\n")
    Path("ok.txt").write_text("one\ntwo\nthree\n")
    with pytest.raises(SystemExit) as stop:
        main(["--checkpoint", str(checkpoints[0]), *flags])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error
    assert error.startswith("visualize_mse: ") and error.count("\n") == 1


def test_a_missing_library_is_named(checkpoints, documents_file, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sklearn" else found(name))
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(checkpoints[0]), "--documents", str(documents_file), "--output_dir", str(tmp_path)])
    assert "scikit-learn is not installed: pip install scikit-learn" in capsys.readouterr().err
