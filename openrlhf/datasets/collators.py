"""Rows of records to the batch dicts of `CLaRa.forward`, one collator for each stage. Random draws are functions of
(seed, epoch, record), so that they do not depend on workers, ranks or where a run was resumed.
"""

import random
from collections import Counter
from typing import Any

import torch

from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.models.prompts import ANSWER, PARAPHRASE, QA, qa_answer
from openrlhf.models.tokens import ClaraTokens, Prompt

IGNORE = -100
# What is counted while collating, and how it is reported.
COUNTED = {
    "docs_cut": "documents longer than doc_max_length, cut",
    "docs_left_out": "documents beyond K, left out",
    "answers_cut": "answers cut by max_len",
    "answers_lost": "answers cut away entirely; these samples teach nothing",
}


class Collator:
    """Turns rows into a batch; subclasses say which documents and which texts.

    Args:
        tokens: layouts and prompts.
        stage: put into the batch.
        max_len: longest generator input, in tokens, prompt and answer together.
        k: documents an answer is given from.
        seed: of every random draw.
    """

    def __init__(self, tokens: ClaraTokens, stage: str, max_len: int, k: int, seed: int):
        self.tokens, self.stage, self.max_len, self.k, self.seed = tokens, stage, max_len, k, seed

    def __call__(self, rows: list[dict], epoch: int, train: bool = True) -> dict:
        """One batch.

        Args:
            rows: records with their `index` in the data set.
            epoch: seeds the draws, with the record's index.
            train: False takes the fixed choice instead of drawing.

        Returns:
            the dict `CLaRa.forward` takes, with `loss_count` (what the loss is a mean over), `counts` (see COUNTED)
            and `n_tokens` (attended tokens in all inputs).
        """
        rows = [self.arrange(row, self._rng(row, epoch) if train else None) for row in rows]
        counts: Counter = Counter(docs_left_out=sum(row.get("left_out", 0) for row in rows))
        documents = self.documents([doc for row in rows for doc in row["docs"]], counts)
        dec_ids, labels = self._generator_rows([self.prompt(row, epoch, train) for row in rows], counts)
        dec_input_ids, dec_mask = self.tokens.pad_left(dec_ids)
        batch: dict[str, Any] = {
            "stage": self.stage,
            **documents,
            "dec_input_ids": dec_input_ids,
            "dec_attention_mask": dec_mask,
            "labels": self.tokens.pad_left(labels, IGNORE)[0],
            "docs_per_question": torch.tensor([len(row["docs"]) for row in rows]),
            "pos_index": [row["pos_index"] for row in rows],
            "counts": counts,
        }
        batch.update(self.extra(rows))
        batch["loss_count"] = self.loss_count(batch)
        batch["n_tokens"] = int(sum(v.sum() for key, v in batch.items() if key.endswith("attention_mask")))
        return batch

    def _rng(self, row: dict, epoch: int) -> random.Random:
        return random.Random(f"{self.seed}/record/{epoch}/{row['index']}")

    def _generator_rows(self, prompts: list[Prompt], counts: Counter) -> tuple[list[list[int]], list[list[int]]]:
        """Ids and labels, cut to max_len on the right but never inside the documents."""
        ids, labels = [], []
        memory = set(self.tokens.memory_ids)
        for prompt in prompts:
            last_memory = max((i for i, token in enumerate(prompt.ids) if token in memory), default=-1)
            limit = max(self.max_len, last_memory + 1)
            counts["answers_cut"] += limit < len(prompt.ids) and limit > prompt.n_prompt
            counts["answers_lost"] += limit <= prompt.n_prompt
            ids.append(prompt.ids[:limit])
            labels.append(([IGNORE] * prompt.n_prompt + prompt.ids[prompt.n_prompt :])[:limit])
        return ids, labels

    def documents(self, docs: list[str], counts: Counter) -> dict:
        """The compressor's input; counts what it cuts."""
        encoder_rows = self.tokens.encoder_rows(docs)
        end = self.tokens.tokenizer.eos_token_id  # what a cut takes away first
        counts["docs_cut"] = sum(ids[-1] != end for ids in encoder_rows)
        ids, mask = self.tokens.encoder_batch(encoder_rows)
        return {"enc_input_ids": ids, "enc_attention_mask": mask}

    def arrange(self, row: dict, rng: random.Random | None) -> dict:
        """The row with the documents the batch shall hold."""
        return row

    def prompt(self, row: dict, epoch: int, train: bool) -> Prompt:
        """The generator input with its answer."""
        return self.tokens.build_prompt(ANSWER, min(len(row["docs"]), self.k), row["question"][0], row["answers"][0])

    def extra(self, rows: list[dict]) -> dict:
        """Entries only this stage has."""
        return {}

    def loss_count(self, batch: dict) -> int:
        """What the loss is a mean over: answer tokens, shifted by one as in the loss."""
        return int((batch["labels"][:, 1:] != IGNORE).sum())


