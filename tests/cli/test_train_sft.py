"""The command as a whole: its flags, what it prints and writes, and where figures go."""

import dataclasses
import functools
import json
import sys
import textwrap
from pathlib import Path

import pytest

from openrlhf.cli.train_sft import parse
from openrlhf.trainer.config import TrainingConfig
from tests.trainer.launch import BASE_MODEL, ROOT, Run, command, flags, start, train

KEY = "local-key-0815-4711"
# SPEC 6.
DEFAULTS = {
    "pretrain_checkpoint": None, "stage": "stage1", "generation_top_k": 1, "doc_max_length": 256, "compress_rate": 32,
    "qa_loss": True, "mse_loss": False, "mse_loss_weight": 0.1, "span_loss_weight": 0.0, "span_decay": 1.0,
    "topk_temperature": 0.02, "lora_r": 16, "lora_dropout": 0.1,
    "reset_decoder": False, "freeze_query_reasoner": False, "fresh_query_reasoner": False,
    "rescale_memory": False, "spread_memory": False, "even_spans": False, "document_store": None,
    "freeze_memory_embeddings": False, "freeze_compressor": False,
    "stage2_mips": False, "stage2_retrieval_top_n": 1, "retrieval_url": "http://127.0.0.1:5004",
    "train_batch_size": 128, "group_by_length": False,
    "micro_train_batch_size": 8, "learning_rate": 5e-6, "lr_scheduler": "cosine_with_min_lr", "lr_warmup_ratio": 0.03,
    "l2": 0.0, "adam_betas": [0.9, 0.95], "max_norm": 1.0, "max_epochs": 2, "zero_stage": 2, "bf16": False,
    "gradient_checkpointing": False, "flash_attn": False, "dataset_probs": None, "dataset_split": "train",
    "eval_split": "train", "eval_dataset": None, "max_samples": 1000000, "max_len": 2048, "skip_bad_records": False,
    "logging_steps": 1, "eval_steps": -1, "do_eval_gen": False, "save_path": "./ckpt", "save_steps": -1,
    "ckpt_path": "./ckpt/checkpoints_sft", "load_checkpoint": False, "max_ckpt_num": 3, "max_ckpt_mem": None,
    "save_hf_ckpt": False, "disable_ds_ckpt": False, "use_wandb": None, "wandb_project": "CLaRa", "wandb_org": None,
    "wandb_group": None, "wandb_run_name": None, "use_tensorboard": None, "seed": 42, "disable_fast_tokenizer": False,
    "use_ms": False, "local_rank": -1, "dry_run": False,
}  # fmt: skip


def test_the_flags_and_their_defaults_are_the_published_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = dataclasses.asdict(parse(["--pretrain", "base", "--dataset", "data"]))
    assert config == {"pretrain": "base", "dataset": "data", **DEFAULTS}


