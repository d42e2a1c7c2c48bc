"""What cannot train is refused in seconds, in words and before the model loads."""

import contextlib
import importlib.util
import io
import json
import logging
import shutil
import sys
import time
from pathlib import Path

import pytest

from openrlhf.cli.train_sft import parse
from openrlhf.trainer.config import TrainingConfig
from tests.trainer.facts import candidates, qa, records, write_jsonl
from tests.trainer.launch import BASE_MODEL, call, command, flags
from tests.trainer.test_numbers import CHECKPOINT

RETRIEVAL = "stage2_pretrain_retrieval"
ALL_STAGES = ("stage1", "stage1_2", "stage2", RETRIEVAL, "text_rag")


def problems(**options) -> list[str]:
    """What is wrong with a configuration."""
    with pytest.raises(ValueError) as caught:
        TrainingConfig(**{"pretrain": "base", "dataset": "data", **options})
    return [line.removeprefix("- ") for line in str(caught.value).splitlines()]


def accepted(folder: Path, **options) -> TrainingConfig:
    """A configuration with places of its own."""
    places = {"save_path": str(folder / "new"), "ckpt_path": str(folder / "new" / "checkpoints")}
    return TrainingConfig(**{"pretrain": "base", "dataset": "data", **places, **options})


POSITIVE = [
    "generation_top_k",
    "doc_max_length",
    "compress_rate",
    "lora_r",
    "max_samples",
    "max_len",
    "train_batch_size",
    "micro_train_batch_size",
    "max_epochs",
    "logging_steps",
    "max_ckpt_num",
    "learning_rate",
    "topk_temperature",
    "max_ckpt_mem",
    "stage2_retrieval_top_n",
]
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_and_rates_must_be_positive(name, value):
    assert f"--{name} must be positive" in problems(**{name: value})


@pytest.mark.parametrize("name", ["learning_rate", "topk_temperature"])
@pytest.mark.parametrize("value", [NAN, INFINITY])
def test_rates_must_be_numbers(name, value):
    assert f"--{name} must be positive" in problems(**{name: value})


@pytest.mark.parametrize("name", ["l2", "max_norm", "mse_loss_weight", "span_loss_weight"])
@pytest.mark.parametrize("value", [-0.1, NAN])
def test_weights_must_not_be_negative(name, value):
    assert f"--{name} must not be negative" in problems(**{name: value})


@pytest.mark.parametrize("name", ["l2", "max_norm", "mse_loss_weight", "span_loss_weight"])
def test_weights_may_be_zero(name, tmp_path):
    assert getattr(accepted(tmp_path, **{name: 0.0}), name) == 0


