"""From a question to its answer: what is read, how it is written, how it ends. Knows nothing about HTTP.

One `Asker` serves all threads: what concerns a question before its first token is done in turn (`RAGMaster.prepare`),
answers are written side by side by the engine.
"""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from openrlhf.rag.master import Citation, History, Prepared, RAGMaster
from openrlhf.serving.documents import Library
from openrlhf.serving.engine import LENGTH, STOP
from openrlhf.serving.engines import Engine, EngineError

# Documents that were found may be deleted before they are read.
ATTEMPTS = 3


@dataclass(frozen=True)
class Question:
    """A question with how it is to be answered; None takes the configuration's."""

    text: str
    history: History = ()
    instructions: str = ""
    max_new_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stops: Sequence[str] = ()


class Writing(Iterator[str]):
    """An answer that is being written, or a refusal: its text in pieces; what it stands on is known before the first.

    Attributes:
        finish_reason: "stop" or "length" once it has come to its end.
        prompt_tokens, completion_tokens: as far as it has come; 0 and 0 for a refusal, which no model writes.
    """

    def __init__(self, prepared: Prepared, pieces: Iterator[str], limit: int, stops: Sequence[str], count):
        self.citations: list[Citation] = prepared.citations
        self.prompt_tokens = len(prepared.prompt.ids) if prepared.prompt is not None else 0
        self.finish_reason = ""
        self._pieces, self._limit, self._stops, self._count = pieces, limit, stops, count
        self._text, self._sent = "", 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of the text so far."""
        if not self.prompt_tokens:
            return 0
        told = getattr(self._pieces, "n_tokens", None)
        return self._count(self._text) if told is None else told

    def __next__(self) -> str:
        while not self.finish_reason:
            piece = next(self._pieces, None)
            if piece is None:
                told = getattr(self._pieces, "finish_reason", None)
                full = bool(self.prompt_tokens) and self.completion_tokens >= self._limit
                self.finish_reason = told or (LENGTH if full else STOP)
            else:
                self._text += piece
            if ready := self._ready():
                return ready
        raise StopIteration

    def _ready(self) -> str:
        """What may be sent: all up to a stop, but for what may be the beginning of one."""
        places = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        end = len(self._text)
        if places:
            self.finish_reason, end = STOP, min(places)
            self.close()
        elif not self.finish_reason:
            held = [n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])]
            end -= max(held, default=0)
        ready = self._text[self._sent : end]
        self._sent = max(self._sent, end)
        return ready

    def close(self) -> None:
        """Cancels the answer; any thread may do so."""
        if hasattr(self._pieces, "close"):
            self._pieces.close()


class Asker:
    """Answers questions from a library.

    Args:
        master: gives prompts; its model is shared with the engine.
        library: the documents.
        engine: writes.
    """

    def __init__(self, master: RAGMaster, library: Library, engine: Engine):
        self.master, self.library, self.engine, self.model = master, library, engine, master.model
        self._searching = threading.Lock()

    def ask(self, question: Question) -> Writing:
        """Finds what answers a question, and begins to write.

        Raises:
            ValueError: the prompt is too long for the model.
            EngineError: see `Engine.submit`.
        """
        prepared = self._prepared(question)
        own = self.master.config.generation
        limit = question.max_new_tokens or own.max_new_tokens
        if prepared.prompt is None:
            pieces: Iterator[str] = iter([prepared.refusal])
        else:
            temperature = own.temperature if question.temperature is None else question.temperature
            pieces = self.engine.submit(
                prepared, limit, temperature, own.seed if question.seed is None else question.seed
            )
        return Writing(prepared, pieces, limit, question.stops, self.count)

    def _prepared(self, question: Question) -> Prepared:
        for attempt in range(ATTEMPTS):
            try:
                with self._searching:
                    store, histories = self.library.store, [question.history]
                    return self.master.prepare([question.text], store, histories, question.instructions)[0]
            except ValueError as error:
                if attempt == ATTEMPTS - 1:
                    raise EngineError(str(error)) from error
        raise AssertionError

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.model.tokens.plain_ids([text])[0])

    def embed(self, texts: Sequence[str], documents: bool) -> torch.Tensor:
        """Flattened vectors `[N, L·D]` float32 on the CPU: the query reasoner's, or the compressor's.

        Raises:
            ValueError: the model has no query reasoner.
        """
        if documents:
            return self.model.compress_documents(list(texts))[0].flatten(1).float().cpu()
        return self.model.encode_queries(list(texts)).float().cpu()

    def rerank(self, query: str, texts: Sequence[str], top_n: int | None) -> list[tuple[int, float]]:
        """Positions and cosines of the texts that are closest to the query, best first.

        Raises:
            ValueError: the model has no query reasoner.
        """
        query_1E = self.embed([query], documents=False)
        docs_NE = self.embed(texts, documents=True).to(torch.bfloat16)  # as the store holds them
        scores = F.cosine_similarity(query_1E.double(), docs_NE.double()).tolist()
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [(i, scores[i]) for i in best[:top_n]]

    def close(self) -> None:
        """Ends what is being written, and closes the documents."""
        if hasattr(self.engine, "close"):
            self.engine.close()
        self.master.close()
        self.library.close()
