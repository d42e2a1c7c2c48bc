"""One rank, several ranks, every ZeRO stage and both precisions train the same model, dropout included."""

import sys

import pytest
import torch

from tests.trainer.facts import candidates, write_jsonl
from tests.trainer.launch import Run, adapter, command, flags, start, train, weight_files
from tests.trainer.test_numbers import CHECKPOINT

FIGURES = ("loss", "mse_loss", "span_loss", "grad_norm", "learning_rate", "tokens", "answer_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def alone(folder) -> Run:
    """20 records, global batches of 8, 8 and 4 in micro-batches of 3, on one rank."""
    return train(folder / "alone", mse_loss=True, span_loss_weight=0.5, max_epochs=2)


def close_weights(one, other, tolerance: float = 1e-5) -> None:
    """Asserts that two checkpoints hold the same weights."""
    assert set(weight_files(one)) == set(weight_files(other))
    for name in ("encoder", "decoder"):
        theirs = adapter(other, name)
        for key, value in adapter(one, name).items():
            torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance)


def same_curves(run: Run, alone: Run, tolerance: float = 1e-5) -> None:
    """Asserts that two runs report the same training figures."""
    for name in FIGURES:
        assert run.curve(name) == pytest.approx(alone.curve(name), rel=tolerance), name


def test_two_ranks_train_as_one_does(folder, alone):
    """The real command under torchrun, as SPEC 6 gives it; the last share of one rank is a copy that does not count."""
    arguments = flags(folder / "two", mse_loss=True, span_loss_weight=0.5, max_epochs=2)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = command(*torchrun, "-m", "openrlhf.cli.train_sft", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    two = Run(folder / "two")
    same_curves(two, alone)
    close_weights(two.folder, alone.folder)
    assert done.stdout.count('"world_size": 2') == 1  # one rank speaks
    assert done.stdout.count("finished in") == 1


@pytest.mark.parametrize(("zero", "ranks"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_every_zero_stage_gives_the_same_curve_and_weights(folder, alone, zero, ranks):
    target = folder / f"zero{zero}x{ranks}"
    run = start(
        target, flags(target, mse_loss=True, span_loss_weight=0.5, max_epochs=2, zero_stage=zero, save_steps=6), ranks
    ).ok()
    same_curves(run, alone)
    close_weights(run.folder, alone.folder)
    (step,) = (run.folder / "checkpoints").glob("global_step*")
    weights = list(step.glob("*model_states.pt"))
    assert len(weights) == (ranks if zero == 3 else 1)  # ZeRO 3 partitions the weights too


@pytest.mark.parametrize("zero", [2, 3])
def test_two_ranks_train_text_rag_as_one_does(folder, zero):
    """The real command under torchrun; the loss falls."""
    options = {"max_epochs": 4, "learning_rate": 1e-2, "max_samples": 8, "train_batch_size": 4, "zero_stage": zero}
    alone = train(folder / f"text{zero}", "text_rag", **options)
    arguments = flags(folder / f"texts{zero}", "text_rag", **options)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = command(*torchrun, "-m", "openrlhf.cli.train_sft", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    two = Run(folder / f"texts{zero}")
    for name in ("loss", "grad_norm", "tokens", "answer_tokens"):
        assert two.curve(name) == pytest.approx(alone.curve(name), rel=1e-4), name
    assert sum(two.curve()[-2:]) < 0.7 * sum(two.curve()[:2]), two.curve()
    theirs = adapter(alone.folder, "decoder")
    for key, value in adapter(two.folder, "decoder").items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def stage2(folder) -> dict[int, Run]:
    """Stage 2 with candidate lists of 3 to 5 and generation in evaluation, on one rank and on two."""
    data = write_jsonl(folder / "candidates.jsonl", [candidates(i, 3 + i % 3) for i in range(11)])
    runs = {}
    for ranks in (1, 2):
        target = folder / f"stage2x{ranks}"
        options = {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "eval_dataset": data, "do_eval_gen": True}
        runs[ranks] = start(target, flags(target, "stage2", data, **options), ranks)
    return {ranks: run.ok() for ranks, run in runs.items()}


@pytest.mark.parametrize("split", ["train", "eval"])
def test_two_ranks_report_the_same_stage_2_figures(stage2, split):
    names = ["loss", "recall_1", "recall_3", "recall_5"] + (["em", "f1", "cover_em"] if split == "eval" else [])
    for name in names:
        assert stage2[2].curve(name, split) == pytest.approx(stage2[1].curve(name, split), rel=1e-5), name
    assert len(stage2[1].lines(split)) == 2


def test_two_ranks_learn_the_same_query_reasoner(stage2):
    theirs = adapter(stage2[1].folder, "query_reasoner")
    for key, value in adapter(stage2[2].folder, "query_reasoner").items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing_changes_nothing_under_dropout(folder, alone):
    run = train(folder / "recomputed", mse_loss=True, span_loss_weight=0.5, max_epochs=2, gradient_checkpointing=True)
    assert run.figures() == alone.figures()
    assert run.saved() == alone.saved()


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_bf16_trains_within_rounding(folder, alone, zero):
    run = train(folder / f"bf16{zero}", mse_loss=True, span_loss_weight=0.5, max_epochs=2, bf16=True, zero_stage=zero)
    assert run.curve() == pytest.approx(alone.curve(), rel=0.01)
    assert run.curve("mse_loss") == pytest.approx(alone.curve("mse_loss"), rel=0.05)
    weights = adapter(run.folder, "encoder")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert sum(float(value.float().abs().sum()) for key, value in weights.items() if "lora_B" in key) > 0


def test_another_seed_gives_another_run(folder, alone):
    run = train(folder / "seed", mse_loss=True, span_loss_weight=0.5, max_epochs=2, seed=7)
    assert run.curve() != alone.curve()
    assert run.saved() != alone.saved()


def test_two_runs_with_one_seed_agree_bit_for_bit(folder, alone):
    run = train(folder / "again", mse_loss=True, span_loss_weight=0.5, max_epochs=2)
    assert run.figures() == alone.figures()
    assert run.saved() == alone.saved()


def test_the_library_prints_nothing_but_log_lines(alone):
    """Progress bars are for terminals only."""
    assert "examples/s" not in alone.errors and "it/s" not in alone.errors
    assert all(line[2] == ":" for line in alone.errors.splitlines()), alone.errors