VALUES = [
    ({"pretrain": ""}, "--pretrain is required"),
    ({"dataset": ""}, "--dataset is required"),
    (
        {"compress_rate": 7},
        "--compress_rate must divide --doc_max_length 256: one of [1, 2, 4, 8, 16, 32, 64, 128, 256]",
    ),
    ({"compress_rate": 512}, "--compress_rate must divide --doc_max_length 256: one of [1, 2,"),
    ({"span_decay": 0.0, "span_loss_weight": 1.0}, "--span_decay must be above 0 and at most 1"),
    ({"span_decay": 1.1, "span_loss_weight": 1.0}, "--span_decay must be above 0 and at most 1"),
    ({"span_decay": NAN}, "--span_decay must be above 0 and at most 1"),
    ({"span_decay": 0.5}, "--span_decay weighs the tokens of the span loss: it needs --span_loss_weight"),
    ({"lr_warmup_ratio": 1.0}, "--lr_warmup_ratio must be at least 0 and below 1"),
    ({"lr_warmup_ratio": -0.1}, "--lr_warmup_ratio must be at least 0 and below 1"),
    ({"lora_dropout": 1.0}, "--lora_dropout must be at least 0 and below 1"),
    ({"lora_dropout": -0.1}, "--lora_dropout must be at least 0 and below 1"),
    ({"adam_betas": [0.9, 1.0]}, "--adam_betas must be two numbers, at least 0 and below 1"),
    ({"adam_betas": [-0.1, 0.95]}, "--adam_betas must be two numbers, at least 0 and below 1"),
    ({"adam_betas": [0.9]}, "--adam_betas must be two numbers, at least 0 and below 1"),
    ({"adam_betas": [0.9, 0.95, 0.99]}, "--adam_betas must be two numbers, at least 0 and below 1"),
    ({"eval_steps": 0}, "--eval_steps must be -1 (each epoch) or a positive number"),
    ({"eval_steps": -2}, "--eval_steps must be -1 (each epoch) or a positive number"),
    ({"save_steps": 0}, "--save_steps must be -1 (never), -2 (each epoch) or a positive number"),
    ({"save_steps": -3}, "--save_steps must be -1 (never), -2 (each epoch) or a positive number"),
    (
        {"train_batch_size": 4, "micro_train_batch_size": 8},
        "--micro_train_batch_size must not exceed --train_batch_size",
    ),
    ({"dataset_probs": "half"}, "--dataset_probs must be numbers separated by commas, got 'half'"),
    ({"dataset_probs": "0.5,0.5"}, "--dataset_probs needs 1 positive numbers that add up to 1"),
    ({"dataset": "a,b", "dataset_probs": "1.0"}, "--dataset_probs needs 2 positive numbers"),
    ({"dataset": "a,b", "dataset_probs": "0.5,0.6"}, "--dataset_probs needs 2 positive numbers"),
    ({"dataset": "a,b", "dataset_probs": "0,1"}, "--dataset_probs needs 2 positive numbers"),
    ({"dataset": "a,b", "dataset_probs": "nan,1"}, "--dataset_probs needs 2 positive numbers"),
]


@pytest.mark.parametrize(("options", "reason"), VALUES)
def test_values_that_cannot_train_are_refused(options, reason):
    assert any(line.startswith(reason) for line in problems(**options)), problems(**options)


