"""The engine over the model in this process: answers that come and go are written together, one token each a step.

Contract: an answer is the one that it would be alone: `RAGMaster.query`'s, up to the rounding that comes with another
batch. A prompt is read by itself, then its row joins those that are being written; a row leaves when it has ended or is
cancelled. What fails for one prompt fails for that one alone. Knows nothing about HTTP or stores.

Shape suffixes: B rows, T tokens of a prompt, D hidden size, V vocabulary.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from openrlhf.models.answering import TextPieces
from openrlhf.models.generation import drawn, merge_rows, mergeable, new_cache, numbers, read
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.rag.master import Prepared
from openrlhf.serving.engines import EngineError
from openrlhf.serving.turns import ANSWERS, PURPOSE

logger = logging.getLogger(__name__)

MAX_BATCH = 32
# Prompts read between two steps: more would let those that are being written wait.
PROMPTS_A_STEP = 4
STOP, LENGTH = "stop", "length"


class Answer(Iterator[str]):
    """An answer that is being written; gives its text in pieces of whole characters.

    Attributes:
        n_tokens: tokens of the text so far.
        finish_reason: "stop" or "length" once it has come to its end.
        cancelled: nobody waits for it any more.
    """

    def __init__(self, engine: "LocalEngine", text: TextPieces):
        self._engine, self._text = engine, text
        self._given: queue.SimpleQueue[int | str | EngineError] = queue.SimpleQueue()
        self.n_tokens, self.finish_reason, self.cancelled = 0, "", False

    def give(self, what: int | str | EngineError) -> None:
        """The next token, how it ended, or why it could not; called by the engine."""
        self._given.put(what)

    def __next__(self) -> str:
        while not (self.cancelled or self.finish_reason):
            got = self._given.get()
            if isinstance(got, EngineError):
                self.cancelled = True
                raise got
            if isinstance(got, int):
                self.n_tokens += 1
            else:
                self.finish_reason = got
            if piece := self._text.add([got]) if isinstance(got, int) else self._text.rest():
                return piece
        raise StopIteration

    def close(self) -> None:
        """Cancels it; any thread may do so, and as often as it likes."""
        if not self.cancelled:
            self.cancelled = True
            self._given.put(STOP)  # for who waits for a piece
            self._engine.look()


@dataclass
class Row:
    """An answer and what writes it."""

    answer: Answer
    prepared: Prepared
    max_new_tokens: int
    temperature: float
    draws: Iterator[torch.Tensor]
    written: int = 0
    token: int = -1
    length: int = 0
    """Tokens in its cache."""


class Batch:
    """Rows that are written together, through one adapter."""

    def __init__(self, model: CLaRa, adapter: str | None, rows: list[Row], cache: Any):
        self.model, self.adapter, self.rows, self.cache = model, adapter, rows, cache
        self.mask_BT = self._mask()

    def _mask(self) -> torch.Tensor:
        lengths_B1 = torch.tensor([[row.length] for row in self.rows], device=self.model.device)
        columns = int(lengths_B1.max())
        return (torch.arange(columns, device=self.model.device) >= columns - lengths_B1).long()

    def change(self, joining: list["Batch"]) -> None:
        """Lets rows that have ended go, and those of other batches in."""
        parts = [(one, [i for i, row in enumerate(one.rows) if _open(row)]) for one in (self, *joining)]
        if len(parts) == 1 and len(parts[0][1]) == len(self.rows):
            return
        self.rows = [one.rows[i] for one, kept in parts for i in kept]
        if self.rows:
            caches = [(one.cache, kept) for one, kept in parts if kept]
            self.cache = merge_rows(caches, [row.length for row in self.rows])
            self.mask_BT = self._mask()
        else:
            self.cache = None

    def step(self) -> None:
        """One more token for every row."""
        model = self.model
        ids_B1 = torch.tensor([[row.token] for row in self.rows], device=model.device)
        self.mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(self.rows), 1)], dim=1)
        with model.router.route(self.adapter):
            hidden_BD = read(model.decoder, model.embed(ids_B1), self.mask_BT, self.cache)
            tokens = chosen(model.base_logits(hidden_BD), self.rows)
        for row, token in zip(self.rows, tokens, strict=True):
            row.length += 1
            row.token = token


def chosen(logits_BV: torch.Tensor, rows: list[Row]) -> list[int]:
    """The next token of each row: the likeliest, or drawn with the row's own numbers."""
    token_B = logits_BV.argmax(-1)
    warm = [i for i, row in enumerate(rows) if row.temperature > 0]
    if warm:
        temperatures = torch.tensor([rows[i].temperature for i in warm], dtype=torch.float64)
        token_B[warm] = drawn(logits_BV[warm], temperatures, torch.stack([next(rows[i].draws) for i in warm]))
    return token_B.tolist()


def _open(row: Row) -> bool:
    return row.token >= 0 and not row.answer.cancelled


