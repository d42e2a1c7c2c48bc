"""The training loop: steps, figures, evaluation, checkpoints to resume from.

Contract: records and a collator in, a trained model and metrics.jsonl out. Knows nothing about stages beyond the batch
it is handed. Nothing here depends on where a run was interrupted: the order of records, dropout and every other draw
are functions of (seed, step, micro-batch).
"""

import logging
import resource
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from evaluation.metrics import (
    best_over_golds,
    cover_exact_match_score,
    exact_match_score,
    f1_score,
    normalize_answer,
    recall_at_k,
)
from openrlhf.datasets.collators import COUNTED, Collator, text_length
from openrlhf.datasets.sampler import BatchPlan, MicroBatch
from openrlhf.trainer.config import TrainingConfig
from openrlhf.utils.distributed import Engine, rank, seed_everything, sum_over_ranks, world_size
from openrlhf.utils.logging import MetricsLog

logger = logging.getLogger(__name__)

RECALL_AT = (1, 3, 5)
ANSWER_SCORES = {"em": exact_match_score, "f1": f1_score, "cover_em": cover_exact_match_score}
STEP_NAME = "global_step"


def batch_plan(config: TrainingConfig, data) -> BatchPlan:
    """The order of training on these records."""
    length = (lambda index: text_length(data[index])) if config.group_by_length else None
    return BatchPlan(len(data), config.train_batch_size, config.micro_train_batch_size, config.seed, length)


def compressed(batch: dict) -> int:
    """Documents of a batch that go through the compressor; none where they are read as text."""
    return len(batch.get("enc_input_ids", ()))


def step_of(path: Path) -> int:
    """The step a checkpoint directory was written at."""
    return int(path.name.removeprefix(STEP_NAME).removesuffix("_hf"))


def checkpoints(folder: Path, suffix: str = "") -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    found = [
        p for p in folder.glob(f"{STEP_NAME}*{suffix}") if p.name.removeprefix(STEP_NAME).removesuffix(suffix).isdigit()
    ]
    return sorted(found, key=step_of)


