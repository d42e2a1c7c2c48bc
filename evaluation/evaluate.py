"""Measure a CLaRa checkpoint, and what one would use instead of it, with intervals (SPEC 8).

    python -m evaluation.evaluate --checkpoint DIR --suite end_to_end --eval_data DIR --output_dir results/mine
    accelerate launch --num_processes 8 -m evaluation.evaluate …        the same figures, sooner

Writes results.json, predictions.jsonl (one line a question) and table.md to --output_dir. Started again after an
interruption it goes on where it was: until the end --output_dir holds `work`, with the batches that are done.
"""

import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from evaluation import systems
from evaluation.checks import TABLE, WORK, check_checkpoint, check_models, check_text_rag, open_output, run_facts
from evaluation.config import EvaluationConfig
from evaluation.paper import paper_rows
from evaluation.questions import END_TO_END, PRETRAINING, Question, dataset_files, file_facts, load_questions
from evaluation.rankers import ranking
from evaluation.report_data import PREDICTIONS_FILE, RESULTS_FILE, RESULTS_FORMAT
from evaluation.results import add_paraphrase_scores, git_state, notes, prediction_line, versions
from evaluation.runner import OutOfMemory, Runner
from evaluation.scoring import figures, markdown_table
from openrlhf.models.adapters import DECODER, read_adapter
from openrlhf.models.fingerprint import fingerprint
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.retrieval.compress import vectors_of
from openrlhf.retrieval.store import Store
from openrlhf.utils.logging import set_up_logging, write_whole

logger = logging.getLogger("evaluation")


def parse(argv: list[str] | None) -> EvaluationConfig:
    """Flags to a checked configuration; prints what is wrong and exits with 2."""
    parser = HfArgumentParser(EvaluationConfig, allow_abbrev=False, description=__doc__.split("\n")[0])  # type: ignore
    try:
        (config,) = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        parser.exit(2, f"evaluate: these flags cannot be evaluated:\n{error}\n")
    return config


def load(config: EvaluationConfig, work: "Work", device: torch.device) -> CLaRa:
    """The model as it is measured."""
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype is None:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    options = {"generation_top_k": work.facts["generation_top_k"], "decoder_model_name": work.facts["base_model"]}
    if config.copy_compressor:
        options["training_stage"] = "stage2"
    model = CLaRa.from_pretrained(config.checkpoint, subfolder=config.subfolder, dtype=dtype, **options)
    if model.config.quantization == "no":
        model.to(device)  # type: ignore[arg-type]
    if work.text_rag is not None:
        weights = read_adapter(work.text_rag / DECODER, model.config.lora_r)
        model.attach_adapter(systems.TEXT_RAG_ADAPTER, weights, str(work.text_rag))
    model.inference_batch = config.batch_size
    return model


def answer_all(
    questions: list[Question], model: CLaRa, config: EvaluationConfig, facts: dict, runner: Runner
) -> tuple[list[dict], dict[str, str]]:
    """Every system's answers to the questions of one data set, all settings together.

    Returns:
        lines of predictions.jsonl (on the main process), and what each system is.
    """
    texts = list(dict.fromkeys(doc for q in questions for doc in q.docs))
    rows = model.tokens.encoder_rows(texts)
    new_tokens = facts["max_new_tokens"]
    scores: dict[str, list[list[float]]] = {}
    readers: dict[str, systems.TextSystem] = {}
    if config.baselines and config.suite != PRETRAINING:
        device = str(runner.state.device)
        scores = runner.once("rankings", lambda: systems.rank_candidates(questions, config, device))
    if config.baselines and config.answers:
        readers = systems.text_systems(questions, model, config, scores, runner)
    lengths = [len(systems.clara_prompt(model, q, config.suite).ids) for q in questions]
    check_positions(model, lengths + [len(p.ids) for r in readers.values() for p in r.prompts.values()], new_tokens)
    documents = runner.compress(texts, [len(row) for row in rows], compressor(model, config))
    clara = systems.clara(model, documents, config.suite, new_tokens, config.answers)
    runner.generate(systems.CLARA, questions, lengths, clara)
    for name, reader in readers.items():
        systems.answer_texts(name, reader, runner, systems.plain(model, reader.adapter, new_tokens))
    runner.state.wait_for_everyone()
    described = {systems.CLARA: clara_description(config, facts)}
    described |= {name: reader.description for name, reader in readers.items()}
    described |= {name: f"{name} ranking of the candidates" for name in scores}
    if not runner.state.is_main_process:
        return [], described
    answers = runner.collect(systems.CLARA, lengths)
    answered = {name: systems.answer_texts(name, reader, runner, None) for name, reader in readers.items()}
    lines = []
    for i, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        baselines = {name: by_question[i] for name, by_question in answered.items() if i in by_question}
        for name, by_question in scores.items():
            ranked = {"ranking": ranking(by_question[i]), "selected": systems.chosen(by_question[i], 5)}
            baselines[name] = ranked
        lines.append(prediction_line(question, answer, baselines))
    return lines, described


def compressor(model: CLaRa, config: EvaluationConfig) -> Callable[[list[str]], torch.Tensor]:
    """Texts → memory vectors, from --document_store where it holds them.

    Raises:
        ValueError: another compressor filled the store.
    """
    if config.document_store is None:
        return lambda part: model.compress_documents(part)[0]
    store = Store.open(config.document_store, fingerprint(model))
    return lambda part: vectors_of(model, part, store)


