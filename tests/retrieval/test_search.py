"""Exact search is a plain cosine over everything; two-step search finds nearly the same, and never what is deleted."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openrlhf.retrieval import search
from openrlhf.retrieval.search import (
    TwoStepIndex,
    default_factory,
    exact_search,
    measure_recall,
    principal_components,
    score_rows,
)
from tests.retrieval.stores import fill, new_store, plain_search

L, D = 3, 16
ROW = 2 * L * D
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clustered(number: int, clusters: int = 20, seed: int = 0) -> torch.Tensor:
    """Documents around a few centres, all of them around a common part, as compressors give them."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * normal(1, L, D, seed=7) + normal(clusters, L, D, seed=8)
    which = torch.randint(clusters, (number,), generator=generator)
    return centres[which] + 0.3 * torch.randn(number, L, D, generator=generator)


@pytest.fixture
def store(tmp_path):
    """300 random documents, a tenth of them deleted."""
    made = new_store(tmp_path / "store", normal(300, L, D))
    made.delete([f"d{i}" for i in range(0, 300, 10)])
    with made:
        yield made


def equal(found: tuple, expected: tuple) -> None:
    assert found[1].tolist() == expected[1]
    torch.testing.assert_close(found[0], torch.tensor(expected[0]), rtol=0, atol=1e-7)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 7, 64, 1000])
def test_the_best_are_those_of_a_plain_cosine_over_all_live_rows(store, rows, device):
    queries = normal(5, L * D, seed=1)
    for k in (1, 10, 100):
        found = exact_search(store, queries, k, device, block_bytes=rows * ROW)
        assert found[1].shape == (5, k)
        equal(found, plain_search(store, queries, k))


def test_nearly_equal_documents_are_ordered_by_their_exact_scores(tmp_path):
    """Each document differs from the first in the last bit of one number, less than float32 products can tell."""
    docs = normal(1, 16, 64).to(torch.bfloat16).repeat(600, 1, 1)
    bits = docs.flatten(1).view(torch.int16)
    bits[torch.arange(1, 600), torch.randperm(1024, generator=torch.Generator().manual_seed(0))[1:600]] += 1
    queries = docs[:2].flatten(1).float() + normal(2, 1024, seed=1)
    with new_store(tmp_path / "store", docs) as store:
        expected = plain_search(store, queries, 50)
        assert 10 < len(set(expected[0][0])) < 50, "some differ in the last digits, some not at all"
        for rows in (1, 100, 600):
            equal(exact_search(store, queries, 50, block_bytes=rows * 2048), expected)


def test_equal_scores_go_to_the_smaller_row_whatever_the_blocks(tmp_path):
    docs = normal(3, L, D)[[0, 1, 0, 2, 0] * 40]
    query = docs[:1].flatten(1) + 0.1
    with new_store(tmp_path / "store", docs) as store:
        store.delete(["d0", "d4"])
        for rows in (1, 3, 64, 200):
            scores, found = exact_search(store, query, 9, block_bytes=rows * ROW)
            assert found.tolist() == [[2, 5, 7, 9, 10, 12, 14, 15, 17]]
            assert len(set(scores[0].tolist())) == 1


def test_a_result_depends_on_no_other_query_and_not_on_the_blocks(store):
    queries = normal(40, L * D, seed=2)
    together = exact_search(store, queries, 20)
    for b in range(40):
        for rows in (13, 500):
            alone = exact_search(store, queries[b : b + 1], 20, block_bytes=rows * ROW)
            assert torch.equal(alone[0][0], together[0][b]) and torch.equal(alone[1][0], together[1][b])


def test_scores_do_not_depend_on_the_length_of_the_query_or_the_document(tmp_path):
    docs, query = normal(20, L, D), normal(1, L * D, seed=1)
    lengths = 2.0 ** torch.arange(-10, 10).view(20, 1, 1)
    with new_store(tmp_path / "a", docs) as a, new_store(tmp_path / "b", docs * lengths) as b:
        assert torch.equal(exact_search(a, query, 20)[1], exact_search(b, 1024 * query, 20)[1])


def test_fewer_rows_than_k_give_fewer_columns(store, tmp_path):
    scores, rows = exact_search(store, normal(2, L * D), 10**15)  # which no memory holds
    assert scores.shape == rows.shape == (2, 270) and rows.sort(1).values.tolist() == [store.rows().tolist()] * 2
    assert scores.dtype == torch.float32 and rows.dtype == torch.int64
    with new_store(tmp_path / "empty", torch.empty(0, L, D)) as empty:
        assert [tuple(part.shape) for part in exact_search(empty, normal(2, L * D), 5)] == [(2, 0)] * 2


