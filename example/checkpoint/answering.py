"""Text in, text out: what CLaRa answers with, over the tensors of `modeling_clara`.

Contract: an answer depends on its own question and documents alone, never on what shares a batch with it. Knows nothing
about training.

Shape suffixes as in `modeling_clara`.
"""

import functools
import itertools
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .adapters import DECODER, AdapterRouter
from .configuration_clara import CLaRaConfig
from .generation import gather, new_cache, read, repeat_cache, sampler, steps
from .prompts import ANSWER, PARAPHRASE
from .selection import select_documents
from .tokens import ClaraTokens, Prompt


def inference(method: Callable) -> Callable:
    """Runs a method without gradients and in eval mode (no LoRA dropout), then restores the mode."""

    @functools.wraps(method)
    def run(self, *args, **kwargs):
        with torch.no_grad(), self.frozen():
            return method(self, *args, **kwargs)

    return run


class TextPieces:
    """The text of tokens as they come, in pieces of whole characters, without white space around it all."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._tokens, self._sent = tokenizer, list[int](), ""

    def add(self, tokens: list[int]) -> str:
        """The piece that is certain now, often none: a character may be several tokens, and white space may be the
        last."""
        self._tokens += tokens
        ready = self._text().lstrip().rstrip("\ufffd").rstrip()
        if not ready.startswith(self._sent):
            return ""
        piece, self._sent = ready[len(self._sent) :], ready
        return piece

    def rest(self) -> str:
        """The last piece, once there are no more tokens."""
        piece, self._sent = self._text().strip()[len(self._sent) :], self._text().strip()
        return piece

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=True))


class Answering:
    """The generating half of `CLaRa`."""

    if TYPE_CHECKING:  # what the other half has
        config: CLaRaConfig
        tokens: ClaraTokens
        router: AdapterRouter
        decoder: Any
        inference_batch: int
        frozen: Callable
        embed: Callable
        base_logits: Callable
        place: Callable
        compress_documents: Callable
        encode_queries: Callable
        _check_compressor: Callable

        @property
        def device(self) -> torch.device: ...

        @property
        def has_compressor(self) -> bool: ...

    @inference
    def generate_from_questions(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int | None = None
    ) -> tuple[list[str], torch.Tensor]:
        """Selects `generation_top_k` of each question's documents by cosine and answers from them.

        Returns:
            answers, and topk_idx `[B, K]` int64: positions in each question's own list, best first, −1 where a list
            is shorter than K.
        """
        counts_B = _check_documents(questions, documents)
        docs_MLD, _ = self.compress_documents([doc for docs in documents for doc in docs])
        query_BE = self.encode_queries(questions)
        k, temperature = self.config.generation_top_k, self.config.topk_temperature
        chosen_KLD, topk_BK, _ = select_documents(query_BE, docs_MLD, counts_B, k, temperature)
        used = counts_B.clamp(max=k).tolist()
        prompts = [self.answer_prompt(q, n) for q, n in zip(questions, used, strict=True)]
        return self.generate_from_prompts(prompts, list(chosen_KLD.split(used)), max_new_tokens), topk_BK

    @inference
    def generate_from_text(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int | None = None
    ) -> list[str]:
        """Answers from all of each question's documents, in the given order: compressed, or, with a text_rag
        checkpoint, read as text."""
        counts = _check_documents(questions, documents).tolist()
        if not self.has_compressor:
            texts = [self.text_prompt(q, docs) for q, docs in zip(questions, documents, strict=True)]
            return self.generate_from_prompts(texts, None, max_new_tokens)
        docs_MLD, _ = self.compress_documents([doc for docs in documents for doc in docs])
        prompts = [self.answer_prompt(q, n) for q, n in zip(questions, counts, strict=True)]
        return self.generate_from_prompts(prompts, list(docs_MLD.split(counts)), max_new_tokens)

    @inference
    def generate_from_paraphrase(
        self, questions: list[str], documents: list[list[str]], max_new_tokens: int | None = None
    ) -> list[str]:
        """Says the documents again from their memory vectors; `questions` only gives the number of rows."""
        counts = _check_documents(questions, documents).tolist()
        docs_MLD, _ = self.compress_documents([doc for docs in documents for doc in docs])
        prompts = [self.build_prompt(PARAPHRASE, n) for n in counts]
        return self.generate_from_prompts(prompts, list(docs_MLD.split(counts)), max_new_tokens)

    @inference
    def generate_from_compressed_documents_and_questions(
        self, questions: list[str], compressed_documents: torch.Tensor, max_new_tokens: int | None = None
    ) -> list[str]:
        """Answers from vectors `[B·K, L, D]` made earlier by `compress_documents`, K documents for each question.

        Raises:
            ValueError: the number of rows is not a multiple of the number of questions, or another model made them.
        """
        self._check_compressor()
        shape = (self.config.n_memory_tokens, self.decoder.config.hidden_size)
        if compressed_documents.shape[1:] != shape:
            raise ValueError(
                f"compressed documents must be [B·K, {shape[0]}, {shape[1]}] for this model, got "
                f"{tuple(compressed_documents.shape)}: compress them with this checkpoint"
            )
        if not questions or compressed_documents.shape[0] % len(questions) or compressed_documents.shape[0] == 0:
            raise ValueError(
                f"{compressed_documents.shape[0]} compressed documents cannot be shared by {len(questions)} questions: "
                "give K of them for each question"
            )
        k = compressed_documents.shape[0] // len(questions)
        prompts = [self.answer_prompt(q, k) for q in questions]
        return self.generate_from_prompts(prompts, list(compressed_documents.to(self.device).split(k)), max_new_tokens)

    def build_prompt(self, kind: str, n_docs: int, query: str = "", **options) -> Prompt:
        """See `ClaraTokens.build_prompt`."""
        return self.tokens.build_prompt(kind, n_docs, query, **options)

    def answer_prompt(self, question: str, n_docs: int) -> Prompt:
        """The prompt that answers `question` from n_docs documents."""
        return self.build_prompt(ANSWER, n_docs, question)

    def text_prompt(self, question: str, documents: list[str]) -> Prompt:
        """The answer prompt with texts in place of vectors, each cut where the compressor cuts it.

        Raises:
            ValueError: the checkpoint's prompts are not known.
        """
        return self.tokens.text_prompt(question, documents)

    @inference
    def generate_from_prompts(
        self,
        prompts: list[Prompt],
        docs: list[torch.Tensor] | None = None,
        max_new_tokens: int | None = None,
        adapter: str | None = DECODER,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """Texts for ready prompts, in batches of like length: greedy, or drawn at a temperature above 0.

        Args:
            prompts: from `build_prompt`, `text_prompt` or `tokens.plain_prompt`.
            docs: row i reads `docs[i]` `[K_i, L, D]`; None where no prompt has memory tokens.
            adapter: to generate with; None is the bare base model.

        Raises:
            ValueError: a prompt with its new tokens is longer than the base model's positions, or its memory tokens
                are not those of its documents.
        """
        max_new_tokens = max_new_tokens or self.config.max_new_tokens
        if docs is None:
            shape = (0, self.config.n_memory_tokens, self.decoder.config.hidden_size)
            docs = [torch.empty(shape, device=self.device)] * len(prompts)
        self.check_positions(prompts, max_new_tokens)
        stop_ids = self.stop_ids()
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
        texts = [""] * len(prompts)
        with self.router.route(adapter):
            start_ids = self._shared_start(prompts)
            start = new_cache(self.decoder.config)
            if start_ids:
                ids_1T = torch.tensor([start_ids], device=self.device)
                read(self.decoder, self.embed(ids_1T), torch.ones_like(ids_1T), start)
            for first in range(0, len(order), self.inference_batch):
                chosen = order[first : first + self.inference_batch]
                ids, mask = self.tokens.pad_left([prompts[i].ids[len(start_ids) :] for i in chosen])
                mask = torch.cat([mask.new_ones(len(chosen), len(start_ids)), mask], dim=1).to(self.device)
                counts = torch.tensor([len(docs[i]) for i in chosen])
                embeds_BTD = self.place(ids.to(self.device), torch.cat([docs[i] for i in chosen]), counts)
                cache = repeat_cache(start, len(chosen))
                choose = sampler(temperature, seed)
                parts = (self.decoder, self.embed, self.base_logits)
                new = gather(len(chosen), steps(*parts, embeds_BTD, mask, cache, stop_ids, max_new_tokens, choose))
                decoded = self.tokens.tokenizer.batch_decode(new, skip_special_tokens=True)
                for i, text in zip(chosen, decoded, strict=True):
                    texts[i] = text.strip()
        return texts

    def stream_from_prompt(
        self,
        prompt: Prompt,
        docs_KLD: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        adapter: str | None = DECODER,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Iterator[str]:
        """The text that `generate_from_prompts` gives for one prompt, piece by piece as it is written.

        A piece is whole characters; the start's white space is left out. The model is in eval mode and routed only
        while a piece is made, so that other calls may come between two.
        """
        max_new_tokens = max_new_tokens or self.config.max_new_tokens
        self.check_positions([prompt], max_new_tokens)
        ids, mask = self.tokens.pad_left([prompt.ids])
        if docs_KLD is None:
            docs_KLD = torch.empty(0, self.config.n_memory_tokens, self.decoder.config.hidden_size)
        cache, stop_ids = new_cache(self.decoder.config), self.stop_ids()
        text = TextPieces(self.tokens.tokenizer)
        with torch.no_grad():
            counts = torch.tensor([len(docs_KLD)])
            embeds_1TD = self.place(ids.to(self.device), docs_KLD.to(self.device), counts)
        parts = (self.decoder, self.embed, self.base_logits)
        choose = sampler(temperature, seed)
        made = steps(*parts, embeds_1TD, mask.to(self.device), cache, stop_ids, max_new_tokens, choose)
        while True:
            with torch.no_grad(), self.frozen(), self.router.route(adapter):
                step = next(made, None)
            if step is None:
                break
            if piece := text.add([token for _, token in step]):
                yield piece
        if piece := text.rest():
            yield piece

    def check_positions(self, prompts: list[Prompt], max_new_tokens: int) -> None:
        """Raises ValueError when a prompt with its new tokens is longer than the base model's positions."""
        limit = getattr(self.decoder.config, "max_position_embeddings", None)
        longest = max((len(p.ids) for p in prompts), default=0)
        if limit and longest + max_new_tokens > limit:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the base model's {limit}: "
                "give fewer documents or lower max_new_tokens"
            )

    def _shared_start(self, prompts: list[Prompt]) -> list[int]:
        """Ids that several prompts begin with, before any document and shorter than each of them."""
        if len(prompts) < 2:
            return []
        shared = os.path.commonprefix([prompt.ids[:-1] for prompt in prompts])
        memory = set(self.tokens.memory_ids)
        return list(itertools.takewhile(lambda token: token not in memory, shared))

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the tokenizer's and the base model's own, and the chat template's end of turn."""
        own = self.decoder.generation_config.eos_token_id
        ids = {self.tokens.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
        prompts = self.config.prompts
        if prompts is not None:
            ids.update(self.tokens.end_of_turn_ids(prompts["answer_system"], prompts["answer_user"]))
        return sorted(i for i in ids if i is not None)


def _check_documents(questions: list[str], documents: list[list[str]]) -> torch.Tensor:
    """Number of documents of each question `[B]`; ValueError when the lists do not pair up or one is empty."""
    if isinstance(documents, str) or any(isinstance(docs, str) for docs in documents):
        raise ValueError("documents must be one list of strings for each question, e.g. [[doc, doc], [doc]]")
    if len(questions) != len(documents) or not questions:
        raise ValueError(
            f"{len(questions)} questions for {len(documents)} lists of documents: give one list a question"
        )
    empty = [i for i, docs in enumerate(documents) if not docs]
    if empty:
        raise ValueError(f"question {empty[0]} has no documents; every question needs at least one")
    return torch.tensor([len(docs) for docs in documents])
