"""Losses, gradients and figures: micro-batches add up to the global batch, and training is plain AdamW."""

import math

import pytest
import torch

from tests.trainer.facts import candidates, paraphrase, qa, write_jsonl
from tests.trainer.launch import BASE_MODEL, ROOT, call, exact_trainer, flags

CHECKPOINT = ROOT / "tests" / "data" / "vectors" / "checkpoints" / "c8_stage2"
OPTIONS = {
    "stage1": {"mse_loss": True, "mse_loss_weight": 0.5, "span_loss_weight": 0.7, "span_decay": 0.6},
    "stage2": {"pretrain_checkpoint": CHECKPOINT, "lora_r": 8, "topk_temperature": 0.2},
    "text_rag": {},
}
SCHEDULE = {
    "lr_scheduler": "linear",
    "lr_warmup_ratio": 0.0,
    "adam_betas": [0.8, 0.9],
    "l2": 0.1,
    "max_norm": 0.5,
    "max_epochs": 2,
}


def trained(arguments: list[str], steps: int) -> dict:
    """Losses, gradient norms, and the gradients and weights of the first and last of some steps."""
    from deepspeed.utils import safe_get_full_grad

    trainer = exact_trainer(arguments)
    learning = {name: p for name, p in trainer.engine.model.named_parameters() if p.requires_grad}
    gradients, passes = [], []

    def count(*_) -> None:
        passes.extend([1] * torch.is_grad_enabled())  # frozen documents go through without gradients, and only once

    trainer.engine.model.decoder.model.layers[0].mlp.register_forward_pre_hook(count)
    update = trainer.engine.step

    def step() -> float:
        gradients.append({name: safe_get_full_grad(p).clone() for name, p in learning.items()})
        return update()

    trainer.engine.step = step
    lines = [trainer.train_step(number, lambda n=number: trainer.batches(n)) for number in range(steps)]
    last = {n: p.detach().clone() for n, p in learning.items()}
    return {"lines": lines, "gradients": gradients[0], "passes": len(passes), "weights": last}


