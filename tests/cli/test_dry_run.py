"""--dry_run: nothing trained, nothing written, and what it prints is what a real run does."""

import json
import shutil

import pytest

from tests.trainer.launch import BASE_MODEL, Run, adapter, call, config, flags, start, train_many
from tests.trainer.test_numbers import CHECKPOINT

TRAINS = {
    "stage1": ("encoder", "decoder"),
    "stage1_2": ("encoder", "decoder"),
    "stage2": ("query_reasoner", "decoder"),
    "stage2_pretrain_retrieval": ("query_reasoner",),
    "text_rag": ("decoder",),
}
OPTIONS = {
    "stage1": {"max_samples": 11, "train_batch_size": 4, "rescale_memory": True},
    "stage1_2": {"pretrain_checkpoint": CHECKPOINT.parent / "c8_stage1_2", "lora_r": 8, "max_samples": 5},
    "stage2": {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "max_samples": 6, "train_batch_size": 4},
    "stage2_pretrain_retrieval": {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "max_samples": 4},
    "text_rag": {"max_samples": 7, "train_batch_size": 4},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dry")


@pytest.fixture(scope="module")
def real(folder) -> dict[str, Run]:
    """A real run of each stage."""
    return train_many({stage: (folder / stage, flags(folder / stage, stage, **OPTIONS[stage])) for stage in TRAINS})


def printed(run: Run) -> dict:
    """What a dry run says it would train."""
    return json.loads(run.output.split("would train ")[1])


@pytest.fixture(scope="module")
def dry(folder, real) -> dict[str, dict]:
    """What a dry run of each says; the base model's weights are not there."""
    base = shutil.copytree(BASE_MODEL, folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    said = {}
    for stage in TRAINS:
        line = flags(folder / f"dry-{stage}", stage, dry_run=True, **{**OPTIONS[stage], "pretrain": base})
        said[stage] = printed(start(folder / f"dry-{stage}", line).ok())
    return said


@pytest.mark.parametrize("stage", TRAINS)
def test_a_dry_run_writes_nothing(dry, folder, stage):
    assert dry[stage]
    assert not (folder / f"dry-{stage}").exists()
    here = {path.name for path in folder.iterdir() if not path.name.endswith((".out", ".err", ".jsonl"))}
    assert here == {*TRAINS, "no-weights"}


@pytest.mark.parametrize("stage", TRAINS)
def test_the_steps_are_those_of_the_real_run(dry, real, stage):
    assert dry[stage]["steps"] == len(real[stage].lines("train"))
    assert dry[stage]["records"] == OPTIONS[stage]["max_samples"]


@pytest.mark.parametrize("stage", TRAINS)
def test_the_tokens_are_those_of_the_real_run(dry, real, stage):
    assert dry[stage]["tokens_in_all"] == pytest.approx(sum(real[stage].curve("tokens")), abs=1)


def trainable(arguments: list[str]) -> dict[str, int]:
    """Trainable parameters of the real model, by adapter, and all parameters."""
    import torch

    from openrlhf.trainer import build

    settings = config(arguments)
    root = build.resolve_paths(settings)
    model = build.build_model(settings, build.model_config(settings, root), root, torch.device("cpu"))
    counts = dict.fromkeys([*model.decoder.peft_config, "memory_embeddings"], 0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            owner = next((key for key in model.decoder.peft_config if f".{key}." in name), "memory_embeddings")
            counts[owner] += parameter.numel()
    return {**counts, "all": sum(p.numel() for p in model.parameters())}


@pytest.mark.parametrize("stage", TRAINS)
def test_the_trainable_parameters_are_those_of_the_real_model(dry, real, folder, stage):
    known = call(trainable, flags(folder / "counted", stage, **OPTIONS[stage]))
    assert dry[stage]["all_parameters"] == known.pop("all")
    assert dry[stage]["trainable_parameters"] == known
    for name in TRAINS[stage]:
        saved = sum(value.numel() for value in adapter(real[stage].folder, name).values())
        assert dry[stage]["trainable_parameters"][f"{name}_adapter"] == saved > 0
    learning = {name for name, count in known.items() if count}
    expected = {f"{name}_adapter" for name in TRAINS[stage]}
    assert learning == expected | ({"memory_embeddings"} if "stage1" in stage else set())


def test_frozen_parts_count_as_frozen(folder):
    stage2 = {**OPTIONS["stage2"], "freeze_query_reasoner": True}
    run = start(folder / "frozen", flags(folder / "frozen", "stage2", dry_run=True, **stage2))
    embeddings = flags(folder / "memory", dry_run=True, freeze_memory_embeddings=True)
    other = start(folder / "memory", embeddings)
    trained = {**OPTIONS["stage1_2"], "freeze_compressor": True}
    third = start(folder / "compressor", flags(folder / "compressor", "stage1_2", dry_run=True, **trained))
    counts = printed(third.ok())["trainable_parameters"]
    assert counts["encoder_adapter"] == counts["memory_embeddings"] == 0 < counts["decoder_adapter"]
    counts = printed(run.ok())["trainable_parameters"]
    assert counts["query_reasoner_adapter"] == 0 < counts["decoder_adapter"]
    assert printed(other.ok())["trainable_parameters"]["memory_embeddings"] == 0


def test_a_dry_run_finds_bad_records(folder):
    path = folder / "bad.jsonl"
    path.write_text("{}\n")
    run = start(folder / "bad", flags(folder / "bad", data=path, dry_run=True)).wait()
    assert run.code == 1 and "bad.jsonl:1: data_type must be" in run.errors


def test_a_dry_run_may_look_at_a_run_that_is_there(real, folder):
    line = flags(real["stage1"].folder, "stage1", dry_run=True, **OPTIONS["stage1"])
    before = real["stage1"].saved()
    run = start(folder / "looked", line).ok()
    assert printed(run)["steps"] == 3 and real["stage1"].saved() == before
