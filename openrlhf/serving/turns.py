"""Who uses the model next, where several threads share one: each pass is one turn.

Contract: one thread holds the model at a time; of those that wait, each purpose gets a turn before any gets its second,
and within a purpose who came first goes first. So answers that are being written, questions that are being read and
documents that are being compressed all go on, whatever comes in of the others. Knows nothing about models.
"""

import threading
from collections import deque
from contextvars import ContextVar

ANSWERS, QUESTIONS, DOCUMENTS = "answers", "questions", "documents"
PURPOSES = (ANSWERS, QUESTIONS, DOCUMENTS)
PURPOSE: ContextVar[str] = ContextVar("purpose", default=QUESTIONS)
"""What the present thread or task uses the model for."""


class Turns:
    """A lock that a thread may take again while it has it, and that serves the purposes in turn.

    Takes the place of `AdapterRouter.lock`, and so is held for one pass through the model and no longer.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[object]] = {purpose: deque() for purpose in PURPOSES}
        self._holder, self._depth, self._last = 0, 0, ANSWERS

    def __enter__(self) -> "Turns":
        me = threading.get_ident()
        with self._changed:
            if self._holder != me:
                purpose, ticket = PURPOSE.get(), object()
                self._waiting[purpose].append(ticket)
                while self._holder or self._next() != (purpose, ticket):
                    self._changed.wait()
                self._waiting[purpose].popleft()
                self._holder, self._last = me, purpose
            self._depth += 1
        return self

    def __exit__(self, *_) -> None:
        with self._changed:
            self._depth -= 1
            if not self._depth:
                self._holder = 0
                self._changed.notify_all()

    def _next(self) -> tuple[str, object] | None:
        start = PURPOSES.index(self._last) + 1
        for purpose in (*PURPOSES[start:], *PURPOSES[:start]):
            if self._waiting[purpose]:
                return purpose, self._waiting[purpose][0]
        return None
