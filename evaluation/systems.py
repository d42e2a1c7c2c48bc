"""The systems that are measured: CLaRa, and what one would use instead of it (SPEC 8).

Every system that answers uses the same base model, greedy decoding and the same limit of new tokens. The text systems
read passages cut where the compressor cuts them, in CLaRa's own answer prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from evaluation.config import EvaluationConfig
from evaluation.llmlingua import compress_texts
from evaluation.questions import END_TO_END, PRETRAINING, Question
from evaluation.rankers import bm25_scores, cross_encoder_scores, dense_scores, random_scores, ranking
from evaluation.runner import CompressedDocuments, Runner
from evaluation.scoring import SYSTEM
from openrlhf.models.adapters import DECODER
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.models.prompts import CLOSED_BOOK_SYSTEM, CLOSED_BOOK_USER, PARAPHRASE
from openrlhf.models.selection import select_documents
from openrlhf.models.tokens import Prompt

CLARA, CLOSED_BOOK, TEXT_RAG, ORACLE_TEXT, LLMLINGUA = SYSTEM, "closed_book", "text_rag", "oracle_text", "llmlingua2"
TEXT_RAG_TUNED, ORACLE_TEXT_TUNED = "text_rag_tuned", "oracle_text_tuned"
RANDOM, BM25, DENSE, CROSS_ENCODER = "random", "bm25", "dense", "cross_encoder"
TEXT_RAG_ADAPTER = "text_rag_adapter"
"""The generator adapter of --text_rag_checkpoint, beside CLaRa's own on the same base model."""


@dataclass
class TextSystem:
    """A baseline that answers from text: a prompt for each question it can answer, and what that prompt holds.

    adapter: what it generates with; None is the bare base model.
    """

    description: str
    prompts: dict[int, Prompt] = field(default_factory=dict)
    selected: dict[int, list[dict]] = field(default_factory=dict)
    adapter: str | None = None


def text_ranker(config: EvaluationConfig) -> str:
    """Which ranking chooses the passages of text RAG: the strongest that was asked for."""
    return CROSS_ENCODER if config.cross_encoder else DENSE if config.dense_model else BM25


def rank_candidates(
    questions: Sequence[Question], config: EvaluationConfig, device: str
) -> dict[str, list[list[float]]]:
    """Scores of each question's candidates by every baseline that ranks: {system: [question][candidate]}."""
    asked, pools = [q.question for q in questions], [list(q.docs) for q in questions]
    scores = {RANDOM: random_scores(asked, pools, config.seed), BM25: bm25_scores(asked, pools)}
    if config.dense_model:
        scores[DENSE] = dense_scores(asked, pools, config.dense_model, device, config.batch_size)
    if config.cross_encoder:
        scores[CROSS_ENCODER] = cross_encoder_scores(asked, pools, config.cross_encoder, device, config.batch_size)
    return scores


def chosen(scores: Sequence[float], k: int) -> list[dict]:
    """The k best candidates as predictions.jsonl has them."""
    return [{"index": i, "score": round(float(scores[i]), 6)} for i in ranking(list(scores))[:k]]


def text_systems(
    questions: Sequence[Question],
    model: CLaRa,
    config: EvaluationConfig,
    scores: dict[str, list[list[float]]],
    runner: Runner,
) -> dict[str, TextSystem]:
    """Prompts of the baselines that answer; `scores` as `rank_candidates` gives them."""
    if config.suite == PRETRAINING:
        prompts = model.config.prompts or {}
        user, system = prompts["paraphrase_instructions"][0], prompts["paraphrase_system"]
        full = TextSystem("the base model, told to paraphrase the document's text")
        for i, q in enumerate(questions):
            before, _, after = user.partition("{docs}")
            full.prompts[i] = model.tokens.plain_prompt(system, before + model.tokens.seen_text(q.docs[0]) + after)
        return {ORACLE_TEXT: full}
    k, ranker = model.config.generation_top_k, text_ranker(config)
    everything = config.suite != END_TO_END
    read = "all passages given" if everything else f"the {k} passages that {ranker} ranks best"
    closed = TextSystem("the base model without any passage")
    rag = TextSystem(f"the base model reading the text of {read}")
    oracle = TextSystem("the base model reading the text of the gold passages")
    for i, q in enumerate(questions):
        asked = CLOSED_BOOK_USER.partition("{query}")[0] + q.question
        closed.prompts[i] = model.tokens.plain_prompt(CLOSED_BOOK_SYSTEM, asked)
        rag.selected[i] = (
            [{"index": n, "score": None} for n in range(len(q.docs))] if everything else chosen(scores[ranker][i], k)
        )
        rag.prompts[i] = model.text_prompt(q.question, [q.docs[s["index"]] for s in rag.selected[i]])
        if q.oracle_docs:
            oracle.prompts[i] = model.text_prompt(q.question, list(q.oracle_docs))
    systems = {CLOSED_BOOK: closed, TEXT_RAG: rag, ORACLE_TEXT: oracle}
    if config.text_rag_checkpoint:
        tuned = f"the base model with an adapter of rank {model.config.lora_r} trained to answer from text (text_rag), "
        for name, system, what in (
            (TEXT_RAG_TUNED, rag, f"reading {read}"),
            (ORACLE_TEXT_TUNED, oracle, "reading the gold passages"),
        ):
            systems[name] = replace(system, description=tuned + what, adapter=TEXT_RAG_ADAPTER)
    if config.llmlingua_model:
        systems[LLMLINGUA] = _llmlingua(questions, model, config, rag, runner)
    return systems


