"""Work that can be shared between processes and taken up again: batches, each with a file of its own.

Batches are formed from all of the work before it is shared out, so that a result depends neither on the number of
processes nor on whether a run was interrupted. A batch's file appears whole or not at all. Knows nothing about what a
batch computes.
"""

import gc
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from openrlhf.utils.logging import write_whole

logger = logging.getLogger(__name__)
Item = TypeVar("Item")


class OutOfMemory(RuntimeError):
    """Memory runs out even with one item in a batch."""


class Runner:
    """Shares batches between the processes of `state` and keeps their results under `folder`.

    Args:
        batch_size: items in a batch. When memory runs out, the batch is done in halves, and so are all later ones.
    """

    def __init__(self, folder: Path, batch_size: int, state: PartialState):
        self.folder, self.batch_size, self.state = folder, batch_size, state
        self.piece = batch_size

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Positions of the items of each batch: like lengths together, the longest first, since they need most."""
        order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
        return [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]

    def generate(
        self, name: str, items: Sequence[Item], lengths: Sequence[int], answer: Callable[[list[Item]], list[dict]]
    ) -> None:
        """Calls `answer` on every batch of this process that has no file yet; `collect` reads the files."""
        for path, batch in self._open(name, self.batches(lengths), ".json"):
            start = time.perf_counter()
            results = self._in_pieces([items[i] for i in batch], answer)
            seconds = (time.perf_counter() - start) / len(batch)
            lines = [{**result, "latency_s": seconds} for result in results]
            write_whole(path, json.dumps(dict(zip(batch, lines, strict=True))))

    def collect(self, name: str, lengths: Sequence[int]) -> list[dict]:
        """What `answer` returned for each item, after every process has done its batches; with `latency_s`, the
        seconds of the item's batch divided by the items in it."""
        results: dict[str, dict] = {}
        for number in range(len(self.batches(lengths))):
            results |= json.loads((self.folder / name / f"{number:05}.json").read_text(encoding="utf-8"))
        return [results[str(i)] for i in range(len(lengths))]

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, in JSON's types; one process computes it and the others read it."""
        path = self.folder / f"{name}.json"
        if self.state.is_main_process and not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(compute()))
        self.state.wait_for_everyone()
        return json.loads(path.read_text(encoding="utf-8"))

    def compress(
        self, texts: Sequence[str], lengths: Sequence[int], compress: Callable[[list[str]], torch.Tensor]
    ) -> "CompressedDocuments":
        """Compresses each text once, and waits until every process has done its part."""
        batches = self.batches(lengths)
        for path, batch in self._open("documents", batches, ".safetensors"):
            pieces = self._in_pieces([texts[i] for i in batch], lambda part: [compress(part)])
            draft = path.with_suffix(".draft")
            save_file({"docs": torch.cat(pieces).cpu().contiguous()}, draft)
            os.replace(draft, path)
        self.state.wait_for_everyone()
        return CompressedDocuments(self.folder / "documents", [[texts[i] for i in batch] for batch in batches])

    def _open(self, name: str, batches: list[list[int]], suffix: str) -> Iterator[tuple[Path, list[int]]]:
        """This process's batches that are still to be done, each with the file for its result."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        state = self.state
        mine = [(self.folder / name / f"{n:05}{suffix}", batch) for n, batch in enumerate(batches)]
        todo = [(path, batch) for path, batch in mine[state.process_index :: state.num_processes] if not path.exists()]
        hidden = None if state.is_main_process else True  # None: shown on a terminal only
        label = f"{self.folder.name} {name}"
        with tqdm(total=sum(len(batch) for _, batch in todo), desc=label, unit="text", disable=hidden) as bar:
            for path, batch in todo:
                yield path, batch
                bar.update(len(batch))

    def _in_pieces(self, items: list[Item], call: Callable[[list[Item]], list[Any]]) -> list[Any]:
        results: list[Any] = []
        start = 0
        while start < len(items):
            part = items[start : start + self.piece]
            try:
                results += call(part)
                start += len(part)
                continue
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(part) == 1:
                    raise OutOfMemory(
                        "memory runs out with one text at a time: use a device with more memory, a smaller "
                        "--max_new_tokens, or --dtype bfloat16"
                    ) from error
            # Outside the except clause, so that the traceback does not hold the tensors.
            self.piece = (len(part) + 1) // 2
            logger.warning("out of memory with %d texts in a batch: going on with %d", len(part), self.piece)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return results


class CompressedDocuments:
    """Memory vectors by text, read from the files of `Runner.compress` when they are asked for."""

    def __init__(self, folder: Path, batches: list[list[str]]):
        files = [safe_open(folder / f"{n:05}.safetensors", framework="pt") for n in range(len(batches))]
        self.places = {
            text: (file, row) for file, batch in zip(files, batches, strict=True) for row, text in enumerate(batch)
        }

    def __getitem__(self, texts: Sequence[str]) -> torch.Tensor:
        """`[len(texts), L, D]`, in the order of the texts."""
        found = [self.places[text] for text in texts]
        return torch.cat([file.get_slice("docs")[row : row + 1] for file, row in found])
