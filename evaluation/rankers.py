"""What CLaRa's retrieval is compared with: random, BM25, a dense retriever, a cross-encoder.

Each `*_scores` function scores every question's own pool of candidates: `pools[i]` belongs to `questions[i]`, and
`scores[i][j]` is how well `pools[i][j]` fits, higher is better. Scores of one question are comparable, those of
different questions need not be. Two candidates with the same text get the same score from every ranker but random.
Nothing here reads files of the evaluation or knows CLaRa; bm25s and sentence-transformers are imported where used.
"""

import hashlib
import importlib.util
import json
import math
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

BM25_K1, BM25_B = 1.5, 0.75

_PACKAGES = {
    "random": None,
    "bm25": "bm25s",
    "dense": "sentence-transformers",
    "cross_encoder": "sentence-transformers",
}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_ranker(kind: str, model_name: str | None = None) -> str | None:
    """Finds what is wrong with a ranker before anything is loaded; returns `model_name` as it is.

    kind: "random", "bm25", "dense" or "cross_encoder"; the last two need `model_name`, see `model_directory`.
    Raises ValueError when the library is not installed, or the model is not in sentence-transformers' format.
    """
    if kind not in _PACKAGES:
        raise ValueError(f"'{kind}' is no ranker; choose from {', '.join(_PACKAGES)}.")
    package = _PACKAGES[kind]
    if package is not None:
        check_package(package, f"The ranker {kind}")
    if package != "sentence-transformers":
        return model_name
    if not model_name:
        raise ValueError(f"The ranker {kind} needs a model: a directory or a Hub id organisation/name.")
    directory = model_directory(model_name)
    if directory is None:
        return model_name
    # Without these, sentence-transformers would add a pooling or a random head of its own making.
    if kind == "dense" and not (directory / "modules.json").is_file():
        raise ValueError(
            f"{directory} has no modules.json; a dense retriever is a model saved by sentence-transformers."
        )
    if kind == "cross_encoder" and classifier_labels(directory, "ForSequenceClassification") != 1:
        raise ValueError(f"{directory} is no cross-encoder: it needs a sequence classification head with one output.")
    return model_name


def check_package(package: str, user: str) -> None:
    """Raises ValueError when the package, by its name on PyPI, is not installed; imports nothing."""
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise ValueError(f"{user} needs a package that is not installed: pip install {package}")


def model_directory(model_name: str) -> Path | None:
    """The local directory of a model; None for a Hub id "organisation/name", whose files are not looked at.

    Raises ValueError when the name is neither, or the directory has no config.json or no safetensors weights.
    """
    path = Path(model_name)
    if not path.is_dir():
        if path.exists() or not _HUB_ID.fullmatch(model_name):
            raise ValueError(f"{model_name} is neither a model's directory nor a Hub id organisation/name.")
        return None
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json; give the directory that a model was saved to.")
    if not any(path.rglob("*.safetensors")):
        raise ValueError(f"{path} has no *.safetensors weights; save the model again in that format.")
    return path