def _llmlingua(
    questions: Sequence[Question], model: CLaRa, config: EvaluationConfig, rag: TextSystem, runner: Runner
) -> TextSystem:
    budget = model.config.n_memory_tokens
    system = TextSystem(f"text RAG over the same passages, each compressed by LLMLingua-2 to {budget} tokens at most")
    passages = [[q.docs[s["index"]] for s in rag.selected[i]] for i, q in enumerate(questions)]

    def count_tokens(text: str) -> int:
        return len(model.tokens.plain_ids([text])[0])

    def shorten() -> list[list[str]]:
        seen = [[model.tokens.seen_text(text) for text in texts] for texts in passages]
        name, device = str(config.llmlingua_model), str(model.device)
        return compress_texts(seen, budget, count_tokens, name, device, config.batch_size)

    for i, (question, texts) in enumerate(zip(questions, runner.once("llmlingua2", shorten), strict=True)):
        system.prompts[i], system.selected[i] = model.text_prompt(question.question, texts), rag.selected[i]
    return system


def clara_prompt(model: CLaRa, question: Question, suite: str) -> Prompt:
    """The generator's input for one question."""
    if suite == PRETRAINING:
        return model.build_prompt(PARAPHRASE, 1)
    n = len(question.docs)
    return model.answer_prompt(question.question, min(n, model.config.generation_top_k) if suite == END_TO_END else n)


def clara(
    model: CLaRa, documents: CompressedDocuments, suite: str, max_new_tokens: int, answers: bool = True
) -> Callable[[list[Question]], list[dict]]:
    """CLaRa on a batch: selects the best candidates (end to end) or reads all documents, and generates, unless
    `answers` are not wanted of what it selects."""

    def select(batch: list[Question]) -> list[dict]:
        counts_B = torch.tensor([len(q.docs) for q in batch])
        docs_MLD = documents[[doc for q in batch for doc in q.docs]].to(model.device)
        query_BE = model.encode_queries([q.question for q in batch])
        k, temperature = model.config.generation_top_k, model.config.topk_temperature
        chosen_KLD, topk_BK, scores_BN = select_documents(query_BE, docs_MLD, counts_B, k, temperature)
        answered: list[dict] = [{"prediction": None}] * len(batch)
        if answers:
            texts, prompts = generate(batch, list(chosen_KLD.split(counts_B.clamp(max=k).tolist())))
            pairs = zip(texts, prompts, strict=True)
            answered = [{"prediction": text, "prompt_tokens": len(prompt.ids)} for text, prompt in pairs]
        lines = []
        for row, answer in enumerate(answered):
            scores, read = scores_BN[row, : counts_B[row]].tolist(), [i for i in topk_BK[row].tolist() if i >= 0]
            lines.append(
                {
                    **answer,
                    "selected": [{"index": i, "score": round(scores[i], 6)} for i in read],
                    # What was read comes first, also among candidates of equal score.
                    "ranking": [*read, *(i for i in ranking(scores) if i not in read)],
                }
            )
        return lines

    def read(batch: list[Question]) -> list[dict]:
        docs = [documents[q.docs].to(model.device) for q in batch]
        return [
            {
                "prediction": text,
                "selected": [{"index": n, "score": None} for n in range(len(q.docs))],
                "ranking": None,
                "prompt_tokens": len(prompt.ids),
            }
            for q, text, prompt in zip(batch, *generate(batch, docs), strict=True)
        ]

    def generate(batch: list[Question], docs: list[torch.Tensor]) -> tuple[list[str], list[Prompt]]:
        prompts = [clara_prompt(model, q, suite) for q in batch]
        return model.generate_from_prompts(prompts, docs, max_new_tokens, DECODER), prompts

    return select if suite == END_TO_END else read


def plain(model: CLaRa, adapter: str | None, max_new_tokens: int) -> Callable[[list[Prompt]], list[dict]]:
    """The base model, with `adapter` or bare, on a batch of prompts without memory tokens."""

    def answer(batch: list[Prompt]) -> list[dict]:
        texts = model.generate_from_prompts(batch, None, max_new_tokens, adapter)
        return [{"prediction": t, "prompt_tokens": len(p.ids)} for t, p in zip(texts, batch, strict=True)]

    return answer


def answer_texts(name: str, system: TextSystem, runner: Runner, answer: Callable | None) -> dict[int, dict]:
    """Generates (`answer` given) or collects a text system's answers by question; equal prompts are answered once."""
    distinct = list({tuple(p.ids): p for p in system.prompts.values()}.values())
    lengths = [len(p.ids) for p in distinct]
    if answer is not None:
        runner.generate(name, distinct, lengths, answer)
        return {}
    results = {tuple(p.ids): line for p, line in zip(distinct, runner.collect(name, lengths), strict=True)}
    selected = system.selected
    return {
        i: {**results[tuple(p.ids)], **({"selected": selected[i]} if i in selected else {})}
        for i, p in system.prompts.items()
    }
