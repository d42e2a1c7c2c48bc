"""Where figures and messages go: log lines, a metrics file, and wandb or TensorBoard when asked for."""

import json
import logging
import os
import sys
from pathlib import Path

import datasets
from transformers.utils import logging as transformers_logging

METRICS_FILE = "metrics.jsonl"


def set_up_logging(rank: int) -> None:
    """Log lines to stderr: all of rank 0, only errors of the others; progress bars only on a terminal."""
    level = logging.INFO if rank == 0 else logging.ERROR
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, force=True
    )
    for handler in logging.getLogger().handlers:
        handler.setLevel(level)  # the root's own level does not hold back a library that sets its logger to DEBUG
    web = ("httpx", "httpx2", "httpcore", "httpcore2", "openai", "urllib3")
    for noisy in (*web, "filelock", "fsspec", "torch", "DeepSpeed", "faiss"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if rank > 0 or not sys.stderr.isatty():
        datasets.disable_progress_bars()
        transformers_logging.disable_progress_bar()


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or, after a crash or on a full disk, as it was before."""
    draft = path.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a last line that a crash cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsLog:
    """Writes each line of figures to metrics.jsonl, and to wandb and TensorBoard when they were asked for.

    Args:
        folder: holds metrics.jsonl; lines of an earlier run beyond `step` are dropped, so that a resumed run's file
            equals that of a run that was never interrupted.
        step: the step that is resumed from, 0 at the start.
        config: the resolved configuration, given to wandb.
        wandb: options of `wandb.init`, None for no wandb.
        tensorboard: directory, None for no TensorBoard.
    """

    def __init__(
        self, folder: Path, step: int, config: dict, wandb: dict | None = None, tensorboard: str | None = None
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / METRICS_FILE
        kept = [line for line in read_metrics(self.path) if line["step"] <= step and step > 0]
        write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.last = {line["split"]: line for line in kept}
        self.wandb = self.tensorboard = None
        if wandb is not None:
            import wandb as library

            self.wandb = library.init(config=config, resume="allow", **wandb)
        if tensorboard is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(tensorboard, purge_step=step + 1 if step else None)

    def write(self, line: dict) -> None:
        """Appends one line; it has `step` and `split`, and figures."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = {key: value for key, value in line.items() if isinstance(value, (int, float)) and key != "step"}
        if self.wandb is not None:
            self.wandb.log({f"{line['split']}/{key}": value for key, value in figures.items()}, step=line["step"])
        if self.tensorboard is not None:
            for key, value in figures.items():
                self.tensorboard.add_scalar(f"{line['split']}/{key}", value, line["step"])

    def close(self) -> None:
        """Ends wandb and TensorBoard."""
        if self.wandb is not None:
            self.wandb.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()
