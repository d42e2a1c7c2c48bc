"""What is found out before a model loads: the checkpoint's stage, missing libraries, the state of --output_dir."""

import filecmp
import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from evaluation import systems
from evaluation.config import EvaluationConfig
from evaluation.llmlingua import check_llmlingua
from evaluation.paraphrase import check_bert_model, check_entity_model
from evaluation.questions import END_TO_END, PRETRAINING
from evaluation.rankers import check_ranker
from evaluation.report_data import PREDICTIONS_FILE, RESULTS_FILE, own_name
from openrlhf.models.adapters import ADAPTERS, DECODER, QUERY, WEIGHTS_FILE
from openrlhf.models.checkpoint import CONFIG_FILE, EMBEDDINGS_FILE, find_base, find_checkpoint, read_config
from openrlhf.models.configuration_clara import TEXT_RAG, CLaRaConfig
from openrlhf.models.public_format import ADAPTERS_FILE, read_prompts
from openrlhf.retrieval.layout import read_header
from openrlhf.utils.checkpoints import inspect_checkpoint
from openrlhf.utils.logging import write_whole

TABLE, RUN, WORK = "table.md", "run.json", "work"
# Where things are does not change a result; `run_facts` has the hashes of what they hold.
PLACES = (
    *("output_dir", "overwrite", "checkpoint", "subfolder", "model_path", "base_model", "eval_data"),
    "text_rag_checkpoint",
)


def known_prompts(root: Path, config: CLaRaConfig, subfolder: str) -> dict | None:
    """The prompts of the checkpoint in `root`, from wherever it carries them."""
    if config.prompts is not None or not (root / ADAPTERS_FILE).is_file():
        return config.prompts
    return read_prompts([root, *list(root.parents)[: len(Path(subfolder).parts)]])


def check_checkpoint(config: EvaluationConfig) -> tuple[Path, dict]:
    """The checkpoint's directory and its config's facts, before any weight is read.

    Raises:
        FileNotFoundError: the checkpoint or its base model is missing.
        ValueError: its stage cannot do what the suite asks, or it carries no prompts.
    """
    root, ours, base = inspect_checkpoint(config.checkpoint, config.model_path, config.subfolder)
    public = (root / ADAPTERS_FILE).is_file()
    trained = ours.training_stage
    if trained == TEXT_RAG:
        raise ValueError(
            f"{root} is a text_rag checkpoint, which has no compressor: give it as --text_rag_checkpoint, beside a "
            "CLaRa checkpoint of the same base model as --checkpoint"
        )
    selects = trained.startswith("stage2") if public else (root / QUERY).is_dir()
    if config.copy_compressor and (selects or trained.startswith("stage2")):
        raise ValueError(
            f"{root} is a {trained} checkpoint{' with a query reasoner' * selects}: --copy_compressor is for those "
            "from before stage 2"
        )
    if config.suite == END_TO_END and not selects and not config.copy_compressor:
        raise ValueError(
            f"{root} is a {trained} checkpoint without a query reasoner, and the end_to_end suite selects documents "
            "with one: give a stage2 checkpoint, run --suite instruction_tuning (all documents are read), or let a "
            "copy of its compressor select, as stage 2 starts: --copy_compressor"
        )
    if known_prompts(root, ours, config.subfolder) is None:
        raise ValueError(
            f"{root} carries no prompts, and nothing can be generated without them: keep the modeling_clara.py that it "
            "came with in its directory"
        )
    if config.document_store:
        header = read_header(Path(config.document_store))
        if (header.get("doc_max_length"), header.get("compr_rate")) != (ours.doc_max_length, ours.compr_rate):
            raise ValueError(
                f"--document_store {config.document_store} was compressed at rate {header.get('compr_rate')} of "
                f"{header.get('doc_max_length')} tokens, {root} has rate {ours.compr_rate} of {ours.doc_max_length}"
            )
    return root, {
        "checkpoint": str(config.checkpoint),
        "base_model": base,
        "training_stage": trained,
        "compr_rate": ours.compr_rate,
        "doc_max_length": ours.doc_max_length,
        "n_memory_tokens": ours.n_memory_tokens,
        "generation_top_k": config.generation_top_k or ours.generation_top_k,
        "max_new_tokens": config.max_new_tokens or ours.max_new_tokens,
    }