class LocalEngine:
    """Writes answers with a loaded model, in a thread of its own.

    Args:
        model: in eval mode; other threads may use it meanwhile, where `model.router.lock` keeps the passes apart.
        max_batch: answers written at once; further ones wait.
    """

    def __init__(self, model: CLaRa, max_batch: int = MAX_BATCH):
        self.model, self.max_batch = model, max_batch
        self._stop_ids = set(model.stop_ids())
        self._waiting: deque[Row] = deque()
        self._batches: list[Batch] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Answers that are being written."""
        return sum(map(_open, self._rows()))  # those that ended are dropped at the next change

    @property
    def waiting(self) -> int:
        """Answers that are not begun."""
        return len(self._waiting)

    def submit(self, prepared: Prepared, max_new_tokens: int, temperature: float, seed: int) -> Answer:
        """See `engines.Engine`.

        Raises:
            ValueError: the prompt with its new tokens is longer than the model's positions.
            EngineError: the engine is closed.
        """
        assert prepared.prompt is not None
        self.model.check_positions([prepared.prompt], max_new_tokens)
        answer = Answer(self, TextPieces(self.model.tokens.tokenizer))
        row = Row(answer, prepared, max_new_tokens, temperature, numbers(seed))
        with self._changed:
            if self._closed:
                raise EngineError("the server is stopping")
            self._waiting.append(row)
            self._changed.notify()
        return answer

    def look(self) -> None:
        """Lets the engine see that an answer was cancelled."""
        with self._changed:
            self._changed.notify()

    def close(self) -> None:
        """Ends what is being written with an error, and the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        PURPOSE.set(ANSWERS)
        with torch.no_grad():
            while self._work():
                self._join()
                for batch in list(self._batches):
                    self._step(batch)
        for row in [*self._waiting, *self._rows()]:
            row.answer.give(EngineError("the server is stopping"))
        self._waiting.clear()
        self._batches.clear()

    def _work(self) -> bool:
        """Waits until there is something to do; False once closed."""
        with self._changed:
            while not (self._closed or self._waiting or self._batches):
                self._changed.wait()
            return not self._closed

    def _join(self) -> None:
        """Reads prompts while there is room, and puts rows where they belong."""
        started: list[Batch] = []
        room = self.max_batch - sum(map(_open, self._rows()))
        while self._waiting and len(started) < min(room, PROMPTS_A_STEP):
            with self._changed:
                row = self._waiting.popleft()
            if not row.answer.cancelled and (batch := self._started(row)) is not None:
                started.append(batch)
        joining: dict[int, list[Batch]] = {}
        for batch in started:
            together = mergeable(batch.cache)
            fitting = [one for one in self._batches if together and one.adapter == batch.adapter]
            if fitting:
                joining.setdefault(id(fitting[0]), []).append(batch)
            else:
                self._batches.append(batch)
        for batch in self._batches:
            self._change(batch, joining.get(id(batch), []))
        self._batches = [batch for batch in self._batches if batch.rows]

    def _change(self, batch: Batch, joining: list[Batch]) -> None:
        rows = [row for one in (batch, *joining) for row in one.rows]
        try:
            batch.change(joining)
        except Exception as error:  # such as no memory for a cache of them all
            batch.rows = []
            self._fail(rows, error)

    def _rows(self) -> list[Row]:
        return [row for batch in self._batches for row in batch.rows]

    def _started(self, row: Row) -> Batch | None:
        """A batch of this row alone with its first token; None where that was all, or it failed."""
        model, prompt, docs_KLD = self.model, row.prepared.prompt, row.prepared.docs_KLD
        assert prompt is not None
        try:
            if docs_KLD is None:
                docs_KLD = torch.empty(0, model.config.n_memory_tokens, model.decoder.config.hidden_size)
            ids, mask = model.tokens.pad_left([prompt.ids])
            counts = torch.tensor([len(docs_KLD)])
            embeds_1TD = model.place(ids.to(model.device), docs_KLD.to(model.device), counts)
            cache = new_cache(model.decoder.config)
            with model.router.route(row.prepared.adapter):
                hidden_1D = read(model.decoder, embeds_1TD, mask.to(model.device), cache)
                (row.token,) = chosen(model.base_logits(hidden_1D), [row])
            row.length = len(prompt.ids)
            self._give(row)
            return Batch(model, row.prepared.adapter, [row], cache) if row.token >= 0 else None
        except Exception as error:
            self._fail([row], error)
            return None

    def _step(self, batch: Batch) -> None:
        try:
            batch.step()
        except Exception as error:
            self._batches.remove(batch)
            self._fail(batch.rows, error)
            return
        for row in batch.rows:
            self._give(row)

    def _give(self, row: Row) -> None:
        """Hands a row's new token on, and marks the row where it was the last."""
        if row.token in self._stop_ids:
            row.answer.give(STOP)
            row.token = -1
            return
        row.written += 1
        row.answer.give(row.token)
        if row.written == row.max_new_tokens:
            row.answer.give(LENGTH)
            row.token = -1

    def _fail(self, rows: list[Row], error: Exception) -> None:
        logger.error("an answer failed", exc_info=error)
        for row in rows:
            row.answer.give(
                EngineError(f"the answer could not be written ({type(error).__name__}): see the server's log")
            )