START = {"pretrain_checkpoint": "checkpoint"}
COMBINATIONS = [
    ({"stage": "stage2", "mse_loss": True, **START}, "--mse_loss does not go with --stage stage2: the documents are"),
    ({"stage": RETRIEVAL, "mse_loss": True, **START}, f"--mse_loss does not go with --stage {RETRIEVAL}"),
    (
        {"stage": "stage2", "span_loss_weight": 0.5, **START},
        "--span_loss_weight does not go with --stage stage2: the documents are frozen there",
    ),
    ({"stage": "text_rag", "span_loss_weight": 0.5}, "--span_loss_weight does not go with --stage text_rag: it reads"),
    ({"stage": "stage1", "document_store": "store"}, "--document_store does not go with --stage stage1"),
    (
        {"stage": "stage2", "document_store": "store", "zero_stage": 3, **START},
        "--document_store does not go with --zero_stage 3",
    ),
    ({"stage": "stage1_2", "rescale_memory": True, **START}, "--rescale_memory is chosen where training starts"),
    (
        {"stage": "stage2", "even_spans": True, **START},
        "--even_spans does not go with --stage stage2: the documents are",
    ),
    ({"stage": "stage2", "spread_memory": True, **START}, "--spread_memory is chosen where training starts"),
    ({"stage": "stage1", "spread_memory": True, "flash_attn": True}, "--spread_memory does not go with --flash_attn"),
    ({"stage": "stage2", "freeze_memory_embeddings": True, **START}, "--freeze_memory_embeddings does not go with"),
    ({"stage": "stage2", "freeze_compressor": True, **START}, "--freeze_compressor does not go with --stage stage2"),
    ({"stage": "stage1", "freeze_compressor": True}, "--freeze_compressor needs --pretrain_checkpoint"),
    *(
        ({"stage": "stage1_2", "freeze_compressor": True, flag: 1.0, **START}, f"--{flag} does not go with --freeze_co")
        for flag in ("mse_loss", "span_loss_weight", "even_spans")
    ),
    ({"stage": "stage1", "reset_decoder": True}, "--reset_decoder does not go with --stage stage1: only stage1_2"),
    ({"stage": "stage2", "reset_decoder": True, **START}, "--reset_decoder does not go with --stage stage2"),
    ({"stage": "stage1_2", "reset_decoder": True}, "--reset_decoder needs --pretrain_checkpoint"),
    ({"stage": "stage1", "freeze_query_reasoner": True}, "--freeze_query_reasoner does not go with --stage stage1"),
    ({"stage": RETRIEVAL, "freeze_query_reasoner": True, **START}, "--freeze_query_reasoner does not go with"),
    ({"stage": "stage1_2", "fresh_query_reasoner": True}, "--fresh_query_reasoner does not go with --stage stage1_2"),
    (
        {"stage": "stage2", "freeze_query_reasoner": True, "fresh_query_reasoner": True, **START},
        "--freeze_query_reasoner and --fresh_query_reasoner together leave retrieval at random",
    ),
    ({"stage": "stage1", "do_eval_gen": True, "eval_dataset": "e"}, "--do_eval_gen does not go with --stage stage1"),
    ({"stage": "stage1_2", "do_eval_gen": True}, "--do_eval_gen needs --eval_dataset"),
    (
        {"stage": "stage1_2", "do_eval_gen": True, "eval_dataset": "e", "zero_stage": 3},
        "--do_eval_gen does not go with --zero_stage 3",
    ),
    ({"stage": "stage1_2", "qa_loss": False}, "--no_qa_loss does not go with --stage stage1_2"),
    ({"stage": "stage2", "qa_loss": False, **START}, "--no_qa_loss does not go with --stage stage2"),
    ({"stage": "stage1", "generation_top_k": 2}, "--generation_top_k must be 1 in stage1"),
    ({"stage": "stage2"}, "--stage stage2 needs --pretrain_checkpoint: it freezes the compressor"),
    ({"stage": RETRIEVAL}, f"--stage {RETRIEVAL} needs --pretrain_checkpoint"),
    ({"stage": "stage1_2", "stage2_mips": True}, "--stage2_mips does not go with --stage stage1_2: only stage2"),
    ({"stage": RETRIEVAL, "stage2_mips": True, **START}, f"--stage2_mips does not go with --stage {RETRIEVAL}"),
    (
        {"stage": "stage2", "stage2_mips": True, "generation_top_k": 5, "stage2_retrieval_top_n": 4, **START},
        "--stage2_retrieval_top_n must be at least --generation_top_k 5: so many documents are selected",
    ),
    (
        {"stage": "stage2", "stage2_mips": True, "retrieval_url": "localhost:5004", **START},
        "--retrieval_url 'localhost:5004' is not the URL of a service: give one such as http://127.0.0.1:5004",
    ),
    ({"stage": "stage2", "retrieval_url": "http://a", **START}, "--retrieval_url only goes with --stage2_mips"),
    (
        {"stage": "stage2", "stage2_retrieval_top_n": 5, **START},
        "--stage2_retrieval_top_n only goes with --stage2_mips",
    ),
    *(
        ({"stage": "text_rag", flag: True}, f"--{flag} does not go with --stage text_rag: it reads documents as text")
        for flag in (
            *("mse_loss", "freeze_memory_embeddings", "rescale_memory", "spread_memory", "reset_decoder"),
            *("freeze_query_reasoner", "fresh_query_reasoner", "freeze_compressor"),
        )
    ),
    ({"stage": "text_rag", **START}, "--pretrain_checkpoint does not go with --stage text_rag: it reads documents as"),
    ({"stage": "text_rag", "qa_loss": False}, "--no_qa_loss does not go with --stage text_rag"),
    ({"stage": "text_rag", "stage2_mips": True}, "--stage2_mips does not go with --stage text_rag: it reads documents"),
    ({"stage": "stage2", "stage2_mips": True, "document_store": "s", **START}, "--document_store does not go with"),
    ({"stage": "text_rag", "do_eval_gen": True}, "--do_eval_gen needs --eval_dataset"),
    ({"disable_ds_ckpt": True, "load_checkpoint": True}, "--load_checkpoint resumes from the checkpoints that"),
]


