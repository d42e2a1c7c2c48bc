"""When checkpoints are written, which are kept, and what a full disk leaves behind."""

import errno
import functools
import os
import resource
from pathlib import Path

import pytest

from openrlhf.utils.logging import MetricsLog, read_metrics, write_whole
from tests.trainer.launch import BASE_MODEL, Run, call, flags, start, train, train_many

HF = {"save_hf_ckpt": True}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """Two epochs of three steps under different rules of saving."""
    folder = tmp_path_factory.mktemp("saving")
    options = {
        "never": {"save_steps": -1, **HF},
        "each epoch": {"save_steps": -2},
        "every 2": {"save_steps": 2, **HF, "max_ckpt_num": 10},
        "every 4": {"save_steps": 4},
        "newest 2": {"save_steps": 1, **HF, "max_ckpt_num": 2},
        "loadable only": {"save_steps": 3, **HF, "disable_ds_ckpt": True},
    }
    places = {name: folder / name.replace(" ", "-") for name in options}
    return train_many({name: (places[name], flags(places[name], max_epochs=2, **options[name])) for name in options})


def kept(run: Run) -> list[str]:
    """Names of the checkpoints that are there."""
    return sorted(path.name for path in (run.folder / "checkpoints").glob("global_step*"))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("never", []),
        ("each epoch", ["global_step3", "global_step6"]),
        ("every 2", [f"global_step{n}{kind}" for n in (2, 4, 6) for kind in ("", "_hf")]),
        ("every 4", ["global_step4", "global_step6"]),
        ("newest 2", ["global_step5", "global_step5_hf", "global_step6", "global_step6_hf"]),
        ("loadable only", ["global_step3_hf", "global_step6_hf"]),
    ],
)
def test_checkpoints_are_written_when_asked_for_and_the_oldest_go_first(runs, name, found):
    assert kept(runs[name]) == found


def test_saving_does_not_change_training(runs):
    for run in runs.values():
        assert run.saved() == runs["never"].saved() and run.figures() == runs["never"].figures()


def test_the_memory_limit_removes_the_oldest_but_never_the_newest(tmp_path, runs):
    one = runs["every 2"].folder / "checkpoints" / "global_step2"
    size = sum(file.stat().st_size for file in one.rglob("*")) / 1e9
    two = train(tmp_path / "two", max_epochs=2, save_steps=1, max_ckpt_num=10, max_ckpt_mem=2.5 * size)
    assert kept(two) == ["global_step5", "global_step6"]
    none = train(tmp_path / "none", max_epochs=2, save_steps=1, max_ckpt_num=10, max_ckpt_mem=0.1 * size)
    assert kept(none) == ["global_step6"]


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path):
    run = train(
        tmp_path / "run", max_samples=11, train_batch_size=1, micro_train_batch_size=1, save_steps=1, max_ckpt_num=2
    )
    assert kept(run) == ["global_step10", "global_step11"]


def documents(folders: list[Path]) -> list[list]:
    """Vectors of a document from each checkpoint, found without being told the base model."""
    from openrlhf.models.modeling_clara import CLaRa

    models = [CLaRa.from_pretrained(folder) for folder in folders]
    assert all(not model.training for model in models)
    return [model.compress_documents(["A violin has four strings."])[0].tolist() for model in models]


def test_loadable_checkpoints_load_and_the_last_is_the_final_one(runs):
    run = runs["every 2"]
    steps = [run.folder / "checkpoints" / f"global_step{n}_hf" for n in (2, 4, 6)]
    second, fourth, sixth, final = call(documents, [*steps, run.folder])
    assert sixth == final
    assert second != fourth != sixth
    assert (steps[0] / "README.md").read_text().count('"step": 2') == 1


def test_resumable_checkpoints_hold_no_frozen_weights(runs):
    """Each would otherwise be as large as the base model."""
    base = sum(file.stat().st_size for file in BASE_MODEL.glob("*.safetensors"))
    step = runs["each epoch"].folder / "checkpoints" / "global_step3" / "mp_rank_00_model_states.pt"
    assert step.stat().st_size < base / 2


# --- a full disk


def limit_in(target: str, size: int) -> None:
    """From the moment a checkpoint of this name is written, no file may grow beyond `size` bytes, as on a full disk."""
    from openrlhf.models.modeling_clara import CLaRa
    from openrlhf.utils.distributed import Engine

    def limited(whole, position):
        def write(*arguments, **options):
            if Path(arguments[position]).name == target:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return whole(*arguments, **options)

        return write

    Engine.save = limited(Engine.save, 2)
    CLaRa.save_pretrained = limited(CLaRa.save_pretrained, 1)


