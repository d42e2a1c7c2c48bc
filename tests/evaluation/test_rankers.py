"""evaluation/rankers.py: against plain formulas and loops, with tiny random models; and what it refuses."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation.rankers import (
    bm25_scores,
    check_ranker,
    cross_encoder_scores,
    dense_scores,
    random_scores,
    ranking,
)

QUESTIONS = ["Which river crosses ten countries?", "Where was Marie Curie born?", "zzz qqq"]
POOLS = [
    [
        "The Danube is a river. It crosses ten countries, ten!",
        "A violin has four strings.",
        "The river Rhine crosses six countries and many a border.",
        "A violin has four strings.",
    ],
    ["Marie Curie was born in Warsaw.", "Warsaw is a city on a river.", "多瑙河流经十个国家 — 😀"],
    ["A violin has four strings.", "Canberra is the capital."],
]


def test_ranking_puts_the_best_first_and_the_lower_index_first_among_equals():
    assert ranking([0.5, 2.0, 0.5, -1.0, 2.0]) == [1, 4, 0, 2, 3]
    assert ranking([-math.inf, math.inf, 0.0]) == [1, 2, 0]
    assert ranking([]) == []


def test_a_score_that_is_nan_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        ranking([0.1, math.nan])


def test_random_scores_depend_on_nothing_but_seed_question_and_pool():
    scores = random_scores(QUESTIONS, POOLS, 7)
    assert [len(row) for row in scores] == [4, 3, 2]
    assert random_scores(QUESTIONS[::-1], POOLS[::-1], 7) == scores[::-1]
    assert random_scores(QUESTIONS[1:2], POOLS[1:2], 7) == scores[1:2]
    assert random_scores(QUESTIONS, POOLS, 8) != scores
    assert random_scores(["Which lake?"], POOLS[:1], 7) != scores[:1]
    assert random_scores(QUESTIONS[:1], [POOLS[0][::-1]], 7) != scores[:1]


def test_random_scores_are_the_same_in_another_process():
    code = "import json, sys; from evaluation.rankers import random_scores; "
    code += "print(json.dumps(random_scores(*json.loads(sys.argv[1]))))"
    arguments = [sys.executable, "-c", code, json.dumps([QUESTIONS, POOLS, 7])]
    printed = subprocess.run(
        arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    ).stdout
    assert json.loads(printed) == random_scores(QUESTIONS, POOLS, 7)
    assert random_scores(["q"], [["a"]], 0) == [[0.43924704526067326]]


def test_random_scores_favour_no_place_in_the_pool():
    questions = [f"question {i}" for i in range(400)]
    first = [ranking(row)[0] for row in random_scores(questions, [["a", "b", "c", "d"]] * 400, 0)]
    assert all(70 < first.count(place) < 130 for place in range(4))


def plain_bm25(question, pool, collection, k1=1.5, b=0.75):
    """BM25 in Lucene's form, one term at a time, on the library's tokens."""
    import bm25s

    def words(text):
        return bm25s.tokenize([text], stopwords="english", return_ids=False, show_progress=False)[0]

    lengths = [len(words(text)) for text in collection]
    mean = sum(lengths) / len(lengths)
    scores = []
    for text in pool:
        total = 0.0
        for term in words(question):
            n = sum(term in words(other) for other in collection)
            f = words(text).count(term)
            idf = math.log(1 + (len(collection) - n + 0.5) / (n + 0.5))
            total += idf * f / (f + k1 * (1 - b + b * len(words(text)) / mean))
        scores.append(total)
    return scores


def test_bm25_equals_the_formula_with_the_statistics_of_all_distinct_candidates():
    pytest.importorskip("bm25s")
    collection = sorted({text for pool in POOLS for text in pool})
    questions = ["Which river river crosses ten countries?", *QUESTIONS[1:]]
    for question, pool, scores in zip(questions, POOLS, bm25_scores(questions, POOLS), strict=True):
        assert scores == pytest.approx(plain_bm25(question, pool, collection), abs=1e-5)
    alone = bm25_scores(questions[1:2], POOLS[1:2])[0]
    assert abs(alone[0] - bm25_scores(questions, POOLS)[1][0]) > 0.1


def test_bm25_gives_equal_texts_equal_scores_and_zeros_where_no_token_is_known():
    pytest.importorskip("bm25s")
    scores = bm25_scores(["four strings", *QUESTIONS[1:]], POOLS)
    assert scores[0][1] == scores[0][3] > 0
    assert scores[2] == [0.0, 0.0]


def test_bm25_takes_pools_without_any_token():
    pytest.importorskip("bm25s")
    assert bm25_scores(["什么？", "the"], [["？！", "。"], ["😀"]]) == [[0.0, 0.0], [0.0]]
    assert bm25_scores(["多瑙河", ""], [["多瑙河 流经", "a"], [""]])[0][0] > 0
    assert bm25_scores(["river"], [[]]) == [[]]
    assert bm25_scores(["river", "lake"], [["a river"], []])[1] == []
    assert bm25_scores([], []) == []


def wordpiece_tokenizer():
    from transformers import BertTokenizer

    words = {word for text in (*QUESTIONS, *(t for pool in POOLS for t in pool)) for word in text.lower().split()}
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", ":", *sorted(words)]
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})


def bert_config(tokenizer, **fields):
    from transformers import BertConfig

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    return BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, initializer_range=0.4, pad_token_id=0, **sizes, **fields
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A tiny random BERT without any head."""
    from transformers import BertModel

    target, tokenizer = tmp_path_factory.mktemp("models") / "bert", wordpiece_tokenizer()
    torch.manual_seed(0)
    BertModel(bert_config(tokenizer)).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def dense_model(bert):
    """A sentence-transformers model over it, with prompts of its own."""
    library = pytest.importorskip("sentence_transformers")
    from sentence_transformers import models

    transformer = models.Transformer(str(bert))
    prompts = {"query": "query: ", "document": "passage: "}
    model = library.SentenceTransformer(modules=[transformer, models.Pooling(16)], prompts=prompts, device="cpu")
    model.save_pretrained(str(bert.parent / "dense"))
    return str(bert.parent / "dense")