def check_text_rag(config: EvaluationConfig, clara_root: Path, base: str) -> Path | None:
    """The directory of --text_rag_checkpoint, None without it; no weight is read.

    Args:
        clara_root: the CLaRa checkpoint's directory.
        base: where its base model was found. With --model_path both use that one, so it is enough that the checkpoints
            name theirs alike.

    Raises:
        FileNotFoundError: the checkpoint, its adapter or its base model is missing.
        ValueError: it is of another stage, or of another base model, rank, length of documents or prompt, so that the
            two could not be compared.
    """
    if not config.text_rag_checkpoint:
        return None
    clara, _ = read_config(clara_root, None, {})
    clara.prompts = known_prompts(clara_root, clara, config.subfolder)
    root = find_checkpoint(config.text_rag_checkpoint)
    text, _ = read_config(root, None, {})
    if text.training_stage != TEXT_RAG:
        raise ValueError(
            f"--text_rag_checkpoint {root} is a {text.training_stage} checkpoint: give one that train_sft --stage "
            "text_rag has made"
        )
    if not (root / DECODER / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{root / DECODER / WEIGHTS_FILE} is missing: the checkpoint is not complete")
    pairs = {name: (getattr(clara, name), getattr(text, name)) for name in ("lora_r", "doc_max_length")}
    if not (config.model_path and own_name(clara.decoder_model_name) == own_name(text.decoder_model_name)):
        theirs, _ = find_base(text.decoder_model_name, root, Path.cwd())
        pairs["base model"] = base, base if same_base(base, theirs) else theirs
    for name in ("answer_system", "answer_user"):
        pairs[f"prompt {name}"] = (clara.prompts or {})[name], (text.prompts or {}).get(name)
    different = [f"{name} {theirs!r} and not {ours!r}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    if different:
        raise ValueError(
            f"--text_rag_checkpoint {root} cannot be compared with --checkpoint: it has {'; '.join(different)}. Train "
            "one with the settings of the CLaRa checkpoint"
        )
    return root


def same_base(one: str, other: str) -> bool:
    """Whether two base models are one: the same place, or directories with the same config and weights in them."""
    if one == other or not (Path(one).is_dir() and Path(other).is_dir()):
        return one == other
    found = [path for root in (one, other) for path in Path(root).iterdir()]
    names = {path.name for path in found if path.name == CONFIG_FILE or path.suffix in (".safetensors", ".bin")}
    _, different, missing = filecmp.cmpfiles(one, other, names, shallow=False)
    return not different and not missing


def adapters_hash(root: Path) -> str:
    """Of everything in a checkpoint that an answer depends on."""
    digest = hashlib.sha256()
    files = [CONFIG_FILE, EMBEDDINGS_FILE, ADAPTERS_FILE, *(f"{name}/{WEIGHTS_FILE}" for name in ADAPTERS)]
    for path in [root / name for name in files]:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def check_models(config: EvaluationConfig) -> None:
    """Raises ValueError when a library or model of a baseline or score is missing."""
    if config.baselines and config.suite != PRETRAINING:
        check_ranker(systems.BM25, None)
    for kind, name in ((systems.DENSE, config.dense_model), (systems.CROSS_ENCODER, config.cross_encoder)):
        if name:
            check_ranker(kind, name)
    if config.llmlingua_model:
        check_llmlingua(config.llmlingua_model)
    if config.bertscore_model:
        check_bert_model(config.bertscore_model)
    if config.entity_model:
        check_entity_model(config.entity_model)


def open_output(config: EvaluationConfig, run: dict) -> None:
    """Makes --output_dir ready for this run, or for going on with it.

    Raises:
        ValueError: it holds another run.
    """
    target = Path(config.output_dir)
    path = target / RUN
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if before is not None and before != run and not config.overwrite:
        changed = [key for key in {**before, **run} if before.get(key) != run.get(key)]
        raise ValueError(
            f"{target} holds a run with other settings ({', '.join(changed)}): give another --output_dir, or "
            "--overwrite to delete that run"
        )
    foreign = before is None and any((target / name).exists() for name in (RESULTS_FILE, PREDICTIONS_FILE, WORK))
    if foreign and not config.overwrite:
        raise ValueError(f"{target} holds results of something else: give another --output_dir, or --overwrite")
    if config.overwrite and (before is not None or foreign):
        for name in (RESULTS_FILE, PREDICTIONS_FILE, TABLE, RUN):
            (target / name).unlink(missing_ok=True)
        shutil.rmtree(target / WORK, ignore_errors=True)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(run, indent=1))


def run_facts(config: EvaluationConfig, root: Path, facts: dict, data: list[dict], text_rag: Path | None) -> dict:
    """What a run that is taken up again must agree with: settings, data and weights."""
    settings = {key: value for key, value in {**asdict(config), **facts}.items() if key not in PLACES}
    hashes = [[each["dataset"], each["setting"], each["sha256"]] for each in data]
    return {
        **settings,
        "weights": adapters_hash(root),
        "data": hashes,
        **({"text_rag_weights": adapters_hash(text_rag)} if text_rag else {}),
    }