class SFTTrainer:
    """Trains the engine's model.

    Args:
        engine: the model in a DeepSpeed engine.
        config: the run's flags.
        data: training records.
        collate: records to batches.
        device: of this rank.
        log: where figures go; None on ranks that do not write.
        eval_data: records to evaluate on.
        answer: with --do_eval_gen, answers a list of records.
        save_model: writes a loadable checkpoint to a directory; called on all ranks.
    """

    def __init__(
        self,
        engine: Engine,
        config: TrainingConfig,
        data,
        collate: Collator,
        device: torch.device,
        log: MetricsLog | None,
        eval_data=None,
        answer: Callable[[list[dict]], list[str]] | None = None,
        save_model: Callable[[Path, dict], None] | None = None,
    ):
        self.engine, self.config, self.collate, self.device, self.log = engine, config, collate, device, log
        self.data, self.eval_data, self.answer, self.save_model = data, eval_data, answer, save_model
        self.plan = batch_plan(config, data)
        self.n_steps = self.plan.steps_per_epoch * config.max_epochs
        self.mse_weight = config.mse_loss_weight if config.mse_loss else 0.0
        spans = {"compute_span_loss": config.span_loss_weight > 0, "span_decay": config.span_decay}
        self.asked = {"compute_logits": False, **spans}
        self.last: dict[str, dict] = dict(log.last) if log is not None else {}
        self.seen: dict[str, float] = dict.fromkeys(COUNTED, 0)

    def fit(self, start: int = 0) -> dict[str, dict]:
        """Trains from step `start` (0 unless resumed) to the end; returns the last figures of each split."""
        bar = tqdm(
            total=self.n_steps, initial=start, desc=self.config.stage, disable=rank() > 0 or not sys.stderr.isatty()
        )
        if start == 0 and self.eval_data is not None:
            self.evaluate(0)
        began = time.monotonic()
        # Tokenising takes a quarter of a stage-2 step of a large model on a GPU, so the next step's is done meanwhile.
        ahead = ThreadPoolExecutor(max_workers=1)
        coming = ahead.submit(self.batches, start)
        for step in range(start, self.n_steps):
            ready = coming
            if step + 1 < self.n_steps:
                coming = ahead.submit(self.batches, step + 1)
            line = self.train_step(step, ready.result)
            done = step + 1
            if done % self.config.logging_steps == 0 or done == self.n_steps:
                eta = (time.monotonic() - began) / (done - start) * (self.n_steps - done)
                self._report(line, eta, bar)
            bar.update()
            if self.eval_data is not None and self._due(done, self.config.eval_steps, each_epoch=-1):
                self.evaluate(done)
            if self.config.save_steps != -1 and self._due(done, self.config.save_steps, each_epoch=-2):
                self.save(done)
        bar.close()
        ahead.shutdown()
        if rank() == 0:
            for key, text in COUNTED.items():
                if self.seen[key]:
                    logger.warning("%d %s (counted once a sample and epoch)", self.seen[key], text)
        return self.last

    def _due(self, done: int, every: int, each_epoch: int) -> bool:
        whole_epoch = done % self.plan.steps_per_epoch == 0
        return done == self.n_steps or (whole_epoch if every == each_epoch else done % every == 0)

    def rows(self, data, indices: list[int]) -> list[dict]:
        """Records with their index."""
        return [{**data[index], "index": index} for index in indices]

    def batches(self, step: int) -> list[tuple[MicroBatch, dict]]:
        """This rank's micro-batches of a step, on the CPU; depends on nothing but the step."""
        epoch, indices = self.plan.global_batch(step)
        lengths = {row["index"]: text_length(row) for row in self.rows(self.data, indices)}
        share = self.plan.share(indices, lengths.__getitem__, rank(), world_size())
        return [(micro, self.collate(self.rows(self.data, micro.indices), epoch)) for micro in share]

    def train_step(self, step: int, prepared: Callable[[], list[tuple[MicroBatch, dict]]]) -> dict:
        """One optimiser step over a global batch, waited for with `prepared`; returns its line of figures."""
        began = time.monotonic()
        self.engine.model.train()
        batches = prepared()
        whole = sum_over_ranks(
            {
                "losses": sum(batch["loss_count"] for micro, batch in batches if micro.real),
                "docs": sum(compressed(batch) for micro, batch in batches if micro.real),
            },
            self.device,
        )
        sums = self._no_sums()
        for micro, batch in batches:
            last = micro is batches[-1][0]
            self._train_micro_batch(step, micro, batch, whole, last, sums)
        learning_rate = self.engine.engine.get_lr()[0]
        grad_norm = self.engine.step()
        line: dict[str, Any] = {
            "step": step + 1,
            "split": "train",
            "epoch": round((step + 1) / self.plan.steps_per_epoch, 4),
        }
        line.update(self._averages(sums), learning_rate=learning_rate, grad_norm=grad_norm)
        seconds = time.monotonic() - began
        line.update(
            seconds=round(seconds, 3), tokens_per_s=round(line["tokens"] / seconds, 1), memory_gb=self._memory()
        )
        self.last["train"] = line
        return line

    def _train_micro_batch(
        self, step: int, micro: MicroBatch, batch: dict, whole: dict, last: bool, sums: dict
    ) -> None:
        seed_everything(self.config.seed, "dropout", step, micro.number)
        inputs = self._to_device(batch)
        loss, out = self.engine(batch=inputs, **self.asked)
        objective = loss * (batch["loss_count"] / max(whole["losses"], 1))
        share = compressed(batch) / max(whole["docs"], 1)
        if self.mse_weight:
            objective = objective + self.mse_weight * out["mse_loss"] * share
        if out["span_loss"] is not None:
            objective = objective + self.config.span_loss_weight * out["span_loss"] * share
        # The engine averages over ranks, the objective is already a share of the whole: undo the average.
        self.engine.backward(objective * (world_size() if micro.real else 0.0), last)
        if micro.real:
            self._add(sums, batch, loss, out)

    def _to_device(self, batch: dict) -> dict:
        return {key: v.to(self.device) if isinstance(v, torch.Tensor) else v for key, v in batch.items()}

    def _no_sums(self) -> dict[str, float]:
        names = ["loss", "losses", "mse", "span", "docs", "tokens", "ranked", "questions", *COUNTED]
        return dict.fromkeys([*names, *(f"recall_{k}" for k in RECALL_AT), *ANSWER_SCORES], 0.0)

    def _add(self, sums: dict, batch: dict, loss: torch.Tensor, out: dict) -> None:
        """Adds a micro-batch to the sums, each figure weighted by what it is a mean over."""
        n_docs = compressed(batch)
        sums["loss"] += float(loss.detach()) * batch["loss_count"]
        sums["losses"] += batch["loss_count"]
        sums["mse"] += float(out["mse_loss"].detach()) * n_docs
        if out["span_loss"] is not None:
            sums["span"] += float(out["span_loss"].detach()) * n_docs
        sums["docs"] += n_docs
        sums["tokens"] += batch["n_tokens"]
        for key in COUNTED:
            sums[key] += batch["counts"][key]
        if out["scores"] is not None:
            ranking = out["scores"].argsort(dim=-1, descending=True).tolist()
            for ranked, positives in zip(ranking, batch["pos_index"], strict=True):
                if positives:
                    sums["ranked"] += 1
                    for k in RECALL_AT:
                        sums[f"recall_{k}"] += recall_at_k(ranked, positives, k)

    def _averages(self, sums: dict) -> dict:
        total = sum_over_ranks(sums, self.device)
        for key in COUNTED:
            self.seen[key] += total[key]
        line = {"loss": total["loss"] / max(total["losses"], 1)}
        if total["docs"]:
            line["mse_loss"] = total["mse"] / total["docs"]
            if self.config.span_loss_weight:
                line["span_loss"] = total["span"] / total["docs"]
        if total["ranked"]:
            line.update({f"recall_{k}": total[f"recall_{k}"] / total["ranked"] for k in RECALL_AT})
        if total["questions"]:
            line.update({name: total[name] / total["questions"] for name in ANSWER_SCORES})
        line.update(tokens=int(total["tokens"]), answer_tokens=int(total["losses"]))
        return line

    def _memory(self) -> float:
        """Peak gigabytes: allocated on the CUDA device, or resident on a CPU."""
        if self.device.type == "cuda":
            return round(torch.cuda.max_memory_allocated() / 1e9, 2)
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)

    def _report(self, line: dict, eta: float, bar: tqdm) -> None:
        if rank() > 0:
            return
        if self.log is not None:
            self.log.write(line)
        shown = {"loss": f"{line['loss']:.4f}"}
        if "mse_loss" in line:
            shown["mse"] = f"{line['mse_loss']:.4f}"
        if "span_loss" in line:
            shown["span"] = f"{line['span_loss']:.4f}"
        if "recall_1" in line:
            shown["recall@1"] = f"{line['recall_1']:.3f}"
        shown.update({"tok/s": f"{line['tokens_per_s']:.0f}", "GB": f"{line['memory_gb']:.1f}"})
        if bar.disable:
            figures = "  ".join(f"{key} {value}" for key, value in shown.items())
            minutes, seconds = divmod(int(eta), 60)
            logger.info(
                "%s step %d/%d  %s  ETA %d:%02d",
                self.config.stage,
                line["step"],
                self.n_steps,
                figures,
                minutes,
                seconds,
            )
        else:
            bar.set_postfix(shown, refresh=False)

    def evaluate(self, step: int) -> dict:
        """Figures on the evaluation records, all of them; written as a line with split "eval"."""
        began = time.monotonic()
        self.engine.model.eval()
        every = list(range(len(self.eval_data)))
        lengths = [text_length(row) for row in self.eval_data]
        sums = self._no_sums()
        share = self._eval_plan().share(every, lengths.__getitem__, rank(), world_size())
        for micro in tqdm(share, desc="evaluation", leave=False, disable=rank() > 0 or not sys.stderr.isatty()):
            rows = self.rows(self.eval_data, micro.indices)
            batch = self.collate(rows, epoch=0, train=False)
            with torch.no_grad():
                loss, out = self.engine.model(batch=self._to_device(batch), **self.asked)
            if not micro.real:
                continue
            self._add(sums, batch, loss, out)
            if self.answer is not None:
                for row, text in zip(rows, self.answer(rows), strict=True):
                    golds = [gold for gold in row["golden"] if normalize_answer(gold)]
                    sums["questions"] += bool(golds)
                    for name, score in ANSWER_SCORES.items() if golds else ():
                        sums[name] += float(best_over_golds(score, text, golds))
        counted = dict(self.seen)
        line = {"step": step, "split": "eval", **self._averages(sums), "records": len(self.eval_data)}
        self.seen = counted  # what is reported at the end is about training data
        line["seconds"] = round(time.monotonic() - began, 3)
        self.last["eval"] = line
        if rank() == 0:
            if self.log is not None:
                self.log.write(line)
            figures = [f"{key} {value:.4f}" for key, value in line.items() if isinstance(value, float)]
            logger.info("%s step %d evaluation  %s", self.config.stage, step, "  ".join(figures))
        self.engine.model.train()
        return line

    def _eval_plan(self) -> BatchPlan:
        return BatchPlan(len(self.eval_data), len(self.eval_data), self.config.micro_train_batch_size, self.config.seed)

    def save(self, step: int) -> None:
        """Writes what --save_steps asks for, then removes the oldest beyond --max_ckpt_num and --max_ckpt_mem."""
        folder = Path(self.config.ckpt_path)
        if not self.config.disable_ds_ckpt and self.engine.save(folder, f"{STEP_NAME}{step}", {"step": step}):
            self._prune(checkpoints(folder))
        if self.config.save_hf_ckpt and self.save_model is not None:
            self.save_model(folder / f"{STEP_NAME}{step}_hf", self.last)
        if rank() == 0:
            self._prune(checkpoints(folder, "_hf"))

    def _prune(self, kept: list[Path]) -> None:
        limit = float("inf") if self.config.max_ckpt_mem is None else self.config.max_ckpt_mem * 1e9
        sizes = {path: sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) for path in kept}
        while len(kept) > self.config.max_ckpt_num or (len(kept) > 1 and sum(sizes[path] for path in kept) > limit):
            shutil.rmtree(kept.pop(0))
