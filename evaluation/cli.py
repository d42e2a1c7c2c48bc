"""What the commands of this room share: one-line errors, checks before a model loads, pictures written whole."""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import Any, NoReturn

import torch

from openrlhf.models.configuration_clara import TEXT_RAG
from openrlhf.models.modeling_clara import CLaRa
from openrlhf.utils.checkpoints import inspect_checkpoint


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        """Ends the program with status 2."""
        self.exit(2, f"{self.prog}: {' '.join(message.split())} (--help lists the flags)\n")


def check_checkpoint(name: str, model_path: str | None) -> Path:
    """The checkpoint's directory, its config.json checked and its base model looked for; no weights are read.

    Raises:
        FileNotFoundError, ValueError: saying what is missing or wrong.
    """
    if not Path(name).is_dir():
        raise FileNotFoundError(f"{name} is no directory: give the directory of a CLaRa checkpoint")
    root, config, _ = inspect_checkpoint(name, model_path)
    if config.training_stage == TEXT_RAG:
        raise ValueError(f"{root} is a text_rag checkpoint, which has no vectors: give a CLaRa checkpoint")
    return root


def load(root: Path, model_path: str | None, dtype: str | None) -> CLaRa:
    """The model, on the GPU where there is one; see `CLaRa.from_pretrained`."""
    options: dict = {"decoder_model_name": model_path} if model_path else {}
    if torch.cuda.is_available():
        options["device_map"] = "cuda"
    return CLaRa.from_pretrained(root, dtype=dtype, **options)


def prepare_output(folder: Path, *packages: tuple[str, str]) -> None:
    """Makes the directory for the results, after a look whether each (module, pip package) to draw with is there.

    Raises:
        ValueError: naming the pip package, or the directory that cannot be made.
    """
    for module, package in packages:
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"{package} is not installed: pip install {package}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error.strerror}): give another --output_dir") from error


def save_figure(figure: Any, target: Path) -> None:
    """Writes a matplotlib figure as PNG, whole or not at all."""
    draft = target.with_suffix(".draft")
    figure.savefig(draft, format="png", dpi=figure.dpi, metadata={"Software": None})
    os.replace(draft, target)
