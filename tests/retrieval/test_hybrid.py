"""BM25 over a store scores as the evaluation does; fused candidates keep their order and carry both scores."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from evaluation import rankers
from openrlhf.retrieval import hybrid
from openrlhf.retrieval.binding import read_index, write_index
from openrlhf.retrieval.hybrid import Bm25Index, Candidate, fuse, hybrid_candidates, words
from openrlhf.retrieval.search import TwoStepIndex, exact_search, score_rows
from openrlhf.retrieval.store import Document, Store
from tests.retrieval.stores import key_of, new_store
from tests.tiny import DOCS, QUESTIONS

bm25s = pytest.importorskip("bm25s")

L, D = 2, 8
CHINESE = ["居里夫人出生于华沙", "多瑙河流经十个国家", "企鹅不会飞,但很会游泳", "小提琴有四根弦"]
TEXTS = [f"{doc} {more}".strip() for more in ("", "Read more about rivers.", "The Danube again.") for doc in DOCS]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path / "store", normal(len(TEXTS), L, D), TEXTS) as made:
        yield made


@pytest.fixture
def bm25(store, tmp_path):
    return Bm25Index.build(store, tmp_path / "index")


def test_scores_are_those_of_the_evaluation(bm25):
    assert (hybrid.BM25["k1"], hybrid.BM25["b"]) == (rankers.BM25_K1, rankers.BM25_B)
    expected = rankers.bm25_scores(QUESTIONS, [TEXTS] * len(QUESTIONS))
    for question, of_all in zip(QUESTIONS, expected, strict=True):
        assert max(of_all) > 0
        torch.testing.assert_close(bm25.scores(question), torch.tensor(of_all))
        scores, rows = bm25.search(question, 5)
        order = [row for row in rankers.ranking(of_all) if of_all[row] > 0][:5]
        assert rows.tolist() == order and scores.tolist() == pytest.approx([of_all[row] for row in order])


def test_words_are_those_of_bm25s_where_words_have_spaces():
    for text in (*TEXTS, "It's 3.5 km_h, naïve ½ I a Ü", "Привет мир 한국어 문서"):
        plain = bm25s.tokenize([text], stopwords=None, return_ids=False, show_progress=False)[0]
        ours = words(text)
        unspaced = [word for word in plain if word not in ours]
        assert unspaced in ([], ["東京"]) and all(word in plain for word in ours if word != "東京")
    assert words("東京 Tower") == ["東京", "tower"]
    assert words("居里夫人1867年生于Warsaw") == ["居里", "里夫", "夫人", "1867", "年生", "生于", "warsaw"]
    assert words("人") == ["人"] and words("") == []


@pytest.mark.parametrize(
    ("question", "row"), [("居里夫人在哪里出生?", 0), ("哪条河流经十个国家", 1), ("企鹅会飞吗", 2)]
)
def test_chinese_texts_are_found(tmp_path, question, row):
    with new_store(tmp_path / "chinese", normal(4, L, D), CHINESE) as store:
        assert Bm25Index.build(store, tmp_path / "index").search(question, 4)[1].tolist()[0] == row


def test_rows_that_share_no_word_are_no_candidates(bm25):
    assert len(bm25.search("Quantum chromodynamics?", 5)[1]) == 0
    assert len(bm25.search("the of and", 5)[1]) == 0 and len(bm25.search("", 5)[1]) == 0
    assert len(bm25.search("violin", 10)[1]) == 3, "fewer than asked for"
    with pytest.raises(ValueError, match="k must be at least 1"):
        bm25.search("violin", 0)


def test_equal_scores_go_to_the_smaller_row(tmp_path):
    with new_store(tmp_path / "same", normal(9, L, D), ["violin strings"] * 5 + ["penguin"] * 4) as store:
        assert Bm25Index.build(store, tmp_path / "index").search("a violin", 3)[1].tolist() == [0, 1, 2]


def test_an_index_comes_back_from_the_disk_as_it_was(store, bm25, tmp_path):
    opened = Bm25Index.open(store, tmp_path / "index")
    for question in QUESTIONS:
        assert torch.equal(opened.scores(question), bm25.scores(question))
        assert torch.equal(opened.search(question, 3)[1], bm25.search(question, 3)[1])


def test_titles_are_read_and_documents_of_one_vector_are_one_row(store, bm25, tmp_path):
    store.add([Document("titled", "Of nothing.", "Zeppelin")], [key_of("d3")], {})
    again = Bm25Index.build(store, tmp_path / "index")
    assert again.search("zeppelin", 3)[1].tolist() == [3] and len(again.rows_R) == len(TEXTS)
    best = max(again.scores("penguins zeppelin")[[3]].tolist())
    assert best == pytest.approx(max(again.scores("penguins")[3].item(), again.scores("zeppelin")[3].item()))


def test_deleted_rows_never_come_back(store, bm25, tmp_path):
    question = "violin"
    assert bm25.search(question, 3)[1].tolist() == [2, 14, 8]
    store.delete(["d2"])
    assert bm25.search(question, 2)[1].tolist() == [14, 8], "deleted after the index was opened"
    store.delete(["d8"])
    opened = Bm25Index.open(store, tmp_path / "index")
    assert opened.search(question, 2)[1].tolist() == [14]
    found = hybrid_candidates(store, bm25, question, normal(L * D), 20, 20)
    assert {2, 8}.isdisjoint(candidate.row for candidate in found)


def test_an_index_that_does_not_belong_to_the_store_is_refused(store, bm25, tmp_path, caplog):
    index = tmp_path / "index"
    with (
        new_store(tmp_path / "b", normal(18, L, D, seed=9), TEXTS) as other,
        pytest.raises(ValueError, match="another"),
    ):
        Bm25Index.open(other, index)
    store.add([Document("new", "A zeppelin.")], [key_of("new")], {key_of("new"): normal(L, D, seed=11)})
    with pytest.raises(ValueError, match="1 rows were added .* build the bm25 index again"):
        Bm25Index.open(store, index)
    with caplog.at_level("INFO"):
        bm25.refresh()
    assert "BM25 lacks 1 of 19 rows" in caplog.text
    found = hybrid_candidates(store, bm25, "zeppelin", store.vectors([18]).float().flatten(), 1, 5)
    assert found == [Candidate(18, pytest.approx(1), 0.0)], "its vector finds it all the same"
    Bm25Index.build(store, index)
    assert Bm25Index.open(store, index).search("zeppelin", 1)[1].tolist() == [18]
    with pytest.raises(FileNotFoundError, match="build it first"):
        Bm25Index.open(store, tmp_path / "nothing")


def test_rows_are_listed_again_only_after_a_commit(store, bm25, tmp_path, monkeypatch):
    """A store of 10⁶ documents is not to be listed at every question, and no change is to be missed."""
    pytest.importorskip("faiss")
    nearest = TwoStepIndex.build(store, tmp_path / "index")
    listed, rows = [], Store.rows
    monkeypatch.setattr(Store, "rows", lambda self: listed.append(self) or rows(self))
    for index in (bm25, nearest):
        index.refresh()
    assert listed == []
    store.delete(["d2"])
    for index in (bm25, nearest):
        index.refresh()
        index.refresh()
    assert len(listed) == 2 and not bm25._live_R[2] and not nearest._live_R[2]
    with Store.open(store.path) as reader:  # another connection sees what this one commits
        opened = Bm25Index.open(reader, tmp_path / "index")
        listed.clear()
        opened.refresh()
        assert listed == []
        store.delete(["d8"])
        opened.refresh()
        assert listed == [reader] and not opened._live_R[8]
        key = key_of("new")
        store.add([Document("new", "A zeppelin.")], [key], {key: normal(L, D, seed=11)})
        opened.refresh()
        assert opened.n_missing == 1 and len(listed) == 2


def test_two_that_write_an_index_at_once_take_turns(store, tmp_path):
    """Each clears away what others left: one that went on beside another would lose its files."""
    folder, rows, order = tmp_path / "index", store.rows(), []

    def second():
        write_index(folder, "some", {"by": 2}, store, rows, lambda parts: order.append("second"))

    other = threading.Thread(target=second, daemon=True)

    def first(parts):
        other.start()
        other.join(1)  # with its turn it would be done by then
        (parts / "file").write_text("whole")
        order.append("first")

    write_index(folder, "some", {"by": 1}, store, rows, first)
    other.join(60)
    assert order == ["first", "second"] and read_index(folder, "some", store)[0]["by"] == 2
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


KILLED = """
import os, signal, sys
from openrlhf.retrieval import binding
from openrlhf.retrieval.hybrid import Bm25Index
from openrlhf.retrieval.store import Store
binding.write_whole = lambda path, text: os.kill(os.getpid(), signal.SIGKILL)
Bm25Index.build(Store.open(sys.argv[1]), sys.argv[2])
"""


def test_a_killed_build_and_damaged_files_are_told_apart(store, bm25, tmp_path):
    folder = tmp_path / "index"
    command = [sys.executable, "-c", KILLED, str(store.path), str(folder)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 2
    assert torch.equal(Bm25Index.open(store, folder).scores("violin"), bm25.scores("violin"))
    Bm25Index.build(store, folder)
    (parts,) = [path for path in folder.iterdir() if path.is_dir()]
    for name in ("rows.npy", "data.csc.index.npy", "vocab.index.json"):
        whole = (parts / name).read_bytes()
        (parts / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged"):
            Bm25Index.open(store, folder)
        (parts / name).write_bytes(whole)
    (parts / name).unlink()
    with pytest.raises(ValueError, match="damaged"):
        Bm25Index.open(store, folder)


def test_a_store_without_words_has_an_index(tmp_path):
    for name, texts in (("none", []), ("stop", ["the", "", "!"])):
        with new_store(tmp_path / name, normal(len(texts), L, D), texts) as store:
            Bm25Index.build(store, tmp_path / f"{name}.index")
            index = Bm25Index.open(store, tmp_path / f"{name}.index")
            assert len(index.search("the violin", 3)[1]) == 0 and len(index.scores("violin")) == len(texts)
            found = hybrid_candidates(store, index, "violin", normal(L * D), 2, 2)
            assert len(found) == min(2, len(texts))


def test_bm25_without_its_library_says_what_to_install(store, bm25, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    for make in (Bm25Index.build, Bm25Index.open):
        with pytest.raises(ValueError, match="pip install bm25s"):
            make(store, tmp_path / "index")


def test_union_keeps_the_order_without_duplicates():
    assert fuse([[5, 3, 9], [3, 7, 5, 1]]) == [5, 3, 9, 7, 1]
    assert fuse([[5, 3, 9], [3, 7]], limit=2) == [5, 3] and fuse([[], [4, 4, 2]]) == [4, 2] and fuse([]) == []


def test_rrf_sums_reciprocal_ranks_and_orders_equal_sums_by_number():
    sparse, dense = [5, 3, 9], [3, 7, 5, 1]
    sums = {5: 1 / 61 + 1 / 63, 3: 1 / 62 + 1 / 61, 9: 1 / 63, 7: 1 / 62, 1: 1 / 64}
    assert fuse([sparse, dense], "rrf") == sorted(sums, key=sums.__getitem__, reverse=True) == [3, 5, 7, 9, 1]
    assert hybrid.RRF_K == 60 and fuse([[1, 7, 9], [8, 6, 9]], "rrf", 1) == [9], "twice third beats once first"
    assert fuse([[8, 2], [2, 8]], "rrf") == [2, 8] and fuse([[8, 2], [6, 4]], "rrf", 3) == [6, 8, 2]
    assert fuse([[1] * 5 + [2], [2]], "rrf") == [2, 1], "a duplicate counts once"
    assert fuse([list(range(100)), list(range(99, -1, -1))], "rrf")[:4] == [0, 99, 1, 98]
    with pytest.raises(ValueError, match="union, rrf"):
        fuse([[1]], "sum")


def test_candidates_are_the_words_list_then_the_nearest_with_both_scores(store, bm25):
    question, query_E = QUESTIONS[1], normal(L * D, seed=4)
    wordy = bm25.search(question, 4)[1].tolist()
    near = exact_search(store, query_E.unsqueeze(0), 3)[1][0].tolist()
    found = hybrid_candidates(store, bm25, question, query_E, 3, 4)
    assert [candidate.row for candidate in found] == list(dict.fromkeys(wordy + near))
    rows = [candidate.row for candidate in found]
    assert [candidate.dense for candidate in found] == score_rows(store, query_E.unsqueeze(0), rows)[0].tolist()
    assert [candidate.sparse for candidate in found] == bm25.scores(question)[rows].tolist()
    fused = hybrid_candidates(store, bm25, question, query_E, 3, 4, fusion="rrf", limit=5)
    assert [candidate.row for candidate in fused] == fuse([wordy, near], "rrf", 5)
    assert [c.row for c in hybrid_candidates(store, bm25, question, query_E, 0, 4)] == wordy
    assert [c.row for c in hybrid_candidates(store, bm25, question, query_E, 3, 0)] == near
    assert hybrid_candidates(store, bm25, question, query_E, 0, 0) == []
    default = [c.row for c in hybrid_candidates(store, bm25, question, query_E)]
    near = exact_search(store, query_E.unsqueeze(0), 12)[1][0].tolist()
    assert default == fuse([bm25.search(question, 25)[1].tolist(), near])


def test_the_nearest_may_come_from_a_two_step_index(store, bm25, tmp_path):
    pytest.importorskip("faiss")
    index, query_E = TwoStepIndex.build(store, tmp_path / "index"), normal(L * D, seed=4)
    exact = hybrid_candidates(store, bm25, QUESTIONS[0], query_E, 5, 5)
    assert hybrid_candidates(store, bm25, QUESTIONS[0], query_E, 5, 5, index=index) == exact
    store.delete([f"d{candidate.row}" for candidate in exact[:-1]])
    again = hybrid_candidates(store, bm25, QUESTIONS[0], query_E, 5, 5, index=index)
    assert again == hybrid_candidates(store, bm25, QUESTIONS[0], query_E, 5, 5) and again[0].row != exact[0].row


def test_wrong_numbers_are_refused_in_words(store, bm25):
    for wrong in ({"dense_top_k": -1}, {"sparse_top_k": -1}, {"fusion": "sum"}):
        with pytest.raises(ValueError, match="must not be negative"):
            hybrid_candidates(store, bm25, "violin", normal(L * D), **wrong)
    with pytest.raises(ValueError, match="encode them with the checkpoint"):
        hybrid_candidates(store, bm25, "violin", normal(L * D + 1))
