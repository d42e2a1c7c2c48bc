"""A checkpoint of each stage, trained once for all tests that start from one, and of the baseline text_rag."""

import pytest

from tests.trainer.facts import records, write_jsonl
from tests.trainer.launch import Run, flags, start, train

OVERFIT = {"train_batch_size": 4, "micro_train_batch_size": 4, "max_epochs": 12, "learning_rate": 1e-2}


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> dict[str, Run]:
    """Each stage on four records until it knows them: stage 1, then the three that can follow it; and the baseline."""
    folder = tmp_path_factory.mktemp("chain")
    for stage in ("stage1", "stage1_2", "stage2", "stage2_pretrain_retrieval", "text_rag"):
        write_jsonl(folder / f"{stage}.jsonl", records(stage, 4))
    runs = {"stage1": train(folder / "of-stage1", "stage1", mse_loss=True, **OVERFIT)}
    later = ("stage1_2", "stage2", "stage2_pretrain_retrieval")
    for stage in later:
        target = folder / f"of-{stage}"
        options = {"pretrain_checkpoint": runs["stage1"].folder, "mse_loss": stage == "stage1_2", **OVERFIT}
        runs[stage] = start(target, flags(target, stage, **options))
    target = folder / "of-text_rag"
    runs["text_rag"] = start(target, flags(target, "text_rag", **OVERFIT))
    return {stage: run.ok() for stage, run in runs.items()}
