"""Decoding over embeddings, greedy or sampled: prompts in, new token ids out. Knows nothing about text or adapters.

Differs from transformers' `generate` where that costs time: the start that all prompts share goes through the model
once, keys and values are written into room kept for them instead of being copied for every token, and rows that have
ended leave the batch. For a server, rows of several caches can become one batch (`merge_rows`).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 64
"""Tokens that a cache grows by."""


class RoomyLayer(DynamicLayer):
    """Keys and values `[B, heads, T, D]` of one layer, the first T places of a buffer that is longer."""

    _room: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        """Appends, and returns all keys and values."""
        start = self.get_seq_length()
        if start == 0:
            return super().update(key_states, value_states, *args, **kwargs)
        end = start + key_states.shape[-2]
        if self._room is None or end > self._room[0].shape[-2]:
            self._room = (self._with_room(self.keys, end), self._with_room(self.values, end))
        for buffer, states in zip(self._room, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps these rows of the batch."""
        super().batch_select_indices(indices)
        self._room = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        super().batch_repeat_interleave(repeats)
        self._room = None

    @staticmethod
    def _with_room(states: Any, end: int) -> torch.Tensor:
        batch, heads, length, width = states.shape
        buffer = states.new_empty(batch, heads, end + ROOM, width)
        buffer[:, :, :length] = states
        return buffer


def new_cache(config: Any) -> DynamicCache:
    """An empty cache; layers of another kind than plain attention stay as transformers makes them."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def read(decoder: Any, embeds_BTD: torch.Tensor, mask_BT: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    """Appends T embeddings to the cache; the last hidden state `[B, D]`. The mask covers the cache and them."""
    position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -embeds_BTD.shape[1] :]
    return decoder.base_model(
        inputs_embeds=embeds_BTD,
        attention_mask=mask_BT,
        position_ids=position_BT,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state[:, -1]


def repeat_cache(cache: DynamicCache, batch: int) -> DynamicCache:
    """A copy of a cache of one row for `batch` rows; the original stays as it is."""
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(batch)
    return repeated


def mergeable(cache: DynamicCache) -> bool:
    """Whether `merge_rows` knows all kinds of layers of a cache."""
    return all(type(layer) in (RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def merge_rows(parts: Sequence[tuple[DynamicCache, Sequence[int]]], lengths_B: Sequence[int]) -> DynamicCache:
    """One cache of rows of several, whose tokens all end in its last column; the caches stay as they are.

    Keys carry their positions in themselves, so that a row may stand in other columns than those it was read in: what
    is left of its own tokens is padding, for the mask to hide. Of a sliding window the last columns are kept, which are
    each row's last tokens.

    Args:
        parts: caches, and which rows of each; each row's tokens are the last columns of its cache.
        lengths_B: tokens of each of these rows, in their order.
    """
    merged = copy.copy(parts[0][0])
    layers = zip(*(cache.layers for cache, _ in parts), strict=True)
    merged.layers = [
        _merged([*zip(column, (rows for _, rows in parts), strict=True)], max(lengths_B)) for column in layers
    ]
    return merged


def _merged(parts: list[tuple[Any, Sequence[int]]], columns: int) -> Any:
    layer = copy.copy(parts[0][0])
    if not layer.is_initialized:  # it reads the keys of another
        return layer
    sliding = isinstance(layer, DynamicSlidingWindowLayer)
    width = min(columns, layer.sliding_window - 1) if sliding else columns
    buffers = []
    for name in ("keys", "values"):
        states = [getattr(source, name) for source, _ in parts]
        _, heads, _, size = states[0].shape
        # Zeros: what a mask hides is still multiplied by 0, and must be a number.
        buffer = states[0].new_zeros(sum(len(rows) for _, rows in parts), heads, width + (0 if sliding else ROOM), size)
        first = 0
        for one, (_, rows) in zip(states, parts, strict=True):
            taken = min(width, one.shape[-2])
            chosen = one[:, :, one.shape[-2] - taken :]
            buffer[first : first + len(rows), :, width - taken : width] = chosen[list(rows)]
            first += len(rows)
        buffers.append(buffer)
    layer.keys, layer.values = (buffer[:, :, :width] for buffer in buffers)
    if sliding:
        layer.cumulative_length = columns
    else:
        layer._room = (buffers[0], buffers[1])
    return layer


Choose = Callable[[torch.Tensor], torch.Tensor]
"""Logits `[B, V]` of a step → the token of each row `[B]`."""


def most_likely(logits_BV: torch.Tensor) -> torch.Tensor:
    """Greedy choice."""
    return logits_BV.argmax(-1)


def sampler(temperature: float, seed: int) -> Choose:
    """Draws from softmax(logits / temperature); the most likely token at temperature 0.

    One number is drawn a step and used for every row, so that what a row becomes does not depend on its batch.

    Raises:
        ValueError: a negative temperature.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if temperature == 0:
        return most_likely
    draws = numbers(seed)

    def choose(logits_BV: torch.Tensor) -> torch.Tensor:
        return drawn(logits_BV, torch.full((1,), temperature, dtype=torch.float64), torch.stack([next(draws)]))

    return choose


