"""Whether a checkpoint and its base model are there, for commands that look before they load. Reads no weights."""

from pathlib import Path

from openrlhf.models.adapters import QUERY
from openrlhf.models.checkpoint import adapters_of, find_base, find_checkpoint, read_config
from openrlhf.models.configuration_clara import CLaRaConfig


def inspect_checkpoint(
    name: str | Path, model_path: str | None = None, subfolder: str = ""
) -> tuple[Path, CLaRaConfig, str]:
    """A checkpoint's directory, its configuration, and what transformers loads the base model from.

    Args:
        name: directory or Hub repository of the checkpoint; `subfolder` inside it.
        model_path: base model in the place of the one that config.json names, as the flag --model_path gives it.

    Raises:
        FileNotFoundError: the checkpoint or its base model is missing.
        ValueError: config.json is not a CLaRa checkpoint's.
    """
    root = find_checkpoint(name, subfolder)
    config, _ = read_config(root, None, {"decoder_model_name": model_path} if model_path else {})
    try:
        base, _ = find_base(config.decoder_model_name, root, Path.cwd())
    except FileNotFoundError:
        raise FileNotFoundError(
            f"the base model {config.decoder_model_name!r} was not found, which {root} names: give its directory or "
            "Hub id with --model_path"
        ) from None
    return root, config, base


def can_search(root: Path, config: CLaRaConfig) -> bool:
    """Whether a checkpoint has a query reasoner: from stage 2, or kept beside a frozen compressor since."""
    return QUERY in adapters_of(root, config.training_stage)