def save_classifier(target, labels):
    from transformers import BertForSequenceClassification

    tokenizer = wordpiece_tokenizer()
    torch.manual_seed(3)
    model = BertForSequenceClassification(bert_config(tokenizer, id2label={i: f"L{i}" for i in range(labels)}))
    torch.nn.init.normal_(model.classifier.weight, std=20.0)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return str(target)


@pytest.fixture(scope="module")
def cross_encoder_model(tmp_path_factory):
    pytest.importorskip("sentence_transformers")
    return save_classifier(tmp_path_factory.mktemp("models") / "cross", labels=1)


def test_dense_scores_are_cosines_of_mean_pooled_vectors_with_the_models_prompts(dense_model):
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(dense_model), AutoModel.from_pretrained(dense_model).double()

    def embed(text):
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)

    for question, pool, scores in zip(
        QUESTIONS, POOLS, dense_scores(QUESTIONS, POOLS, dense_model, "cpu", 3), strict=True
    ):
        query = embed("query: " + question)
        expected = [torch.cosine_similarity(query, embed("passage: " + text), dim=0).item() for text in pool]
        assert scores == pytest.approx(expected, abs=1e-5)
        assert max(scores) - min(scores) > 1e-3


def test_dense_encodes_each_distinct_text_once(dense_model, monkeypatch):
    from sentence_transformers import SentenceTransformer

    encoded = []
    for name in ("encode_query", "encode_document"):
        plain = getattr(SentenceTransformer, name)

        def encode(self, texts, *, plain=plain, **settings):
            encoded.append(list(texts))
            return plain(self, texts, **settings)

        monkeypatch.setattr(SentenceTransformer, name, encode)
    scores = dense_scores([*QUESTIONS, QUESTIONS[0]], [*POOLS, POOLS[0]], dense_model, "cpu", 3)
    assert encoded == [QUESTIONS, list(dict.fromkeys(text for pool in POOLS for text in pool))]
    assert scores[0] == scores[3]
    assert scores[0][1] == scores[0][3]


def test_cross_encoder_scores_are_the_logits_of_each_pair(cross_encoder_model):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cross_encoder_model)
    model = AutoModelForSequenceClassification.from_pretrained(cross_encoder_model).double()
    largest = 0.0
    for question, pool, scores in zip(
        QUESTIONS, POOLS, cross_encoder_scores(QUESTIONS, POOLS, cross_encoder_model, "cpu", 4), strict=True
    ):
        with torch.no_grad():
            expected = [model(**tokenizer(question, text, return_tensors="pt")).logits.item() for text in pool]
        assert scores == pytest.approx(expected, rel=1e-4, abs=1e-4)
        largest = max(largest, *map(abs, scores))
    assert largest > 20, "where a sigmoid is 1 in float32, logits still tell candidates apart"


def test_pools_without_candidates_give_no_scores(dense_model, cross_encoder_model):
    assert dense_scores(["river"], [[]], dense_model, "cpu", 4) == [[]]
    assert cross_encoder_scores(["river"], [[]], cross_encoder_model, "cpu", 4) == [[]]


def test_check_accepts_what_can_be_used(dense_model, cross_encoder_model):
    assert check_ranker("random") is None
    assert check_ranker("dense", dense_model) == dense_model
    assert check_ranker("cross_encoder", cross_encoder_model) == cross_encoder_model
    assert check_ranker("dense", "organisation/some-model_v1.5") == "organisation/some-model_v1.5"


@pytest.mark.parametrize(
    ("kind", "package", "model_name"),
    [
        ("bm25", "bm25s", None),
        ("dense", "sentence-transformers", "organisation/name"),
        ("cross_encoder", "sentence-transformers", "organisation/name"),
    ],
)
def test_a_missing_library_is_named_with_the_command_that_installs_it(kind, package, model_name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"pip install {package}"):
        check_ranker(kind, model_name)
    assert check_ranker("random") is None


@pytest.mark.parametrize(
    "name", ["all-MiniLM-L6-v2", "no/such/directory", "./org/name", "/absolute/name", "org/", "../x"]
)
def test_a_name_that_is_neither_directory_nor_hub_id_is_refused(name):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="neither"):
        check_ranker("dense", name)


def test_wrong_kinds_and_missing_models_are_refused():
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="choose from random, bm25, dense, cross_encoder"):
        check_ranker("bm52")
    with pytest.raises(ValueError, match="needs a model"):
        check_ranker("dense")


def test_directories_that_would_get_a_head_of_the_librarys_own_making_are_refused(bert, dense_model, tmp_path):
    with pytest.raises(ValueError, match="modules.json"):
        check_ranker("dense", str(bert))
    for path in (str(bert), dense_model, save_classifier(tmp_path / "pair", labels=2)):
        with pytest.raises(ValueError, match="one output"):
            check_ranker("cross_encoder", path)


def test_a_directory_without_configuration_or_safetensors_is_refused(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="config.json"):
        check_ranker("dense", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        check_ranker("dense", str(tmp_path))


def test_a_cross_encoder_with_two_outputs_is_refused_before_it_scores(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match="2 numbers"):
        cross_encoder_scores(QUESTIONS, POOLS, save_classifier(tmp_path, labels=2), "cpu", 4)