def test_every_flag_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit) as ended:
        parse(["--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--{field.name}" in said and field.metadata["help"] for field in dataclasses.fields(TrainingConfig))
    assert "--no_qa_loss" in said


STUB = '''
    """Stands for wandb: keeps what it is given."""
    import json, os
    def _keep(**what):
        with open(os.environ["WANDB_STUB"], "a") as file:
            file.write(json.dumps(what) + "\\n")
    class Run:
        def log(self, figures, step): _keep(figures=figures, step=step)
        def finish(self): _keep(finished=True)
    def init(**options):
        _keep(init=options, key=os.environ["WANDB_API_KEY"])
        return Run()
'''


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """The real command with everything that writes figures: (folder, finished process, what wandb was given)."""
    folder = tmp_path_factory.mktemp("command")
    stub = folder / "stub" / "wandb.py"
    stub.parent.mkdir()
    stub.write_text(textwrap.dedent(STUB))
    run = folder / "run"
    options = {"use_wandb": KEY, "wandb_project": "P", "wandb_org": "O", "wandb_group": "G", "wandb_run_name": "N"}
    line = flags(run, **options, use_tensorboard=folder / "board", flash_attn=True, max_samples=8, max_epochs=2)
    env = {"PYTHONPATH": f"{stub.parent}:{ROOT}", "WANDB_STUB": str(folder / "given.jsonl")}
    done = command(sys.executable, "-m", "openrlhf.cli.train_sft", *line, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    given = [json.loads(said) for said in (folder / "given.jsonl").read_text().splitlines()]
    return folder, done, given


def test_the_command_prints_the_resolved_configuration_and_saves_it(logged):
    folder, done, _ = logged
    printed = json.loads(done.stdout.split("configuration ")[1].split("\n}")[0] + "\n}")
    saved = json.loads((folder / "run" / "training_config.json").read_text())
    assert printed == saved
    assert saved["train_batch_size"] == 8 and saved["seed"] == 42 and saved["world_size"] == 1
    assert set(saved) == {field.name for field in dataclasses.fields(TrainingConfig)} | {"world_size", "device"}


def test_the_command_says_where_everything_is(logged):
    folder, done, _ = logged
    assert f"checkpoint  {folder / 'run'}" in done.stdout and f"{folder / 'run'}/metrics.jsonl" in done.stdout
    assert "AutoModel.from_pretrained(" in done.stdout
    last = json.loads(done.stdout.split("Last figures: ")[1].splitlines()[0])
    assert last["train"]["loss"] == Run(folder / "run").curve()[-1]


def test_every_line_of_figures_has_what_a_curve_needs(logged):
    lines = Run(logged[0] / "run").lines()
    names = "step split epoch loss mse_loss tokens answer_tokens learning_rate grad_norm seconds tokens_per_s memory_gb"
    assert [set(line) for line in lines] == [set(names.split())] * 2
    assert [(line["step"], line["epoch"]) for line in lines] == [(1, 1.0), (2, 2.0)]


def test_the_wandb_key_is_used_and_shown_nowhere(logged):
    folder, done, given = logged
    assert given[0]["key"] == KEY
    assert KEY not in json.dumps(given[0]["init"]) and given[0]["init"]["config"]["use_wandb"] is True
    assert KEY not in done.stdout and KEY not in done.stderr
    assert "a wandb key on the command line is seen by others; export WANDB_API_KEY instead" in done.stderr
    for path in folder.rglob("*"):
        if path.is_file() and path.name != "given.jsonl":
            assert KEY.encode() not in path.read_bytes(), path


def test_wandb_gets_its_options_and_every_figure(logged):
    folder, _, given = logged
    options = {name: given[0]["init"][name] for name in ("project", "entity", "group", "name")}
    assert options == {"project": "P", "entity": "O", "group": "G", "name": "N"}
    for line, said in zip(Run(folder / "run").lines(), given[1:-1], strict=True):
        assert said["step"] == line["step"] and said["figures"]["train/loss"] == line["loss"]
        assert said["figures"]["train/learning_rate"] == line["learning_rate"]
    assert given[-1] == {"finished": True}


@pytest.mark.parametrize("line", [["--bogus", "1"], ["--compress_rate", "7"], ["--learning_rate", "fast"]])
def test_the_wandb_key_is_not_in_a_refusal(line, capsys):
    with pytest.raises(SystemExit):
        parse(["--pretrain", "base", "--dataset", "data", "--use_wandb", KEY, *line])
    said = capsys.readouterr()
    assert KEY not in said.out + said.err


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Figures as TensorBoard shows them."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulators.EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_files_can_be_read_back(logged):
    folder, _, _ = logged
    shown = board(folder / "board")
    for name in ("loss", "mse_loss", "learning_rate", "grad_norm"):
        expected = [(line["step"], pytest.approx(line[name])) for line in Run(folder / "run").lines()]
        assert shown[f"train/{name}"] == expected


def test_tensorboard_shows_a_resumed_run_once(tmp_path):
    pytest.importorskip("tensorboard")
    from tests.trainer.test_resume import in_checkpoint

    run, events = tmp_path / "run", tmp_path / "board"
    line = flags(run, use_tensorboard=events, max_samples=12, train_batch_size=4, max_epochs=2, save_steps=2)
    start(run, line, before=functools.partial(in_checkpoint, 4)).wait()
    again = start(run, [*line, "--load_checkpoint"]).ok()
    assert "resumed from step 2 of 6" in again.errors
    expected = [(figures["step"], pytest.approx(figures["loss"])) for figures in again.lines()]
    assert board(events)["train/loss"] == expected


def test_flash_attn_on_a_cpu_says_one_line_and_trains_with_sdpa(logged, tmp_path):
    folder, done, _ = logged
    said = [line for line in done.stderr.splitlines() if "flash" in line]
    assert len(said) == 1 and "flash-attn needs CUDA and the package flash-attn; using PyTorch's SDPA" in said[0]
    without = train(tmp_path / "run", max_samples=8, max_epochs=2)
    assert Run(folder / "run").figures() == without.figures() and Run(folder / "run").saved() == without.saved()


def layers() -> None:
    """Says which attention the model was built with."""
    from openrlhf.trainer import build

    whole = build.build_model

    def build_model(*arguments):
        model = whole(*arguments)
        print("attention:", model.decoder.config._attn_implementation, file=sys.stderr)
        return model

    build.build_model = build_model


def test_flash_attn_really_asks_for_sdpa(tmp_path):
    run = start(tmp_path / "run", flags(tmp_path / "run", flash_attn=True, max_samples=2), before=layers).ok()
    assert "attention: sdpa" in run.errors


def test_relative_places_are_those_of_the_caller(tmp_path, monkeypatch):
    """The base model, data and targets may be relative to where the command is called."""
    (tmp_path / "base").symlink_to(BASE_MODEL)
    line = flags(tmp_path / "run", pretrain="base", save_path="here", ckpt_path="here/checkpoints", max_samples=2)
    start(tmp_path / "run", line, before=functools.partial(into, str(tmp_path))).ok()
    assert (tmp_path / "here" / "config.json").exists()


def into(folder: str) -> None:
    """Changes the working directory."""
    import os

    os.chdir(folder)
