"""A run that is killed, at whatever moment, and started again ends as if it had never been interrupted."""

import functools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.trainer.facts import records, write_jsonl
from tests.trainer.launch import BASE_MODEL, Run, call, command, flags, start
from tests.trainer.test_numbers import CHECKPOINT

# Two epochs of three steps, evaluated each epoch, a checkpoint after every step.
OPTIONS = {"mse_loss": True, "max_epochs": 2, "save_steps": 1, "max_ckpt_num": 2}


def die(*_, **__) -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_step(step: int) -> None:
    """Dies while training on the batch of a step."""
    from openrlhf.trainer.sft_trainer import SFTTrainer

    whole = SFTTrainer._train_micro_batch
    SFTTrainer._train_micro_batch = lambda self, at, *rest: die() if at == step - 1 else whole(self, at, *rest)


def in_evaluation(step: int) -> None:
    """Dies in the middle of the evaluation after a step."""
    from openrlhf.trainer.sft_trainer import SFTTrainer

    whole = SFTTrainer.evaluate

    def evaluate(self, at):
        self._add = die if at == step else self._add
        return whole(self, at)

    SFTTrainer.evaluate = evaluate


def in_line(step: int, split: str) -> None:
    """Dies with half a line of metrics.jsonl written."""
    from openrlhf.utils.logging import MetricsLog

    whole = MetricsLog.write

    def write(self, line):
        if (line["step"], line["split"]) == (step, split):
            with open(self.path, "a") as file:
                file.write(json.dumps(line)[:40])
            die()
        whole(self, line)

    MetricsLog.write = write