def numbers(seed: int) -> Iterator[torch.Tensor]:
    """What is drawn for one step after another: float64 scalars, uniform in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.rand((), generator=generator, dtype=torch.float64)


def drawn(logits_BV: torch.Tensor, temperature_B: torch.Tensor, number_B: torch.Tensor) -> torch.Tensor:
    """The tokens `[B]` that numbers in [0, 1) fall on in softmax(logits / temperature); either may be one for all."""
    temperature_B1, number_B1 = (given.to(logits_BV.device).unsqueeze(1) for given in (temperature_B, number_B))
    below_BV = torch.softmax(logits_BV.double() / temperature_B1, -1).cumsum(-1)
    # In units of each row's own sum, which rounding keeps from 1.
    searched_B1 = (number_B1 * below_BV[:, -1:]).contiguous()
    return torch.searchsorted(below_BV, searched_B1, right=True).squeeze(1).clamp(max=logits_BV.shape[-1] - 1)


def steps(
    decoder: Any,
    embed: Callable[[torch.Tensor], torch.Tensor],
    head: Callable[[torch.Tensor], torch.Tensor],
    embeds_BTD: torch.Tensor,
    mask_BT: torch.Tensor,
    cache: DynamicCache,
    stop_ids: list[int],
    max_new_tokens: int,
    choose: Choose = most_likely,
) -> Iterator[list[tuple[int, int]]]:
    """One token after another, until one of `stop_ids` (left out) or `max_new_tokens`: (row, token) of each step.

    Args:
        decoder: a causal LM.
        embed: ids `[B, 1]` → embeddings `[B, 1, D]`.
        head: hidden states `[B, D]` → logits `[B, V]`.
        embeds_BTD: what is to be read before the first new token, after what the cache holds.
        mask_BT: int64, over the cache and `embeds_BTD`; padding is 0.
        cache: from `new_cache` or `repeat_cache`; is used up.
    """
    open_rows = list(range(len(embeds_BTD)))  # of each row in the batch; those that have ended may still be among them
    ended: set[int] = set()
    for step in range(max_new_tokens):
        token_B = choose(head(read(decoder, embeds_BTD, mask_BT, cache)))
        written = []
        for row, token in zip(open_rows, token_B.tolist(), strict=True):
            if token in stop_ids:
                ended.add(row)
            elif row not in ended:
                written.append((row, token))
        yield written
        kept = [i for i, row in enumerate(open_rows) if row not in ended]
        if not kept or step == max_new_tokens - 1:
            break
        if len(kept) <= len(open_rows) // 2:  # a copy of the cache, at most log2(B) times
            chosen = torch.tensor(kept, device=token_B.device)
            cache.batch_select_indices(chosen)
            token_B, mask_BT, open_rows = token_B[chosen], mask_BT[chosen], [open_rows[i] for i in kept]
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
        embeds_BTD = embed(token_B.unsqueeze(1))


def gather(batch: int, written: Iterator[list[tuple[int, int]]]) -> list[list[int]]:
    """All tokens of each row, from `steps`."""
    rows: list[list[int]] = [[] for _ in range(batch)]
    for step in written:
        for row, token in step:
            rows[row].append(token)
    return rows