@pytest.mark.parametrize(("options", "reason"), COMBINATIONS)
def test_combinations_that_cannot_train_are_refused(options, reason):
    assert any(line.startswith(reason) for line in problems(**options)), problems(**options)


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_each_stage_has_a_configuration_that_is_accepted(tmp_path, stage):
    start = START if "stage2" in stage else {}
    config = accepted(tmp_path, stage=stage, generation_top_k=1 if stage == "stage1" else 5, **start)
    assert config.stage == stage


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"use_wandb": "env"}, "wandb"),
        ({"use_tensorboard": "runs"}, "tensorboard"),
        ({"use_ms": True}, "modelscope"),
    ],
)
def test_a_missing_package_is_refused_with_the_command_that_installs_it(monkeypatch, options, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (flag,) = options
    assert problems(**options) == [f"--{flag} needs the package {package}: pip install {package}"]


def test_wandb_without_a_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert problems(use_wandb="env") == ["--use_wandb reads the key from the environment: export WANDB_API_KEY first"]
    monkeypatch.setenv("WANDB_API_KEY", "secret-4711")
    assert "secret-4711" not in json.dumps(accepted(tmp_path, use_wandb="env").shown())
    monkeypatch.delenv("WANDB_API_KEY")
    assert "secret-4711" not in json.dumps(accepted(tmp_path, use_wandb="secret-4711").shown())


def test_everything_that_is_wrong_is_said_at_once():
    found = problems(pretrain="", learning_rate=-1.0, stage="stage2", save_steps=0)
    assert len(found) == 4


def test_a_place_that_already_holds_a_checkpoint_is_refused_unless_resumed(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (said,) = problems(save_path=str(tmp_path))
    assert said.startswith(f"--save_path {tmp_path} already holds a checkpoint") and "--load_checkpoint" in said
    TrainingConfig(pretrain="base", dataset="data", save_path=str(tmp_path), load_checkpoint=True)
    TrainingConfig(pretrain="base", dataset="data", save_path=str(tmp_path), dry_run=True)


@pytest.mark.parametrize("name", ["global_step3", "global_step3_hf"])
def test_checkpoints_of_an_earlier_run_are_not_mixed_with_new_ones(tmp_path, name):
    (tmp_path / name).mkdir()
    (said,) = problems(ckpt_path=str(tmp_path))
    assert said.startswith(f"--ckpt_path {tmp_path} holds checkpoints of an earlier run")
    accepted(tmp_path, ckpt_path=str(tmp_path), load_checkpoint=True)


def test_a_partial_checkpoint_alone_is_not_in_the_way(tmp_path):
    (tmp_path / "partial-global_step3").mkdir()
    config = accepted(tmp_path, ckpt_path=str(tmp_path))
    assert config.ckpt_path == str(tmp_path) and not config.load_checkpoint


@pytest.mark.parametrize("flag", ["save_path", "ckpt_path"])
@pytest.mark.parametrize("below", [".", "run", "run/deeper"])
def test_a_file_in_the_place_of_a_directory_is_refused(tmp_path, flag, below):
    (tmp_path / "notes.txt").write_text("not a directory")
    (said,) = problems(**{flag: str(tmp_path / "notes.txt" / below)})
    assert said.startswith(f"--{flag} ") and said.endswith(f"{tmp_path / 'notes.txt'} is not a writable directory")


COMMAND_LINES = [
    (["--stage", "stage3"], "invalid choice: 'stage3'"),
    (["--zero_stage", "4"], "--zero_stage/--zero-stage: invalid choice"),
    (["--lr_scheduler", "polynomial"], "invalid choice: 'polynomial'"),
    (["--learning_rate", "fast"], "invalid float value: 'fast'"),
    (["--pretrain", "base", "--dataset", "data", "--max_sample", "3"], "['--max_sample', '3']"),
    (["--compress_rate", "7"], "--compress_rate must divide --doc_max_length 256"),
    ([], "--pretrain is required"),
]


@pytest.mark.parametrize(("line", "reason"), COMMAND_LINES)
def test_a_wrong_command_line_ends_with_code_2_and_words(line, reason, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(line)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and reason in said and "Traceback" not in said


def test_the_command_itself_refuses_in_seconds(tmp_path):
    """The real command line: one message, no traceback, nothing written."""
    began = time.monotonic()
    line = flags(tmp_path / "run", data=tmp_path / "none.jsonl", compress_rate=7)
    done = command(sys.executable, "-m", "openrlhf.cli.train_sft", *line)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines() == [
        "train_sft: these flags cannot train:",
        "- --compress_rate must divide --doc_max_length 32: one of [1, 2, 4, 8, 16, 32]",
    ]
    assert not list(tmp_path.iterdir()) and time.monotonic() - began < 60


# --- what needs a look at the base model, the checkpoint or the data


def outcomes(lines: dict[str, list[str]]) -> dict[str, dict]:
    """What the command says and how it ends for each command line, in one process."""
    from openrlhf.cli import train_sft

    found = {}
    for name, line in lines.items():
        out, err = io.StringIO(), io.StringIO()
        sys.argv = ["train_sft", *line]
        began = time.monotonic()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = train_sft.main() or 0
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:  # what the user would see as a traceback
                code = repr(error)
        found[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "seconds": time.monotonic() - began}
    logging.getLogger().handlers.clear()
    return found


def bare(folder: Path, *leave_out: str) -> Path:
    """The base model without its weights, and without what matches `leave_out`."""
    return Path(shutil.copytree(BASE_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors", *leave_out)))


def changed(path: Path, **fields) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """Every case below, run once; each but the last has nothing that could be loaded as a model."""
    root = tmp_path_factory.mktemp("refusals")
    base, empty = bare(root / "no-weights"), root / "empty"
    empty.mkdir()
    no_template = bare(root / "no-template", "chat_template.jinja")
    changed(no_template / "tokenizer_config.json", chat_template=None)
    bare(root / "no-tokenizer", "token*", "special*", "chat*")
    broken = bare(root / "broken-json")
    (broken / "config.json").write_text('{"model_type": ')
    for name in ("half", "other", "text"):
        shutil.copytree(CHECKPOINT, root / name)
    (root / "half" / "config.json").unlink()
    changed(root / "other" / "config.json", model_type="llama")
    changed(root / "text" / "config.json", training_stage="text_rag")
    write_jsonl(root / "good.jsonl", records("stage1"))
    write_jsonl(root / "bad.jsonl", [qa(0), {**qa(1), "docs": [""]}])
    write_jsonl(root / "later.jsonl", [candidates(0)])
    (root / "blank.jsonl").write_text("\n")
    (root / "held_out.jsonl").write_text('{"data_type": "qa"}')
    at = {"pretrain": base, "data": root / "good.jsonl"}
    stage1_2 = {**at, "stage": "stage1_2", "data": root / "later.jsonl", "lora_r": 8}
    cases = {
        "rate": {**stage1_2, "pretrain_checkpoint": CHECKPOINT, "compress_rate": 16},
        "length": {**stage1_2, "pretrain_checkpoint": CHECKPOINT, "doc_max_length": 64},
        "rank": {**stage1_2, "pretrain_checkpoint": CHECKPOINT, "lora_r": 4},
        "no base": {**at, "pretrain": root / "nowhere"},
        "relative base": {**at, "pretrain": "./nowhere"},
        "empty base": {**at, "pretrain": empty},
        "hub base": {**at, "pretrain": "nobody/has-such-a-model"},
        "broken base": {**at, "pretrain": broken},
        "no template": {**at, "pretrain": no_template},
        "no tokenizer": {**at, "pretrain": root / "no-tokenizer"},
        "no checkpoint": {**stage1_2, "pretrain_checkpoint": root / "nothing"},
        "hub checkpoint": {**stage1_2, "pretrain_checkpoint": "nobody/has-such-a-checkpoint"},
        "half checkpoint": {**stage1_2, "pretrain_checkpoint": root / "half"},
        "other checkpoint": {**stage1_2, "pretrain_checkpoint": root / "other"},
        "no data": {**at, "data": root / "missing.jsonl"},
        "empty directory": {**at, "data": empty},
        "bad record": {**at, "data": root / "bad.jsonl"},
        "wrong stage": {**at, "data": root / "later.jsonl"},
        "blank data": {**at, "data": root / "blank.jsonl"},
        "bad evaluation": {**at, "eval_dataset": root / "held_out.jsonl"},
        "short": {**at, "max_len": 20},
        "text checkpoint": {**stage1_2, "pretrain_checkpoint": root / "text"},
        "short for text": {
            **stage1_2,
            "stage": "text_rag",
            "doc_max_length": 256,
            "generation_top_k": 5,
            "max_len": 1024,
        },
        "stage-1 records": {**at, "stage": "text_rag"},
        "taken": {**at, "save_path": root / "taken"},
        "no weights": at,
    }
    (root / "taken").mkdir()
    (root / "taken" / "config.json").write_text("{}")
    lines = {
        name: flags(root / "run", options.pop("stage", "stage1"), **options)
        for name, options in ((name, dict(options)) for name, options in cases.items())
    }
    before = sorted(root.rglob("*"))
    found = call(outcomes, lines)
    return root, found, sorted(set(root.rglob("*")) - set(before))


REASONS = {
    "rate": "was trained with --compress_rate 8, this run asks for 16: pass the checkpoint's value",
    "length": "was trained with --doc_max_length 32, this run asks for 64",
    "rank": "was trained with --lora_r 8, this run asks for 4",
    "no base": "nowhere' was not found",
    "relative base": "the base model './nowhere' was not found",
    "empty base": "empty' was not found",
    "hub base": "no tokenizer could be loaded from --pretrain nobody/has-such-a-model",
    "broken base": "broken-json",
    "no template": "the base model's tokenizer has no chat template; use an instruction-tuned model",
    "no tokenizer": "no-tokenizer: ",
    "no checkpoint": "nothing: no such directory",
    "hub checkpoint": "no checkpoint at nobody/has-such-a-checkpoint: no such directory, and not on the Hub",
    "half checkpoint": "half holds no complete CLaRa checkpoint: config.json is missing",
    "other checkpoint": "is of model_type 'llama', not a CLaRa checkpoint",
    "no data": "missing.jsonl does not exist; --dataset takes a JSONL file, a directory or a Hub data set",
    "empty directory": "empty holds no .jsonl file; stage1 looks for pretrain_data.jsonl",
    "bad record": "bad.jsonl:2: docs[0] must be a non-empty text, got ''",
    "wrong stage": 'later.jsonl:1: data_type must be "qa" or "paraphrase" in stage 1, got None; this looks like',
    "blank data": "blank.jsonl holds no usable record for stage1",
    "bad evaluation": "held_out.jsonl:1: docs is missing",
    "short": "--max_len 20 leaves no room for an answer: 1 documents of 4 memory tokens and the prompt already take",
    "text checkpoint": "is a text_rag checkpoint, the baseline without a compressor; no stage can continue from it",
    "short for text": "--max_len 1024 leaves no room for an answer: 5 documents of 257 tokens of text and the prompt",
    "stage-1 records": "good.jsonl:1: question must be one text, got ['Where was Marie Curie born?']; this looks like",
    "taken": "taken already holds a checkpoint",
    "no weights": "no-weights' was not found",
}


@pytest.mark.parametrize("case", REASONS)
def test_what_cannot_train_is_refused_in_words(refusals, case):
    _, found, _ = refusals
    assert REASONS[case] in found[case]["err"]
    assert found[case]["code"] == (2 if case == "taken" else 1)
    assert found[case]["err"].count("train_sft: ") == 1 and "Traceback" not in found[case]["err"]


def test_refusals_come_before_the_model_loads(refusals):
    """All but the last case would otherwise have ended as the last one does: there are no weights to load."""
    _, found, _ = refusals
    assert all("no-weights' was not found" not in found[case]["err"] for case in REASONS if case != "no weights")
    assert all(found[case]["seconds"] < 20 for case in REASONS)


def test_refusals_write_nothing(refusals):
    root, _, written = refusals
    assert [path for path in written if root / "run" not in (path, *path.parents)] == []