def in_checkpoint(step: int) -> None:
    """Dies with half of a resumable checkpoint's second file written."""
    import torch

    whole = torch.save

    def save(value, path, *rest, **options):
        whole(value, path, *rest, **options)
        if f"global_step{step}" in str(path) and "optim" in str(path):
            with open(path, "r+b") as file:
                file.truncate(Path(path).stat().st_size // 2)
            die()

    torch.save = save


def before_rename(step: int) -> None:
    """Dies when a checkpoint is written but does not have its name yet."""
    from openrlhf.utils import distributed

    whole = distributed._sync_files
    distributed._sync_files = lambda folder: die() if f"global_step{step}" in folder.name else whole(folder)


def in_pruning(step: int) -> None:
    """Dies when the checkpoint of a step is half removed."""
    whole = shutil.rmtree

    def rmtree(path, *rest, **options):
        if Path(path).name == f"global_step{step}" and Path(path).exists():
            next(Path(path).glob("*model_states.pt")).unlink()
            die()
        whole(path, *rest, **options)

    shutil.rmtree = rmtree


def in_final_save(file: str) -> None:
    """Dies when a file of the final checkpoint is about to get its place."""
    whole = os.replace

    def replace(source, target):
        if ".incoming" in str(source) and Path(target).name == file:
            die()
        whole(source, target)

    os.replace = replace


MOMENTS = {
    "before any checkpoint": (functools.partial(in_step, 1), 0),
    "in a step": (functools.partial(in_step, 5), 4),
    "in the first step of an epoch": (functools.partial(in_step, 4), 3),
    "in the first evaluation": (functools.partial(in_evaluation, 0), 0),
    "in an evaluation": (functools.partial(in_evaluation, 3), 2),
    "in an evaluation's line": (functools.partial(in_line, 3, "eval"), 2),
    "in a training line": (functools.partial(in_line, 2, "train"), 1),
    "in a checkpoint": (functools.partial(in_checkpoint, 4), 3),
    "in the first checkpoint": (functools.partial(in_checkpoint, 1), 0),
    "before a checkpoint has its name": (functools.partial(before_rename, 3), 2),
    "in pruning": (functools.partial(in_pruning, 2), 4),
    "in the final checkpoint's weights": (functools.partial(in_final_save, "special_embeddings.safetensors"), 6),
    "before the final checkpoint's config": (functools.partial(in_final_save, "config.json"), 6),
}


def data(folder: Path) -> dict:
    """Training and evaluation files, and flags that use them."""
    training = write_jsonl(folder / "training.jsonl", records("stage1"))
    return {"data": training, "eval_dataset": write_jsonl(folder / "held_out.jsonl", records("stage1", 4)), **OPTIONS}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """The run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return start(folder / "run", flags(folder / "run", **data(folder))).ok()


def resumed(run: Run, options: dict, ranks: int = 1) -> Run:
    """The run started again."""
    return start(run.folder, [*flags(run.folder, **options), "--load_checkpoint"], ranks).ok()


def resumed_from(run: Run) -> int:
    """The step a run said it goes on from."""
    if "no checkpoint in" in run.errors:
        return 0
    return int(run.errors.split("resumed from step ")[1].split()[0])


def loads(folder: Path) -> bool:
    """Whether a folder can be taken for a whole checkpoint."""
    return (folder / "config.json").exists()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, moment):
    hook, step = MOMENTS[moment]
    options = data(tmp_path)
    killed = start(tmp_path / "run", flags(tmp_path / "run", **options), before=hook).wait()
    assert killed.code == -signal.SIGKILL, killed.errors
    assert not loads(killed.folder)
    again = resumed(killed, options)
    assert resumed_from(again) == step
    assert again.figures() == whole.figures()
    assert again.saved() == whole.saved()
    assert not list(again.folder.glob("**/.incoming*")) or "final" in moment


def test_a_killed_text_rag_run_goes_on_as_if_nothing_had_happened(tmp_path):
    training = write_jsonl(tmp_path / "text.jsonl", records("text_rag"))
    options = {"data": training, "eval_dataset": training, **OPTIONS, "mse_loss": False}
    whole = start(tmp_path / "whole", flags(tmp_path / "whole", "text_rag", **options)).ok()
    line = flags(tmp_path / "run", "text_rag", **options)
    killed = start(tmp_path / "run", line, before=functools.partial(in_step, 5)).wait()
    assert killed.code == -signal.SIGKILL and not loads(killed.folder)
    again = start(killed.folder, [*line, "--load_checkpoint"]).ok()
    assert resumed_from(again) == 4
    assert again.figures() == whole.figures() and again.saved() == whole.saved()
    assert list(again.saved()) == list(whole.saved()) and len(whole.saved()) == 2


def n_lines(folder: Path) -> int:
    """Whole lines of metrics.jsonl so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("sign", ["four lines of figures", "a partial checkpoint"])
def test_a_run_killed_from_outside_goes_on_as_if_nothing_had_happened(tmp_path, whole, sign):
    options, folder = data(tmp_path), tmp_path / "run"
    run = start(folder, flags(folder, **options))
    if sign == "four lines of figures":
        run.kill_when(lambda: n_lines(folder) >= 4)
    else:
        run.kill_when(lambda: any((folder / "checkpoints").glob("partial-global_step[2-5]")))
    assert run.code == -signal.SIGKILL
    again = resumed(run, options)
    assert again.figures() == whole.figures() and again.saved() == whole.saved()


def test_the_command_itself_can_be_killed_and_started_again(tmp_path, whole):
    """The real command line; the kill comes from the process's own hand, at a known moment."""
    options, folder = data(tmp_path), tmp_path / "run"
    hook = "import sys; from tests.trainer.test_resume import in_checkpoint; in_checkpoint(4); "
    hook += "from openrlhf.cli.train_sft import main; sys.argv[0] = 'train_sft'; main()"
    killed = command(sys.executable, "-c", hook, *flags(folder, **options))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = command(sys.executable, "-m", "openrlhf.cli.train_sft", *flags(folder, **options), "--load_checkpoint")
    assert again.returncode == 0 and "resumed from step 3 of 6" in again.stderr, again.stderr
    assert Run(folder).figures() == whole.figures() and Run(folder).saved() == whole.saved()


VARIANTS = {
    "two ranks": (2, {}),
    "ZeRO 1": (1, {"zero_stage": 1}),
    "ZeRO 3 on two ranks": (2, {"zero_stage": 3}),
    "bf16": (1, {"bf16": True, "gradient_checkpointing": True}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_exact_in_every_precision_and_partition(tmp_path, variant):
    ranks, extra = VARIANTS[variant]
    options = {**data(tmp_path), **extra, "max_epochs": 1}
    whole = start(tmp_path / "whole", flags(tmp_path / "whole", **options), ranks)
    run = start(tmp_path / "run", flags(tmp_path / "run", **options), ranks)
    run.kill_when(lambda: (run.folder / "checkpoints" / "global_step1").exists())
    whole.ok()
    again = resumed(run, options, ranks)
    assert resumed_from(again) >= 1
    assert again.figures() == whole.figures() and again.saved() == whole.saved()


def test_a_stage_2_run_resumes_exactly(tmp_path):
    options = {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "max_epochs": 2, "save_steps": 1, "max_samples": 12}
    whole = start(tmp_path / "whole", flags(tmp_path / "whole", "stage2", **options))
    run = start(tmp_path / "run", flags(tmp_path / "run", "stage2", **options), before=functools.partial(in_step, 4))
    whole.ok()
    run.wait()
    again = start(run.folder, [*flags(run.folder, "stage2", **options), "--load_checkpoint"]).ok()
    assert resumed_from(again) == 3
    assert again.figures() == whole.figures() and again.saved() == whole.saved()


def test_resuming_where_there_is_no_checkpoint_yet_starts_from_the_beginning(tmp_path, whole):
    options = data(tmp_path)
    run = start(tmp_path / "run", [*flags(tmp_path / "run", **options), "--load_checkpoint"]).ok()
    assert f"no checkpoint in {run.folder / 'checkpoints'} yet, starting from the beginning" in run.errors
    assert run.figures() == whole.figures() and run.saved() == whole.saved()


def test_settings_may_change_while_there_is_no_checkpoint_yet(tmp_path):
    killed = start(tmp_path / "run", flags(tmp_path / "run"), before=functools.partial(in_step, 1)).wait()
    assert killed.code == -signal.SIGKILL
    start(killed.folder, [*flags(killed.folder, learning_rate=5e-4), "--load_checkpoint"]).ok()


def test_a_finished_run_started_again_changes_nothing(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    options = data(whole.folder.parent)
    run = start(folder, [*flags(folder, **options), "--load_checkpoint"]).ok()
    assert run.figures() == whole.figures() and run.saved() == whole.saved()


def test_a_partial_checkpoint_is_never_resumed_from(tmp_path, whole):
    """Not even when it is the newest and looks whole."""
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    (folder / "config.json").unlink()
    (folder / "checkpoints" / "global_step6").rename(folder / "checkpoints" / "partial-global_step6")
    run = start(folder, [*flags(folder, **data(whole.folder.parent)), "--load_checkpoint"]).ok()
    assert resumed_from(run) == 5
    assert run.figures() == whole.figures() and run.saved() == whole.saved()
    assert not list((folder / "checkpoints").glob("partial-*"))


CHANGES = {
    "learning_rate": (5e-4, "learning_rate: 0.001 then, 0.0005 now"),
    "train_batch_size": (4, "train_batch_size: 8 then, 4 now"),
    "micro_train_batch_size": (2, "micro_train_batch_size: 3 then, 2 now"),
    "max_epochs": (3, "max_epochs: 2 then, 3 now"),
    "seed": (1, "seed: 42 then, 1 now"),
    "max_samples": (19, "records: 20 then, 19 now"),
    "mse_loss": (None, "mse_loss: True then, False now"),
    "lr_scheduler": ("linear", "lr_scheduler: cosine_with_min_lr then, linear now"),
    "lora_dropout": (0.0, "lora_dropout: 0.1 then, 0.0 now"),
    "lora_r": (2, "lora_r: 4 then, 2 now"),
    "compress_rate": (4, "compress_rate: 8 then, 4 now"),
    "freeze_memory_embeddings": (True, "freeze_memory_embeddings: False then, True now"),
    "freeze_compressor": (True, "freeze_compressor: False then, True now"),
    "span_loss_weight": (0.5, "span_loss_weight: 0.0 then, 0.5 now"),
    "span_decay": (0.5, "span_decay: 1.0 then, 0.5 now"),
    "rescale_memory": (True, "rescale_memory: False then, True now"),
    "spread_memory": (True, "spread_memory: False then, True now"),
    "even_spans": (True, "even_spans: False then, True now"),
    "group_by_length": (True, "group_by_length: False then, True now"),
    "zero_stage": (1, "zero_stage: 2 then, 1 now"),
    "bf16": (True, "bf16: False then, True now"),
}
GO_WITH = {"span_decay": {"span_loss_weight": 0.5}}  # flags without which one is no valid flag


@pytest.fixture(scope="module")
def unweighted(whole) -> Path:
    """The base model without its weights: whatever loads the model fails on it."""
    folder = whole.folder.parent / "no-weights"
    shutil.copytree(BASE_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def refused(folder: Path, options: dict, ranks: int = 1) -> str:
    """What a resumed run is refused with."""
    run = start(folder, [*flags(folder, **options), "--load_checkpoint"], ranks).wait()
    assert run.code == 1 and "Traceback" not in run.errors, run.errors
    return run.errors


@pytest.mark.parametrize("name", CHANGES)
def test_changed_settings_are_refused_before_the_model_loads(whole, unweighted, name):
    value, reason = CHANGES[name]
    before = whole.saved()
    changed = {name: value, **GO_WITH.get(name, {})}
    if name == "freeze_compressor":
        changed |= {"pretrain_checkpoint": whole.folder, "mse_loss": None}
    said = refused(whole.folder, {**data(whole.folder.parent), "pretrain": unweighted, **changed})
    assert "is a run of other settings and cannot be resumed" in said and reason in said
    assert "base model" not in said and whole.saved() == before


def test_another_number_of_ranks_is_refused_before_the_model_loads(whole, unweighted):
    said = refused(whole.folder, {**data(whole.folder.parent), "pretrain": unweighted}, ranks=2)
    assert "world_size: 1 then, 2 now" in said


def test_other_records_of_the_same_number_are_refused(tmp_path, whole):
    other = write_jsonl(tmp_path / "other.jsonl", records("stage1")[::-1])
    said = refused(whole.folder, {**data(whole.folder.parent), "data": other})
    assert "fingerprint of the records" in said


def test_another_checkpoint_to_start_from_is_refused(whole):
    options = {**data(whole.folder.parent), "pretrain_checkpoint": CHECKPOINT.parent / "c8_stage1", "lora_r": 8}
    assert "pretrain_checkpoint: None then" in refused(whole.folder, options)


def test_moving_the_data_file_or_writing_more_often_is_no_change(tmp_path, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole.folder, folder)
    moved = write_jsonl(tmp_path / "moved.jsonl", records("stage1"))
    options = {**data(whole.folder.parent), "data": moved, "save_steps": 2, "logging_steps": 3, "max_ckpt_num": 5}
    again = start(folder, [*flags(folder, **options), "--load_checkpoint"]).ok()
    assert resumed_from(again) > 0 and again.saved() == whole.saved()


def weights_of(folder: Path) -> float:
    """Loads a checkpoint; a number that depends on it."""
    from openrlhf.models.modeling_clara import CLaRa

    return float(CLaRa.from_pretrained(folder).special.memory.sum())


def test_a_half_written_final_checkpoint_does_not_load(tmp_path):
    hook = functools.partial(in_final_save, "config.json")
    run = start(tmp_path / "run", flags(tmp_path / "run"), before=hook).wait()
    assert run.code == -signal.SIGKILL
    with pytest.raises(FileNotFoundError, match=r"holds no complete CLaRa checkpoint: config\.json is missing"):
        call(weights_of, run.folder)
