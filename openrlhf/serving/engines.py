"""What writes an answer: the one interface between the server and its engines. Knows nothing about HTTP or models."""

from collections.abc import Iterator
from typing import Any, Protocol

from openrlhf.rag.master import Prepared


class EngineError(RuntimeError):
    """An answer could not be written, or not to its end; the message says why, and nothing secret."""


class Pieces(Iterator[str], Protocol):
    """An answer's text in pieces of whole characters, as it is written."""

    def close(self) -> Any:
        """Cancels the answer where it is being written. Any thread may call it, also while another waits for a piece,
        and as often as it likes."""


class Engine(Protocol):
    """Writes answers; any thread may call it, and answers are written side by side."""

    def submit(self, prepared: Prepared, max_new_tokens: int, temperature: float, seed: int) -> Pieces:
        """The answer to what `RAGMaster.prepare` gave. Refusals (`prepared.prompt` is None) never come here.

        Args:
            max_new_tokens: tokens of the answer at most.
            temperature: 0 for the most likely token at every step.
            seed: of the draws above temperature 0.

        Raises:
            EngineError: here or from the pieces.
        """
        ...