def check_positions(model: CLaRa, lengths: list[int], new_tokens: int) -> None:
    """Raises ValueError when a prompt and its answer do not fit the base model; before anything is generated."""
    limit = getattr(model.decoder.config, "max_position_embeddings", None)
    if limit and max(lengths) + new_tokens > limit:
        raise ValueError(
            f"the longest prompt has {max(lengths)} tokens; with {new_tokens} new ones that is over the base model's "
            f"{limit}: lower --max_new_tokens or --generation_top_k, or leave the text systems out: --baselines no"
        )


def clara_description(config: EvaluationConfig, facts: dict) -> str:
    """What CLaRa reads in this suite."""
    n = facts["n_memory_tokens"]
    if config.suite == END_TO_END:
        by = " with a copy of its compressor" if config.copy_compressor else ""
        return f"CLaRa, selecting{by} {facts['generation_top_k']} of the candidates, {n} vectors each"
    return f"CLaRa reading {'the document' if config.suite == PRETRAINING else 'all documents'}, {n} vectors each"


@dataclass
class Work:
    """What is to be measured, checked."""

    root: Path
    facts: dict
    questions: dict[str, list[Question]]
    data: list[dict]
    text_rag: Path | None = None


def prepare(config: EvaluationConfig) -> Work:
    """Finds and checks everything, in seconds and without a model.

    Raises:
        ValueError, OSError: something cannot be evaluated; the message says what to do.
    """
    root, facts = check_checkpoint(config)
    text_rag = check_text_rag(config, root, facts["base_model"])
    check_models(config)
    work = Work(root, facts, {}, [], text_rag)
    files = dataset_files(config.eval_data, config.suite, config.dataset_names, config.settings)
    for dataset, by_setting in files.items():
        work.questions[dataset] = load_questions(by_setting, dataset, config.suite, config.max_questions)
        for setting, path in by_setting.items():
            number = sum(question.setting == setting for question in work.questions[dataset])
            work.data.append({"dataset": dataset, "setting": setting, **file_facts(path), "questions": number})
    return work


def measure(config: EvaluationConfig, state: PartialState, work: Work) -> None:
    """Answers, scores and writes everything."""
    started, start = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    target, commit = Path(config.output_dir), git_state()  # now: the clone may move on while this runs
    resumed = (target / WORK).is_dir()
    model = load(config, work, state.device)
    lines: list[dict] = []
    described: dict[str, str] = {}
    for dataset, questions in work.questions.items():
        logger.info("%s: %d questions (%s)", dataset, len(questions), ", ".join(config.settings))
        runner = Runner(target / WORK / dataset, config.batch_size, state)
        answered, described = answer_all(questions, model, config, work.facts, runner)
        lines += answered
    if not state.is_main_process:
        return
    dtype = model.dtype
    del model
    if config.suite == PRETRAINING:
        add_paraphrase_scores(lines, config)
    resolved = {**asdict(config), **work.facts, "datasets": list(work.questions), "settings": config.settings}
    results = {
        "format": RESULTS_FORMAT,
        "suite": config.suite,
        "config": {**resolved, "systems": list(described), "dtype": str(dtype).removeprefix("torch.")},
        "versions": versions(),
        "git": commit,
        "command": shlex.join(["python", "-m", "evaluation.evaluate", *sys.argv[1:]]),
        "started": started,
        "seconds": round(time.perf_counter() - start, 1),
        "device": torch.cuda.get_device_name() if state.device.type == "cuda" else state.device.type,
        "processes": state.num_processes,
        "data": work.data,
        "systems": described,
        "figures": figures(lines, config.first_answer_only, config.seed),
        "notes": notes(config, lines, dtype, resumed),
    }
    write_whole(target / PREDICTIONS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    write_whole(target / TABLE, markdown_table(results, paper_rows(config.suite, work.facts["compr_rate"])))
    write_whole(target / RESULTS_FILE, json.dumps(results, indent=1, ensure_ascii=False))
    shutil.rmtree(target / WORK)


def tell(target: Path) -> None:
    """The closing lines: the table, where things are and what to type next."""
    print((target / TABLE).read_text(encoding="utf-8"))
    print(f"figures  {target / RESULTS_FILE}\nanswers  {target / PREDICTIONS_FILE}\ntable    {target / TABLE}")
    print(f"next: python -m evaluation.report {target}   (a page with tables, plots and every question)")


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    config = parse(argv)
    # Processes wait for the slowest, however long that takes.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=2))
    set_up_logging(state.process_index)
    # A filter, since the library sets its level when it is imported.
    logging.getLogger("bm25s").addFilter(lambda record: record.levelno >= logging.WARNING)
    target = Path(config.output_dir)
    try:
        if state.is_main_process:  # alone, so that an error is said once
            work = prepare(config)
            open_output(config, run_facts(config, work.root, work.facts, work.data, work.text_rag))
        state.wait_for_everyone()
        if (target / RESULTS_FILE).is_file():
            logger.info("%s is finished already; --overwrite measures again", target)
        else:
            measure(config, state, work if state.is_main_process else prepare(config))
    except (ValueError, OSError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        sys.exit(2)
    except OutOfMemory as error:
        print(f"evaluate: {error}. What is done is kept: the same command goes on", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\nevaluate: stopped; {target}/{WORK} keeps what is done, and the same command goes on", file=sys.stderr)
        sys.exit(130)
    state.wait_for_everyone()
    if state.is_main_process:
        tell(target)


if __name__ == "__main__":
    main()
