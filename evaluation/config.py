"""EvaluationConfig: every flag of `evaluation.evaluate`, its default, and what is checked before a model loads."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from evaluation.questions import END_TO_END, NORMAL, ORACLE, PARAPHRASE, PRETRAINING

DTYPES = ("auto", "float32", "bfloat16", "float16")


def _flag(default, text: str):
    return field(default=default, metadata={"help": text})


def names(value: str | None) -> list[str]:
    """The parts of a list written with commas or blanks."""
    return (value or "").replace(",", " ").split()


@dataclass
class EvaluationConfig:
    """Flags of an evaluation, checked when made.

    Raises:
        ValueError: a value that cannot be evaluated; all that is wrong is listed.
    """

    checkpoint: str = _flag("", "CLaRa checkpoint: directory or Hub repository (required)")
    subfolder: str = _flag("", "folder inside the checkpoint, e.g. compression-16")
    model_path: str | None = _flag(None, "base model, where it is not at the place the checkpoint names")
    suite: Literal["end_to_end", "instruction_tuning", "pretraining"] = _flag(
        "end_to_end", "select among the candidates and answer; read all documents and answer; or paraphrase"
    )
    eval_data: str = _flag("./example/evaluation_data", "directory of the evaluation data")
    datasets: str | None = _flag(None, "data sets, comma-separated (default: all of the suite in --eval_data)")
    setting: str | None = _flag(None, "normal, oracle, or both comma-separated (default: both)")
    max_questions: int | None = _flag(None, "the first so many questions of each file (default: all)")
    output_dir: str = _flag("./results/evaluation", "where results.json, predictions.jsonl and table.md go")
    overwrite: bool = _flag(False, "delete what --output_dir holds of another run")

    generation_top_k: int | None = _flag(None, "K: documents an answer is given from (default: the checkpoint's)")
    max_new_tokens: int | None = _flag(None, "tokens of an answer at most (default: the checkpoint's)")
    batch_size: int = _flag(32, "texts that go through the model together; halved where memory runs out")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _flag("auto", "auto: bfloat16 on CUDA, float32 on CPU")
    document_store: str | None = _flag(
        None, "a store of compressed documents (compress_corpus) to read from; what it lacks is compressed"
    )
    copy_compressor: bool = _flag(
        False, "end_to_end suite on a checkpoint from before stage 2: select with a copy of its compressor"
    )
    answers: bool = _flag(True, "answer the questions; off: only rank the candidates of the end_to_end suite")
    first_answer_only: bool = _flag(False, "score against the first gold answer only, as the public script does")
    seed: int = _flag(42, "of the random ranking and of the bootstrap")

    baselines: bool = _flag(True, "measure closed book, text RAG, oracle text, random and BM25 too")
    dense_model: str | None = _flag(None, "sentence-transformers model to rank with")
    cross_encoder: str | None = _flag(None, "sentence-transformers cross-encoder to rank with")
    text_rag_checkpoint: str | None = _flag(
        None, "checkpoint of stage text_rag on the same base model: text RAG and oracle text with its adapter too"
    )
    llmlingua_model: str | None = _flag(None, "LLMLingua-2 model: text RAG over passages compressed to CLaRa's budget")
    bertscore_model: str | None = _flag(None, "pretraining suite: model for BERTScore")
    entity_model: str | None = _flag(None, "pretraining suite: spaCy model for the preservation of named entities")

    def __post_init__(self):
        problems = [] if self.checkpoint else ["--checkpoint is required: the directory of a CLaRa checkpoint"]
        for name in ("max_questions", "generation_top_k", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                problems.append(f"--{name} must be positive, got {value}")
        known = [PARAPHRASE] if self.suite == PRETRAINING else [NORMAL, ORACLE]
        self.settings = list(dict.fromkeys(names(self.setting) or known))
        if set(self.settings) - set(known):
            problems.append(f"--setting {self.setting}: the {self.suite} suite has {' and '.join(known)}")
        if self.copy_compressor and self.suite != END_TO_END:
            problems.append("--copy_compressor selects documents, which only --suite end_to_end does")
        if not self.answers and self.suite != END_TO_END:
            problems.append("--no_answers leaves nothing to measure but a ranking, which only --suite end_to_end has")
        self.dataset_names = list(dict.fromkeys(names(self.datasets)))
        for name in ("dense_model", "cross_encoder", "text_rag_checkpoint", "llmlingua_model"):
            if getattr(self, name) and (not self.baselines or self.suite == PRETRAINING):
                problems.append(f"--{name} is a baseline: it needs --baselines and a suite that answers questions")
        for name in ("text_rag_checkpoint", "llmlingua_model"):
            if getattr(self, name) and not self.answers:
                problems.append(f"--{name} answers from text, and does not go with --no_answers")
        for name in ("bertscore_model", "entity_model"):
            if getattr(self, name) and self.suite != PRETRAINING:
                problems.append(f"--{name} scores paraphrases: use it with --suite pretraining")
        target = Path(self.output_dir)
        if target.exists() and not target.is_dir():
            problems.append(f"--output_dir {target} is a file")
        elif not os.access(next(p for p in (target, *target.resolve().parents) if p.exists()), os.W_OK):
            problems.append(f"--output_dir {target} cannot be written")
        if problems:
            raise ValueError("\n".join(f"- {problem}" for problem in problems))
