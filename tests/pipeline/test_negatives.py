"""Rankings for hard negatives: by words in both languages, and by embeddings that are computed once."""

import numpy as np
import pytest

from openrlhf.pipeline import negatives
from openrlhf.pipeline.assemble import Options, assemble
from openrlhf.pipeline.negatives import Bm25Ranker, EmbeddingRanker, check_embedding, model_identity, search_words
from openrlhf.pipeline.state import State
from tests.pipeline.collection import chunk, library, synthesized, write
from tests.pipeline.test_assemble import made, read

TEXTS = [
    "The Danube flows through ten countries to the Black Sea.",
    "Christiaan Huygens discovered Titan, the largest moon of Saturn.",
    "多瑙河流经十个国家，注入黑海。",
    "土星的卫星泰坦由惠更斯发现。",
    "!!!",
]


def test_words_are_pairs_where_chinese_is_written():
    assert search_words("The 3 rivers: 多瑙河 flows") == ["the", "3", "rivers", "flows", "多瑙", "瑙河"]


@pytest.mark.parametrize(
    ("question", "first"), [("Into which sea does the Danube flow?", 0), ("Who found Titan?", 1), ("谁发现了泰坦？", 3)]
)
def test_bm25_finds_the_chunk_that_shares_the_words(question, first):
    pytest.importorskip("bm25s")
    ranker = Bm25Ranker(TEXTS, ["nothing", question])
    everywhere = np.ones(len(TEXTS), dtype=bool)
    assert ranker.best(1, everywhere)[0] == first
    assert first not in ranker.best(1, np.arange(len(TEXTS)) != first)
    assert ranker.best(0, everywhere) == []


def test_bm25_of_texts_without_words_finds_nothing():
    pytest.importorskip("bm25s")
    assert Bm25Ranker(["!!!", "…"], ["Who?"]).best(0, np.ones(2, dtype=bool)) == []


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> str:
    """A tiny model of sentence-transformers: the mean of random word vectors."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("embedder")
    words = sorted({word for text in TEXTS for word in text.lower().split()})
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", "[PAD]", *words])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    fast.save_pretrained(folder / "bert")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(fast), **sizes)).save_pretrained(folder / "bert")
    parts = [models.Transformer(str(folder / "bert")), models.Pooling(16)]
    library.SentenceTransformer(modules=parts, device="cpu").save_pretrained(str(folder / "model"))
    return str(folder / "model")


def test_embeddings_are_computed_once_and_again_only_where_a_document_changed(embedder, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer

    encoded: list[list[str]] = []

    def counted(plain):
        def encode(self, texts, **settings):
            encoded.append(list(texts))
            return plain(self, texts, **settings)

        return encode

    for name in ("encode_query", "encode_document"):
        monkeypatch.setattr(SentenceTransformer, name, counted(getattr(SentenceTransformer, name)))

    def ranker(texts):
        sources = ["a", "a", "b", "b", "c"]
        with State(tmp_path / "state.sqlite") as state:
            return EmbeddingRanker(texts, sources, ["Who?", "Where?"], ["a", "b"], embedder, state)

    first = ranker(TEXTS)
    assert encoded == [TEXTS[:2], TEXTS[2:4], TEXTS[4:], ["Who?"], ["Where?"]]
    encoded.clear()
    again = ranker(TEXTS)
    assert not encoded and all((first.scores_N(i) == again.scores_N(i)).all() for i in (0, 1))
    changed = ranker([*TEXTS[:3], "Another text", TEXTS[4]])
    assert encoded == [[TEXTS[2], "Another text"]]
    assert (changed.scores_N(0)[[0, 1, 4]] == first.scores_N(0)[[0, 1, 4]]).all()


def test_embeddings_have_length_one_and_rank_by_cosine(embedder, tmp_path):
    from sentence_transformers import SentenceTransformer

    with State(tmp_path / "state.sqlite") as state:
        ranker = EmbeddingRanker(TEXTS, ["a"] * 5, [TEXTS[1]], ["a"], embedder, state)
    model = SentenceTransformer(embedder, device="cpu")
    rows = model.encode([*TEXTS, TEXTS[1]], normalize_embeddings=True)
    assert np.allclose(ranker.scores_N(0), rows[:5] @ rows[5], atol=1e-5)
    assert ranker.best(0, np.ones(5, dtype=bool))[0] == 1


def test_both_rankings_fill_the_pools_in_turn(embedder, tmp_path):
    folder = write(tmp_path, *library(10))
    with State(tmp_path / "state.sqlite") as state:
        outcome = assemble(folder, folder, Options(embedding_model=embedder), state)
        files = made(folder)
        assert assemble(folder, folder, Options(embedding_model=embedder), state).done_before
    assert not any("BM25 only" in note for note in outcome.notes)
    report = (folder / "quality_report.md").read_text()
    by = {
        how: int(report.split(f"| negatives by {how} | ")[1].split(" ")[0].replace(",", ""))
        for how in ("BM25", "embedding")
    }
    assert by["BM25"] > 0.3 * sum(by.values()) and by["embedding"] > 0.3 * sum(by.values())
    assert str(embedder) not in report
    with State(tmp_path / "state.sqlite") as state:
        assemble(folder, folder, Options(embedding_model=None), state)
    assert made(folder)["end_to_end_data.jsonl"] != files["end_to_end_data.jsonl"]


def test_where_no_ranking_helps_the_pool_is_filled_from_the_golds_likes_and_at_random(tmp_path):
    chunks = [chunk(f"{i}.txt", 0, f"Alpha beta number{i} gamma delta item{i}") for i in range(3)]
    chunks += [chunk(f"z{i}.txt", 0, f"Entirely else{i} otherwise{i} apart{i} away{i}") for i in range(30)]
    folder = write(tmp_path, chunks, [synthesized(chunks[0], [("谁？", "qqqq")])])
    with State(tmp_path / "state.sqlite") as state:
        assemble(folder, folder, Options(eval_share=0), state)
    (record,) = read(folder / "end_to_end_data.jsonl")
    likes = {chunks[1]["text"], chunks[2]["text"]}
    assert len(record["docs"]) == 20 and likes <= set(record["docs"])


def test_another_model_is_another_identity(embedder, tmp_path):
    import shutil

    copy = shutil.copytree(embedder, tmp_path / "copy")
    assert model_identity(str(copy)) == model_identity(embedder)
    weights = next(copy.rglob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_identity(str(copy)) != model_identity(embedder)
    assert model_identity("organisation/name") == "organisation/name"


def test_what_cannot_embed_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no modules.json"):
        check_embedding(str(tmp_path))
    monkeypatch.setattr(negatives.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        check_embedding("organisation/name")
    with pytest.raises(ValueError, match="pip install bm25s"):
        negatives.check_bm25()
    assert negatives.packaged_model() is None


def test_a_hub_model_that_cannot_be_had_is_one_sentence(tmp_path):
    pytest.importorskip("sentence_transformers")
    with (
        State(tmp_path / "state.sqlite") as state,
        pytest.raises(ValueError, match="no-such-org/no-such-model cannot be loaded"),
    ):
        EmbeddingRanker(TEXTS, ["a"] * 5, ["Who?"], ["a"], "no-such-org/no-such-model", state)