class PretrainingCollator(Collator):
    """Stage 1: QA sets and paraphrases over one document."""

    def prompt(self, row: dict, epoch: int, train: bool) -> Prompt:
        """QA set, or a paraphrase under an instruction drawn by the seed (the first one in evaluation)."""
        if row["data_type"] == "qa":
            return self.tokens.build_prompt(QA, 1, answer=qa_answer(row["question"], row["answers"]))
        choices = len((self.tokens.config.prompts or {})["paraphrase_instructions"])
        drawn = self._rng(row, epoch).randrange(choices) if train else 0
        return self.tokens.build_prompt(PARAPHRASE, 1, answer=row["answers"][0], instruction=drawn)


class InstructionCollator(Collator):
    """Stage 1_2: a question over its first K documents."""

    def arrange(self, row: dict, rng: random.Random | None) -> dict:
        """Keeps the first K documents."""
        kept = [i for i in row["pos_index"] if i < self.k]
        return {**row, "docs": row["docs"][: self.k], "pos_index": kept, "left_out": max(0, len(row["docs"]) - self.k)}


class EndToEndCollator(Collator):
    """Stage 2: a question, its candidates in an order drawn by the seed, and the query reasoner's input."""

    def arrange(self, row: dict, rng: random.Random | None) -> dict:
        """Shuffles the candidates; pos_index follows them."""
        if rng is None:
            return row
        order = list(range(len(row["docs"])))
        rng.shuffle(order)
        positives = sorted(order.index(i) for i in row["pos_index"])
        return {**row, "docs": [row["docs"][i] for i in order], "pos_index": positives}

    def extra(self, rows: list[dict]) -> dict:
        """The questions as the query reasoner reads them."""
        ids, mask = self.tokens.encoder_batch(self.tokens.encoder_rows([row["question"][0] for row in rows]))
        return {"query_input_ids": ids, "query_attention_mask": mask}


class RetrievedCollator(EndToEndCollator):
    """Stage 2 with candidates that the model is to fetch: the questions, and how many documents each is to get.

    Args:
        candidates: documents fetched for a question, at least `k`.
        others: as `Collator`.
    """

    def __init__(self, *others, candidates: int):
        super().__init__(*others)
        self.candidates = candidates

    def documents(self, docs: list[str], counts: Counter) -> dict:
        """No input of the compressor."""
        return {}

    def prompt(self, row: dict, epoch: int, train: bool) -> Prompt:
        """The generator input over K documents that are not known yet."""
        return self.tokens.build_prompt(ANSWER, self.k, row["question"][0], row["answers"][0])

    def extra(self, rows: list[dict]) -> dict:
        """The questions, and the number of documents of each."""
        return {**super().extra(rows), "docs_per_question": torch.full((len(rows),), self.candidates)}


class RetrievalCollator(EndToEndCollator):
    """Supervised retrieval: as stage 2, the loss being a mean over questions that have positives."""

    def loss_count(self, batch: dict) -> int:
        """Questions with positives."""
        return sum(bool(positives) for positives in batch["pos_index"])


def documents_to_read(row: dict, k: int) -> list[int]:
    """Which K documents a text_rag answer is given from, in their order: those at `pos_index`, then the first others.

    Of more than K at `pos_index`, the first K.
    """
    others = [i for i in range(len(row["docs"])) if i not in row["pos_index"]]
    return sorted([*row["pos_index"], *others][:k])


class TextCollator(Collator):
    """The baseline text_rag: a question over K documents as text; nothing for a compressor.

    A prompt that leaves no room for its answer within max_len is cut like any other, and its sample counted as lost.
    """

    def arrange(self, row: dict, rng: random.Random | None) -> dict:
        """Keeps K documents, see `documents_to_read`."""
        kept = documents_to_read(row, self.k)
        positives = [place for place, i in enumerate(kept) if i in row["pos_index"]]
        docs = [row["docs"][i] for i in kept]
        return {**row, "docs": docs, "pos_index": positives, "left_out": len(row["docs"]) - len(docs)}

    def documents(self, docs: list[str], counts: Counter) -> dict:
        """No input of a compressor; counts what is cut where it would cut."""
        counts["docs_cut"] = sum(self.tokens.seen_text(doc) != doc for doc in docs)
        return {}

    def prompt(self, row: dict, epoch: int, train: bool) -> Prompt:
        """The answer prompt over the documents' texts."""
        return self.tokens.text_prompt(row["question"][0], row["docs"], row["answers"][0])


COLLATORS: dict[str, type[Collator]] = {
    "stage1": PretrainingCollator,
    "stage1_2": InstructionCollator,
    "stage2": EndToEndCollator,
    "stage2_pretrain_retrieval": RetrievalCollator,
    TEXT_RAG: TextCollator,
}


def text_length(row: dict) -> int:
    """Characters a row puts into the model, to batch rows of like length together."""
    return sum(map(len, row["docs"])) + sum(map(len, row["question"])) + sum(map(len, row["answers"]))
