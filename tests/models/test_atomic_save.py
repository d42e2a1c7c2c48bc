"""A save that fails or is killed never leaves a half checkpoint that loads (SPEC 5)."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase

from openrlhf.models import adapters, checkpoint
from openrlhf.models.modeling_clara import CLaRa
from tests.tiny import DOCS, new_model, shake

# Everything that writes during a save, in the order in which a save reaches it.
WRITES = {
    "adapter_config.json": (LoraConfig, "save_pretrained"),
    "adapter weights": (adapters, "save_file"),
    "special embeddings": (checkpoint, "save_file"),
    "tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
    "code": (shutil, "copyfile"),
    "README.md and config.json": (Path, "write_text"),
    "flush to disk": (os, "fsync"),
}


@pytest.fixture(scope="module")
def old(mistral) -> CLaRa:
    return new_model(mistral)


@pytest.fixture(scope="module")
def new(mistral) -> CLaRa:
    model = new_model(mistral)
    shake(model, seed=9)
    return model


def same(a: CLaRa, b: CLaRa) -> bool:
    return torch.equal(a.compress_documents(DOCS)[0], b.compress_documents(DOCS)[0])


def before_each_call(monkeypatch, place, name: str, action) -> None:
    """Calls `action(number of the call)` before each call of `place.name`."""
    real, calls = getattr(place, name), []

    def wrapped(*args, **kwargs):
        calls.append(name)
        action(len(calls))
        return real(*args, **kwargs)

    monkeypatch.setattr(place, name, wrapped)


def count_calls(model: CLaRa, target: Path, place, name: str) -> int:
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        before_each_call(patch, place, name, seen.append)
        model.save_pretrained(target)
    assert seen, f"a save no longer goes through {name}"
    return len(seen)


def fail_at(model: CLaRa, target: Path, place, name: str, number: int) -> None:
    def full_disk(call: int) -> None:
        if call == number:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        before_each_call(patch, place, name, full_disk)
        with pytest.raises(OSError, match="No space left"):
            model.save_pretrained(target)
    assert not list(target.glob(".incoming-*"))


@pytest.mark.parametrize("step", WRITES)
def test_a_full_disk_leaves_the_older_checkpoint_as_it_was(old, new, tmp_path, step):
    place, name = WRITES[step]
    target = tmp_path / "checkpoint"
    calls = count_calls(new, tmp_path / "count", place, name)
    old.save_pretrained(target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    for number in {1, (calls + 1) // 2, calls}:
        fail_at(new, target, place, name, number)
        assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert same(CLaRa.from_pretrained(target), old)


@pytest.mark.parametrize("step", WRITES)
def test_a_full_disk_at_the_first_save_leaves_nothing_that_loads(new, tmp_path, step):
    fail_at(new, tmp_path, *WRITES[step], number=1)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        CLaRa.from_pretrained(tmp_path)


def test_a_failure_while_files_are_put_in_place_leaves_nothing_that_loads(old, new, tmp_path):
    """Between two renames old and new files are mixed: then there is no config.json, so nothing loads."""
    calls = count_calls(new, tmp_path / "count", os, "replace")
    for number in (1, 2, calls // 2, calls):
        target = tmp_path / str(number)
        old.save_pretrained(target)
        fail_at(new, target, os, "replace", number)
        with pytest.raises(FileNotFoundError, match=r"config\.json"):
            CLaRa.from_pretrained(target)
        new.save_pretrained(target)
        assert same(CLaRa.from_pretrained(target), new)


def test_a_kill_at_any_moment_leaves_the_old_one_or_nothing_that_loads(old, new, tmp_path, monkeypatch):
    """What the directory holds before each flush and each rename, temporary files and all, is tried as it stands."""
    target, found = tmp_path / "checkpoint", []
    old.save_pretrained(target)

    def look(_: int) -> None:
        seen = shutil.copytree(target, tmp_path / f"moment{len(found)}")
        assert list(seen.glob(".incoming-*"))
        try:
            found.append("old" if same(CLaRa.from_pretrained(seen), old) else "mixed")
        except FileNotFoundError:
            found.append("nothing")

    before_each_call(monkeypatch, os, "fsync", look)
    before_each_call(monkeypatch, os, "replace", look)
    new.save_pretrained(target)
    monkeypatch.undo()
    flushes = found.count("old")
    assert flushes > 5 and found == ["old"] * flushes + ["nothing"] * flushes
    assert same(CLaRa.from_pretrained(target), new)


def test_what_a_killed_save_left_is_cleared_by_the_next_one(old, new, tmp_path):
    (tmp_path / ".incoming-1" / "encoder_adapter").mkdir(parents=True)
    (tmp_path / ".incoming-1" / "config.json").write_text("{")
    with pytest.raises(FileNotFoundError):
        CLaRa.from_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".incoming-*")) and same(CLaRa.from_pretrained(tmp_path), new)


def test_saving_over_an_older_checkpoint_replaces_it_whole(old, new, tmp_path):
    assert not same(old, new)
    old.save_pretrained(tmp_path)
    new.save_pretrained(tmp_path)
    assert same(CLaRa.from_pretrained(tmp_path), new)


def test_saved_files_are_readable_by_others(new, tmp_path):
    new.save_pretrained(tmp_path)
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.rglob("*") if path.is_file())
