"""Which records make up which micro-batch. A pure function of (seed, epoch, step): resuming needs no saved state.

A global batch does not depend on the number of ranks or on the micro-batch size: it is drawn first, sorted by length
so that its micro-batches need little padding, and only then dealt out. Grouped by length, a global batch is drawn from
among those of a window, whose records are sorted.
"""

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WINDOW = 32
"""Global batches whose records are sorted together when they are grouped by length."""


@dataclass(frozen=True)
class MicroBatch:
    """Records of one micro-batch; `number` is its place in the global batch, and seeds its dropout.

    `real` is false where a rank has nothing left to do while others do: its copy of a record counts for nothing.
    """

    indices: list[int]
    number: int
    real: bool = True


@functools.lru_cache(maxsize=1)  # a second for two million records
def _epoch_order(n_records: int, seed: int, epoch: int) -> list[int]:
    order = list(range(n_records))
    random.Random(f"{seed}/order/{epoch}").shuffle(order)
    return order


@dataclass(frozen=True)
class BatchPlan:
    """The order of training.

    Args:
        n_records: records in the data set, at least 1.
        batch_size: records of a global batch; the last one of an epoch may be smaller, none is left out.
        micro_size: records of a micro-batch.
        seed: of the permutation of each epoch.
        length: of a record by its index, to group records of like length into global batches; None: drawn at random.
    """

    n_records: int
    batch_size: int
    micro_size: int
    seed: int
    length: Callable[[int], int] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in one pass over the data."""
        return math.ceil(self.n_records / self.batch_size)

    def global_batch(self, step: int) -> tuple[int, list[int]]:
        """(epoch, record indices) of a step, counted from 0 over all epochs."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self.length is not None:
            window, place = divmod(position, WINDOW)
            return epoch, _window(self, epoch, window)[place]
        order = _epoch_order(self.n_records, self.seed, epoch)
        return epoch, order[position * self.batch_size : (position + 1) * self.batch_size]

    def share(self, indices: Sequence[int], length: Callable[[int], int], rank: int, world: int) -> list[MicroBatch]:
        """This rank's micro-batches of a global batch; every rank gets the same number of them."""
        order = sorted(indices, key=lambda index: (length(index), index))
        chunks = [order[start : start + self.micro_size] for start in range(0, len(order), self.micro_size)]
        mine = []
        for number in range(rank, math.ceil(len(chunks) / world) * world, world):
            real = number < len(chunks)
            mine.append(MicroBatch(chunks[number] if real else chunks[0][:1], number, real))
        return mine


@functools.lru_cache(maxsize=2)
def _window(plan: BatchPlan, epoch: int, number: int) -> list[list[int]]:
    """The global batches of a window: of like length each, themselves in an order drawn by the seed."""
    assert plan.length is not None
    size = WINDOW * plan.batch_size
    drawn = _epoch_order(plan.n_records, plan.seed, epoch)[number * size : (number + 1) * size]
    length = {index: plan.length(index) for index in drawn}
    drawn = sorted(drawn, key=lambda index: (length[index], index))
    batches = [drawn[start : start + plan.batch_size] for start in range(0, len(drawn), plan.batch_size)]
    random.Random(f"{plan.seed}/window/{epoch}/{number}").shuffle(batches)
    return batches