def classifier_labels(directory: Path, head: str) -> int:
    """How many classes the saved classifier tells apart; 0 for a model without a head of this class."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if not any(name.endswith(head) for name in config.get("architectures") or []):
        return 0
    return len(config["id2label"]) if "id2label" in config else 2


def ranking(scores: list[float]) -> list[int]:
    """Indices by descending score; equal scores by ascending index. Raises ValueError on NaN."""
    if any(math.isnan(score) for score in scores):
        raise ValueError("A score is NaN: the ranker's model overflowed or its weights are damaged.")
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def random_scores(questions: list[str], pools: list[list[str]], seed: int) -> list[list[float]]:
    """Uniform in [0, 1), a function of seed, question and pool alone: the same in every process and order of asking."""
    scores = []
    for question, pool in zip(questions, pools, strict=True):
        digest = hashlib.sha256(json.dumps([seed, question, pool]).encode()).digest()
        generator = random.Random(int.from_bytes(digest, "big"))
        scores.append([generator.random() for _ in pool])
    return scores


def bm25_scores(questions: list[str], pools: list[list[str]]) -> list[list[float]]:
    """BM25 in Lucene's form by the library bm25s, k1 = 1.5, b = 0.75:

    Σ_t idf(t) · f / (f + k1 · (1 − b + b · L / L̄)),  idf(t) = ln(1 + (N − n_t + ½) / (n_t + ½)),

    over the question's tokens t, repetitions counted, with f the count of t in the candidate and L its length. N, n_t
    and the mean length L̄ are those of all distinct candidates of all pools: in 20 documents fetched for one question,
    its own words would look common.
    Tokens: lower case, runs of two or more word characters, bm25s's English stop words dropped, no stemming.
    """
    import bm25s

    row_of = _rows(text for pool in pools for text in pool)
    if not row_of:
        return [[] for _ in zip(questions, pools, strict=True)]
    corpus = bm25s.tokenize(list(row_of), stopwords="english", show_progress=False)
    if not corpus.vocab:
        return [[0.0] * len(pool) for _, pool in zip(questions, pools, strict=True)]
    index = bm25s.BM25(k1=BM25_K1, b=BM25_B, method="lucene")
    index.index(corpus, create_empty_token=False, show_progress=False)
    tokens = bm25s.tokenize(questions, stopwords="english", return_ids=False, show_progress=False)
    scores = []
    for words, pool in zip(tokens, pools, strict=True):
        of_all = index.get_scores_from_ids(index.get_tokens_ids(words))
        scores.append([float(of_all[row_of[text]]) for text in pool])
    return scores


def dense_scores(
    questions: list[str], pools: list[list[str]], model_name: str, device: str, batch_size: int
) -> list[list[float]]:
    """Cosine of the embeddings that the sentence-transformers model `model_name` gives question and candidate.

    Each distinct text is encoded once, with the query and document prompts that the model's own configuration has.
    Texts longer than the model's maximum are cut by it.
    """
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(model_name, device=device, model_kwargs={"use_safetensors": True})
    query_row_of, document_row_of = _rows(questions), _rows(text for pool in pools for text in pool)
    bar = sys.stderr.isatty()
    queries_QE = model.encode_query(
        list(query_row_of), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=bar
    )
    documents_DE = model.encode_document(
        list(document_row_of), batch_size=batch_size, normalize_embeddings=True, show_progress_bar=bar
    )
    return [
        [float(documents_DE[document_row_of[text]] @ queries_QE[query_row_of[question]]) for text in pool]
        for question, pool in zip(questions, pools, strict=True)
    ]


def cross_encoder_scores(
    questions: list[str], pools: list[list[str]], model_name: str, device: str, batch_size: int
) -> list[list[float]]:
    """Logit of the sentence-transformers cross-encoder `model_name`, which reads question and candidate together.

    Each distinct pair is scored once. The logit is taken before the sigmoid, which would round good candidates to 1.
    Raises ValueError when the model gives more than one number a pair.
    """
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(model_name, device=device, model_kwargs={"use_safetensors": True})
    if model.num_labels != 1:
        raise ValueError(f"{model_name} gives {model.num_labels} numbers a pair; a cross-encoder that ranks gives one.")
    row_of = _rows((question, text) for question, pool in zip(questions, pools, strict=True) for text in pool)
    logits_P = model.predict(
        list(row_of),
        batch_size=batch_size,
        show_progress_bar=sys.stderr.isatty(),
        activation_fn=torch.nn.Identity(),
    )
    return [
        [float(logits_P[row_of[question, text]]) for text in pool]
        for question, pool in zip(questions, pools, strict=True)
    ]


def _rows(items: Iterable) -> dict:
    """Numbers the distinct items in order of appearance."""
    return {item: row for row, item in enumerate(dict.fromkeys(items))}