def plain(arguments: list[str], steps: int) -> dict:
    """The same steps written out in plain PyTorch, each global batch in one piece."""
    from openrlhf.trainer import build

    trainer = exact_trainer(arguments)
    settings, model = trainer.config, trainer.engine.model
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        learning.values(), lr=settings.learning_rate, betas=(0.8, 0.9), weight_decay=settings.l2
    )
    lines, first = [], {}
    model.train()
    for number in range(steps):
        epoch, indices = trainer.plan.global_batch(number)
        batch = build.build_collator(settings, model.tokens)(trainer.rows(trainer.data, indices), epoch)
        loss, out = model(batch=batch, compute_span_loss=settings.span_loss_weight > 0, span_decay=settings.span_decay)
        weight = settings.mse_loss_weight if settings.mse_loss else 0.0
        for p in learning.values():
            p.grad = None
        objective = loss + weight * out["mse_loss"]
        if settings.span_loss_weight:
            objective = objective + settings.span_loss_weight * out["span_loss"]
        objective.backward()
        first = first or {name: p.grad.clone() for name, p in learning.items()}
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), settings.max_norm)
        rate = settings.learning_rate * (1 - number / trainer.n_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        line = {"loss": loss.item(), "grad_norm": norm.item(), "learning_rate": rate}
        if "enc_input_ids" in batch:
            line["mse_loss"] = out["mse_loss"].item()
        if settings.span_loss_weight:
            line["span_loss"] = out["span_loss"].item()
        lines.append(line)
    return {"lines": lines, "gradients": first, "weights": {n: p.detach().clone() for n, p in learning.items()}}


def distance(one: dict, other: dict) -> float:
    """Relative distance of two sets of tensors."""
    assert set(one) == set(other)
    square = sum(float((one[name].double() - other[name].double()).pow(2).sum()) for name in one)
    return math.sqrt(square / sum(float(one[name].double().pow(2).sum()) for name in one))


@pytest.fixture(scope="module", params=list(OPTIONS))
def numbers(request, tmp_path_factory):
    """Plain PyTorch and our trainer with several micro-batch sizes."""
    folder = tmp_path_factory.mktemp("numbers")
    lines = [paraphrase(i) if i % 3 == 2 else qa(i) for i in range(12)] if request.param == "stage1" else None
    lines = lines or [candidates(i, 3 + i % 3) for i in range(12)]
    data = write_jsonl(folder / "data.jsonl", lines)
    known = {}
    for micro in (1, 3, 8):
        options = {**OPTIONS[request.param], **SCHEDULE, "micro_train_batch_size": micro}
        arguments = flags(folder / str(micro), request.param, data, **options)
        known[micro] = call(trained, arguments, 4)
    known["plain"] = call(plain, arguments, 4)
    known["recomputed"] = call(trained, [*arguments, "--gradient_checkpointing"], 4)
    return known


@pytest.mark.parametrize("micro", [1, 3])
def test_accumulated_gradients_are_those_of_the_batch_in_one_piece(numbers, micro):
    assert distance(numbers[8]["gradients"], numbers[micro]["gradients"]) < 1e-6


@pytest.mark.parametrize("micro", [1, 3])
def test_the_loss_of_an_accumulated_step_is_that_of_the_batch_in_one_piece(numbers, micro):
    for name in {"loss", "mse_loss", "span_loss", "grad_norm"} & set(numbers[8]["lines"][0]):
        one = [line[name] for line in numbers[8]["lines"]]
        assert [line[name] for line in numbers[micro]["lines"]] == pytest.approx(one, rel=2e-6), name


@pytest.mark.parametrize("micro", [1, 3, 8])
def test_training_is_adamw_with_clipping_as_a_plain_loop_does_it(numbers, micro):
    assert distance(numbers["plain"]["gradients"], numbers[micro]["gradients"]) < 1e-6
    for ours, theirs in zip(numbers[micro]["lines"], numbers["plain"]["lines"], strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-6)
        assert theirs["grad_norm"] > 0.5  # the clipping is at work
    assert distance(numbers["plain"]["weights"], numbers[micro]["weights"]) < 1e-6


def test_gradient_checkpointing_recomputes_and_changes_nothing(numbers):
    assert distance(numbers[8]["gradients"], numbers["recomputed"]["gradients"]) < 1e-9
    assert distance(numbers[8]["weights"], numbers["recomputed"]["weights"]) < 1e-9
    assert numbers["recomputed"]["passes"] == 2 * numbers[8]["passes"]


class StubEngine:
    """An engine whose model answers with given losses, and that keeps what it is given."""

    def __init__(self, answers: list[tuple[float, dict]]):
        self.answers, self.objectives, self.model, self.engine = answers, [], torch.nn.Linear(1, 1), self

    def __call__(self, **_):
        loss, out = self.answers[len(self.objectives)]
        return torch.tensor(loss), out

    def backward(self, objective: torch.Tensor, last: bool) -> None:
        self.objectives.append((float(objective), last))

    def get_lr(self) -> list[float]:
        return [0.25]

    def step(self) -> float:
        return 2.0


def collated(rows: list[dict], epoch: int, train: bool = True) -> dict:
    """A batch whose counts are written in the records."""
    (row,) = rows
    return {**row["batch"], "enc_input_ids": torch.zeros(len(row["docs"]), 1), "counts": {key: 0 for key in COUNTED}}


COUNTED = ("docs_cut", "docs_left_out", "answers_cut", "answers_lost")


def hand_made_step() -> tuple[dict, list]:
    """A step over two micro-batches: 9 answer tokens at loss 1 with 1 document, 1 at loss 5 with 3 documents."""
    from openrlhf.trainer.sft_trainer import SFTTrainer

    few = {"loss_count": 9, "n_tokens": 20, "pos_index": [[0], [2]]}
    many = {"loss_count": 1, "n_tokens": 5, "pos_index": [[], [1]]}
    text = {"question": ["?"], "answers": ["!"]}
    data = [{**text, "docs": ["."], "batch": few}, {**text, "docs": [".", ".", "."], "batch": many}]
    scores = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    figures = {"mse_loss": torch.tensor(2.0), "span_loss": torch.tensor(8.0), "scores": scores}
    engine = StubEngine([(1.0, figures)])
    engine.answers.append((5.0, {**figures, "mse_loss": torch.tensor(6.0), "span_loss": torch.tensor(4.0)}))
    options = {"train_batch_size": 2, "micro_train_batch_size": 1, "mse_loss": True, "mse_loss_weight": 0.5}
    options["span_loss_weight"] = 0.25
    from tests.trainer.launch import config

    settings = config(flags(ROOT / "none", "stage1", BASE_MODEL, **options))
    trainer = SFTTrainer(engine, settings, data, collated, torch.device("cpu"), None)
    trainer.plan = type("Plan", (), {"global_batch": lambda *_: (0, [0, 1]), "steps_per_epoch": 1, "share": shares})()
    return trainer.train_step(0, lambda: trainer.batches(0)), engine.objectives


def shares(_, indices: list[int], *__) -> list:
    """Each record a micro-batch."""
    from openrlhf.datasets.sampler import MicroBatch

    return [MicroBatch([i], i) for i in indices]


def test_figures_and_gradients_are_weighted_by_what_they_count():
    line, objectives = call(hand_made_step)
    assert line["loss"] == pytest.approx((9 * 1.0 + 1 * 5.0) / 10)
    assert line["mse_loss"] == pytest.approx((1 * 2.0 + 3 * 6.0) / 4)
    assert line["span_loss"] == pytest.approx((1 * 8.0 + 3 * 4.0) / 4)
    assert [line[f"recall_{k}"] for k in (1, 3)] == pytest.approx([1 / 3, 1.0])  # three of four have positives
    assert (line["tokens"], line["answer_tokens"]) == (25, 10)
    assert (line["learning_rate"], line["grad_norm"]) == (0.25, 2.0)
    of_first = 0.9 * 1 + 0.5 * 2 / 4 + 0.25 * 8 / 4
    of_second = 0.1 * 5 + 0.5 * 6 * 3 / 4 + 0.25 * 4 * 3 / 4
    assert [value for value, _ in objectives] == pytest.approx([of_first, of_second])
    assert [last for _, last in objectives] == [False, True]