def test_zeros_score_zero(tmp_path):
    docs = torch.cat([normal(2, L, D), torch.zeros(1, L, D)])
    with new_store(tmp_path / "store", docs) as store:
        query = docs[0].flatten() - docs[1].flatten()
        scores, rows = exact_search(store, torch.stack([query, torch.zeros(L * D)]), 3)
        assert rows.tolist() == [[0, 2, 1], [0, 1, 2]] and scores[0, 1] == 0 and scores[1].tolist() == [0, 0, 0]


class Watch(TorchDispatchMode):
    """Remembers the size of the largest float32 or float64 tensor that was made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype in (torch.float32, torch.float64):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_many_queries_cost_one_pass_and_no_more_memory_than_a_block(tmp_path, monkeypatch):
    read: list[int] = []
    with new_store(tmp_path / "store", normal(6000, L, D), rows_per_shard=8192) as store:
        blocks = store.blocks
        monkeypatch.setattr(store, "blocks", lambda n: (read.append(len(part[0])) or part for part in blocks(n)))
        with Watch() as watch:
            exact_search(store, normal(32, L * D), 5, block_bytes=200 * ROW)
    assert sum(read) == 6000 and max(read) == 200
    assert 0 < watch.largest <= 4 * 200 * ROW, "a store in float32 would be 60 blocks of bfloat16"


def test_what_cannot_be_searched_is_refused_in_words(store, tmp_path):
    query = normal(1, L * D)
    for wrong in (normal(1, L * D + 1), query[0]):
        with pytest.raises(ValueError, match="encode them with the checkpoint"):
            exact_search(store, wrong, 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        exact_search(store, query, 0)
    with pytest.raises(ValueError, match="block_bytes"):
        exact_search(store, query, 1, block_bytes=0)
    with pytest.raises(ValueError, match="a query holds NaN"):
        exact_search(store, query * float("nan"), 1)
    docs = normal(4, L, D)
    docs[2, 0, 0] = float("nan")
    with new_store(tmp_path / "bad", docs) as bad, pytest.raises(ValueError, match="row 2 .* NaN"):
        exact_search(bad, query, 1)


def test_products_that_are_not_float32_are_noticed(store, monkeypatch):
    products = search.Tiles.__call__
    monkeypatch.setattr(search.Tiles, "__call__", lambda self, docs: products(self, docs).bfloat16().float())
    with pytest.raises(RuntimeError, match="set_float32_matmul_precision"):
        exact_search(store, normal(4, L * D), 10)


def test_given_rows_are_scored_as_the_search_scores_them(store):
    queries = normal(3, L * D)
    scores, rows = exact_search(store, queries, 30)
    for b in range(3):
        assert torch.equal(score_rows(store, queries, rows[b].tolist())[b], scores[b])
    assert score_rows(store, queries, []).shape == (3, 0)


@pytest.fixture
def faiss():
    return pytest.importorskip("faiss")


@pytest.fixture
def groups(tmp_path, faiss):
    """2,000 clustered documents."""
    with new_store(tmp_path / "store", clustered(2000)) as made:
        yield made


QUERIES = clustered(50, seed=1).flatten(1)


def test_with_all_rows_as_candidates_two_steps_are_the_exact_search(groups, tmp_path):
    index = TwoStepIndex.build(groups, tmp_path / "index")
    assert index.factory == "Flat"
    equal(index.search(QUERIES, 10, candidates=2000), plain_search(groups, QUERIES, 10))
    equal(index.search(QUERIES, 10, candidates=10**15), plain_search(groups, QUERIES, 10))  # which no memory holds
    assert index.search(QUERIES, 10**15)[1].shape == (len(QUERIES), groups.n_rows())
    assert measure_recall(groups, index, QUERIES, 10, candidates=2000) == 1


@pytest.mark.parametrize("factory", ["Flat", "IVF32,SQ8", "IVF32,PQ8x4", "HNSW16"])
def test_clustered_documents_are_found_with_exact_scores(groups, tmp_path, factory):
    TwoStepIndex.build(groups, tmp_path / "index", factory)
    index = TwoStepIndex.open(groups, tmp_path / "index")
    assert index.factory == factory and measure_recall(groups, index, QUERIES, 10) > 0.95
    scores, rows = index.search(QUERIES, 10)
    for b in range(len(QUERIES)):
        assert torch.equal(score_rows(groups, QUERIES, rows[b].tolist())[b], scores[b])
    alone = index.search(QUERIES[3:4], 10)
    assert torch.equal(alone[0][0], scores[3]) and torch.equal(alone[1][0], rows[3])


def test_recall_is_the_part_of_the_exact_best_that_is_found(store, tmp_path, faiss):
    index, queries = TwoStepIndex.build(store, tmp_path / "index", "LSH"), normal(30, L * D, seed=1)
    found, exact = index.search(queries, 20, 30)[1].tolist(), exact_search(store, queries, 20)[1].tolist()
    parts = [len(set(a) & set(b)) / 20 for a, b in zip(found, exact, strict=True)]
    recall = measure_recall(store, index, queries, 20, 30)
    assert recall == pytest.approx(sum(parts) / len(parts)) and 0.1 < recall < 0.9


def test_the_projection_keeps_what_tells_documents_apart(tmp_path, faiss):
    """Documents that vary in 40 directions only, around a common part of five times their length."""
    common, directions = 5 * normal(1, 8, 64), normal(40, 8 * 64, seed=1)
    docs = common + (normal(1500, 40, seed=2) @ directions).view(1500, 8, 64) / 40**0.5
    queries = (common + (normal(20, 40, seed=3) @ directions).view(20, 8, 64) / 40**0.5).flatten(1)
    with new_store(tmp_path / "store", docs) as store:
        index = TwoStepIndex.build(store, tmp_path / "index")
        assert measure_recall(store, index, queries, 10, candidates=12) > 0.95
        basis_EP = principal_components(store, store.rows())
        torch.testing.assert_close(basis_EP.T @ basis_EP, torch.eye(basis_EP.shape[1]), rtol=0, atol=5e-3)
        unit_NE = torch.nn.functional.normalize(store.vectors(store.rows()).flatten(1).float())
        projected_NP = unit_NE @ basis_EP
        spread = unit_NE.var(0).sum(), projected_NP[:, :40].var(0).sum()
        assert spread[1] > 0.99 * spread[0], "40 directions hold nearly everything"


def test_rows_added_later_are_found_and_deleted_ones_are_not(groups, tmp_path):
    index = TwoStepIndex.build(groups, tmp_path / "index", "IVF32,SQ8")
    fill(groups, clustered(150, seed=5), first=2000)
    best = index.search(QUERIES, 5)[1]
    groups.delete([f"d{row}" for row in best.flatten().tolist()])
    assert not torch.isin(index.search(QUERIES, 5)[1], best).any(), "deleted after the index was opened"
    for again in (index, TwoStepIndex.open(groups, tmp_path / "index")):
        again.refresh()
        assert again.tail_T.tolist() == list(range(2000, 2150))
        assert measure_recall(groups, again, QUERIES, 5) > 0.95
    found = again.search(clustered(150, seed=5).flatten(1), 1)[1].flatten()
    assert found.tolist() == list(range(2000, 2150)), "new rows are found by their own vectors"


def test_an_index_outlives_the_compaction_of_its_store(groups, tmp_path, caplog):
    index = TwoStepIndex.build(groups, tmp_path / "index")
    groups.delete([f"d{i}" for i in range(0, 2000, 3)])
    groups.compact()
    index.refresh()
    assert "build it again" in caplog.text
    equal(index.search(QUERIES, 5), plain_search(groups, QUERIES, 5))
    index = TwoStepIndex.build(groups, tmp_path / "index")
    assert not len(index.tail_T) and measure_recall(groups, index, QUERIES, 5) > 0.95


def test_an_index_whose_rows_are_mostly_deleted_still_finds_k(groups, tmp_path):
    for factory in ("Flat", "IVF32,Flat"):
        index = TwoStepIndex.build(groups, tmp_path / factory, factory)
        index.search(QUERIES, 5)
    groups.delete([f"d{i}" for i in range(2000) if i % 50])
    for factory in ("Flat", "IVF32,Flat"):
        index = TwoStepIndex.open(groups, tmp_path / factory)
        equal(index.search(QUERIES, 40, 40), plain_search(groups, QUERIES, 40))
        assert index.search(QUERIES, 100)[1].shape == (50, 40)


def test_a_query_that_the_index_finds_too_little_for_changes_no_other(groups, tmp_path):
    """Deleting nearly all of some clusters leaves their queries short in the lists that are looked into."""
    TwoStepIndex.build(groups, tmp_path / "index", "IVF64,Flat")
    near = exact_search(groups, QUERIES[:1], 400)[1][0].tolist()
    groups.delete([f"d{row}" for row in near])
    index = TwoStepIndex.open(groups, tmp_path / "index")
    together = index.search(QUERIES, 100, 100)
    assert (together[1] >= 0).all()
    for b in range(10):
        alone = index.search(QUERIES[b : b + 1], 100, 100)
        assert torch.equal(alone[1][0], together[1][b]) and torch.equal(alone[0][0], together[0][b])


def test_the_index_of_another_store_is_refused(groups, tmp_path):
    TwoStepIndex.build(groups, tmp_path / "index")
    with (
        new_store(tmp_path / "anew", clustered(2000, seed=9)) as other,
        pytest.raises(ValueError, match="another store"),
    ):
        TwoStepIndex.open(other, tmp_path / "index")
    with (
        new_store(tmp_path / "b", clustered(2000), model="b") as other,
        pytest.raises(ValueError, match="another store"),
    ):
        TwoStepIndex.open(other, tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="build it first"):
        TwoStepIndex.open(groups, tmp_path / "nothing")


def test_a_full_disk_leaves_the_index_that_was_there(groups, tmp_path, faiss, monkeypatch):
    TwoStepIndex.build(groups, tmp_path / "index", "Flat")
    before = sorted(path.name for path in (tmp_path / "index").iterdir())

    def full(index, path):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(faiss, "write_index", full)
    with pytest.raises(OSError, match="No space"):
        TwoStepIndex.build(groups, tmp_path / "index", "HNSW16")
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == before
    assert TwoStepIndex.open(groups, tmp_path / "index").factory == "Flat"


KILLED = """
import os, signal, sys
from openrlhf.retrieval import binding
from openrlhf.retrieval.search import TwoStepIndex
from openrlhf.retrieval.store import Store
binding.write_whole = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
TwoStepIndex.build(Store.open(sys.argv[1]), sys.argv[2], "HNSW16")
"""


def test_a_killed_build_leaves_the_index_that_was_there(groups, tmp_path):
    folder = tmp_path / "index"
    TwoStepIndex.build(groups, folder, "Flat")
    command = [sys.executable, "-c", KILLED, str(groups.path), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2, "what the killed build had written is there"
    assert TwoStepIndex.open(groups, folder).factory == "Flat"
    TwoStepIndex.build(groups, folder, "HNSW16")
    (_,) = (path for path in folder.iterdir() if path.is_dir())
    assert TwoStepIndex.open(groups, folder).factory == "HNSW16"


def test_a_damaged_index_is_named(groups, tmp_path):
    folder = tmp_path / "index"
    TwoStepIndex.build(groups, folder)
    header = json.loads((folder / "two_step.json").read_text())
    parts = folder / header["parts"]
    for name in ("projected.faiss", "projection.safetensors"):
        whole = (parts / name).read_bytes()
        for kept in (len(whole) // 2, 3):
            (parts / name).write_bytes(whole[:kept])
            with pytest.raises(ValueError, match="damaged"):
                TwoStepIndex.open(groups, folder)
        (parts / name).write_bytes(whole)
    for text in ("{", "[]", "{}"):
        (folder / "two_step.json").write_text(text)
        with pytest.raises(ValueError, match="build the index again"):
            TwoStepIndex.open(groups, folder)


def test_what_cannot_be_built_is_refused_in_words(groups, tmp_path, monkeypatch):
    for factory in ("Nonsense", "IVF4000,Flat"):
        with pytest.raises(ValueError, match=f"cannot make '{factory}' of 2000 rows"):
            TwoStepIndex.build(groups, tmp_path / "index", factory)
    with new_store(tmp_path / "empty", torch.empty(0, L, D)) as empty, pytest.raises(ValueError, match="no documents"):
        TwoStepIndex.build(empty, tmp_path / "index")
    with pytest.raises(ValueError, match="ask for at least 10"):
        TwoStepIndex.build(groups, tmp_path / "index").search(QUERIES, 10, candidates=5)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for make in (TwoStepIndex.build, TwoStepIndex.open):
        with pytest.raises(ValueError, match="pip install faiss-cpu"):
            make(groups, tmp_path / "index")


def test_a_store_of_one_document_has_an_index(tmp_path, faiss):
    with new_store(tmp_path / "store", normal(1, L, D)) as store:
        index = TwoStepIndex.build(store, tmp_path / "index")
        assert index.search(QUERIES, 3)[1].tolist() == [[0]] * 50


def test_the_index_grows_with_the_corpus(faiss):
    named = [default_factory(n) for n in (1, 19_999, 20_000, 1_000_000, 4_999_999, 5_000_000)]
    assert named == ["Flat", "Flat", "IVF256,SQ8", "IVF2048,SQ8", "IVF4096,SQ8", "IVF4096,PQ64"]
    for name in named:
        assert faiss.index_factory(256, name).d == 256