def no_space(*_, **__) -> None:
    """What a write says on a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_space_in(target: str) -> None:
    """Every file of the checkpoint of this name fails as on a full disk, the second one half written."""
    import torch

    from openrlhf.models import checkpoint

    saves, written = torch.save, []

    def save(value, path, *rest, **options):
        saves(value, path, *rest, **options)
        if target in str(path):
            written.append(path)
            if len(written) == 2:
                os.truncate(path, Path(path).stat().st_size // 2)
                no_space()

    torch.save = save
    whole = checkpoint.save_file
    checkpoint.save_file = lambda state, path, **rest: no_space() if target in str(path) else whole(state, path, **rest)


OPTIONS = {"max_epochs": 2, "save_steps": 2, "max_ckpt_num": 1}
FULL = {
    "torch, limit": (functools.partial(limit_in, "global_step4", 20_000), ["global_step2"]),
    "torch, error": (functools.partial(no_space_in, "global_step4"), ["global_step2"]),
    "safetensors, limit": (functools.partial(limit_in, "run", 4_000), ["global_step6"]),
    "safetensors, error": (functools.partial(no_space_in, "run/.incoming"), ["global_step6"]),
}


@pytest.mark.parametrize("case", FULL)
def test_a_full_disk_leaves_earlier_checkpoints_whole_and_says_what_to_do(tmp_path, runs, case):
    hook, left = FULL[case]
    folder = tmp_path / "run"
    failed = start(folder, flags(folder, **OPTIONS), before=hook).wait()
    assert failed.code == 1 and "Traceback" not in failed.errors, failed.errors
    (said,) = [line for line in failed.errors.splitlines() if line.startswith("train_sft: ")]
    assert "could not be written" in said and "GB are free there" in said and "--load_checkpoint" in said
    if "error" in case:
        assert "No space left on device" in said
    assert kept(failed) == left
    assert not list((folder / "checkpoints").glob("partial-*")) and not list(folder.glob(".incoming*"))
    assert not (folder / "config.json").exists()

    again = start(folder, [*flags(folder, **OPTIONS), "--load_checkpoint"]).ok()
    assert f"resumed from step {left[0][-1]} of 6" in again.errors
    assert again.figures() == runs["never"].figures() and again.saved() == runs["never"].saved()


def test_a_full_disk_leaves_the_checkpoint_that_was_there_before(tmp_path, runs):
    """The final checkpoint is written over an older one only once it is whole."""
    folder = tmp_path / "run"
    first = train(folder, **OPTIONS)
    before = first.saved()
    (folder / "checkpoints" / "global_step6").rename(folder / "checkpoints" / "global_step4")  # so that it runs again
    hook = functools.partial(no_space_in, "run/.incoming")
    failed = start(folder, [*flags(folder, **OPTIONS), "--load_checkpoint"], before=hook).wait()
    assert failed.code == 1
    assert failed.saved() == before and (folder / "config.json").exists()


def test_one_rank_alone_without_space_says_so(tmp_path):
    folder = tmp_path / "run"
    run = start(folder, flags(folder, **OPTIONS), ranks=2, before=second_rank_without_space)
    run.ranks[1].join(60)
    assert run.ranks[1].exitcode == 1
    run.kill()
    assert "global_step2 could not be written" in (tmp_path / "run.1.err").read_text()
    assert kept(run) == []


def second_rank_without_space() -> None:
    """Rank 1 cannot write its part of a checkpoint."""
    if os.environ["RANK"] == "1":
        import torch

        torch.save = no_space


def test_settings_files_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "run.json"
    write_whole(path, "the first")

    def half(self, text, **_):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        no_space()

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "the second")
    assert path.read_text() == "the first"


def test_the_log_of_figures_drops_what_came_after_the_resumed_step(tmp_path):
    lines = [{"step": n, "split": split} for n in range(4) for split in ("train", "eval")]
    log = MetricsLog(tmp_path, 0, {})
    for line in lines:
        log.write(line)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "spl')
    assert read_metrics(tmp_path / "metrics.jsonl") == lines
    MetricsLog(tmp_path, 2, {})
    assert read_metrics(tmp_path / "metrics.jsonl") == [line for line in lines if line["step"] <= 2]
    MetricsLog(tmp_path, 0, {})
    assert read_metrics(tmp_path / "metrics.jsonl") == []
