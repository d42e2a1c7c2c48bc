"""The three LoRA adapters of one decoder and the small table of special-token embeddings.

Knows nothing about stages, prompts or losses.
"""

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .lora import use_own_forward

ENCODER, DECODER, QUERY = "encoder_adapter", "decoder_adapter", "query_reasoner_adapter"
ADAPTERS = (ENCODER, DECODER, QUERY)
WEIGHTS_FILE = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."


class SpecialEmbeddings(nn.Module):
    """Rows of the added tokens, kept apart from the decoder's own frozen embedding matrix.

    `memory` `[M, D]` is the trainable part, `others` (`<AE>`, `<ENC>`, `<SEP>`) never trains. `head` holds the rows of
    an untied LM head, None where the head is tied to the input embedding.
    """

    others: torch.Tensor
    head: torch.Tensor | None

    def __init__(self, rows_SD: torch.Tensor, n_memory: int, head_SD: torch.Tensor | None):
        super().__init__()
        self.memory = nn.Parameter(rows_SD[:n_memory].clone())
        self.register_buffer("others", rows_SD[n_memory:].clone())
        self.register_buffer("head", None if head_SD is None else head_SD.clone())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Input rows and LM-head rows, each `[S, D]`, in the order of the token ids."""
        rows_SD = torch.cat([self.memory, self.others.to(self.memory.dtype)])
        return rows_SD, rows_SD if self.head is None else self.head


class AdapterRouter:
    """Chooses which adapter a forward pass goes through, without touching `requires_grad`.

    PEFT's `set_adapter` freezes the other adapters, which loses gradients when one loss goes through two of them.

    Threads may share a model: one passes through it at a time, and each through its own adapter.
    """

    def __init__(self, decoder: nn.Module):
        self.layers: list[Any] = [module for module in decoder.modules() if isinstance(module, BaseTunerLayer)]
        self.active: str | None = None
        self.lock = threading.RLock()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}  # which cannot be copied

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, lock=threading.RLock())

    def check(self, name: str) -> None:
        """Raises ValueError when the decoder has no adapter `name`."""
        names = list(self.layers[0].lora_A) if self.layers else []
        if name not in names:
            raise ValueError(f"the model has no {name}, only {names}: load a checkpoint with it, or add it first")

    @contextmanager
    def route(self, name: str | None) -> Iterator[None]:
        """Runs the body with adapter `name` active in every LoRA layer; None: the bare base model.

        Raises:
            ValueError: there is no such adapter; PEFT would run the bare base model in silence.
        """
        if name is not None:
            self.check(name)
        with self.lock:
            before, was = [layer._active_adapter for layer in self.layers], self.active
            try:
                for layer in self.layers:
                    layer._active_adapter = [] if name is None else [name]
                self.active = name
                yield
            finally:
                for layer, names in zip(self.layers, before, strict=True):
                    layer._active_adapter = names
                self.active = was

    def checkpoint_contexts(self):
        """`context_fn` of non-reentrant checkpointing: recompute under the adapter active in the forward pass."""
        return nullcontext(), self.route(self.active)


def add_adapter(decoder: nn.Module, name: str, rank: int, base_name: str) -> None:
    """Adds a freshly initialised LoRA adapter (a no-op until trained) to all linear layers but the LM head."""
    existing = getattr(decoder, "peft_config", {})
    targets = next(iter(existing.values())).target_modules if existing else "all-linear"
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=targets, task_type="CAUSAL_LM")
    config.base_model_name_or_path = base_name
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the design
        inject_adapter_in_model(config, decoder, adapter_name=name)
    use_own_forward(decoder)


def set_dropout(decoder: nn.Module, p: float) -> None:
    """Every adapter's dropout, 0.1 when it was made, while it trains: `p`, of the layers' inputs."""
    for config in decoder.peft_config.values():  # type: ignore[union-attr, operator]
        config.lora_dropout = p
    for layer in decoder.modules():
        for dropout in getattr(layer, "lora_dropout", {}).values():
            dropout.p = p


def adapter_state(decoder: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The adapter's parameters under the names of the base model's modules: `….q_proj.lora_A.weight`."""
    return {key.replace(f".{name}.", "."): p for key, p in decoder.named_parameters() if f".{name}." in key}


def load_adapter_state(decoder: nn.Module, name: str, state: dict[str, torch.Tensor], source: str) -> None:
    """Copies a state dict, named as `adapter_state` does, into adapter `name`.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; nothing is left at its random start in silence.
    """
    target = adapter_state(decoder, name)
    missing, unknown = sorted(set(target) - set(state)), sorted(set(state) - set(target))
    if missing or unknown:
        raise ValueError(
            f"{source} does not hold the whole {name} of this base model: {len(missing)} weights are missing "
            f"(e.g. {missing[:2]}), {len(unknown)} are unknown (e.g. {unknown[:2]}). Copy the checkpoint again, "
            "or check that decoder_model_name is the base model it was trained on"
        )
    with torch.no_grad():
        for key, parameter in target.items():
            if parameter.shape != state[key].shape:
                raise ValueError(
                    f"{source}: {key} has shape {tuple(state[key].shape)}, expected {tuple(parameter.shape)}"
                )
            parameter.copy_(state[key])


def save_adapter(decoder: Any, name: str, state: dict[str, torch.Tensor], target: Path, base_name: str) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT and vLLM read them."""
    target.mkdir(parents=True, exist_ok=True)
    config = decoder.peft_config[name]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(target)
    config.inference_mode = False
    weights = {_PEFT_PREFIX + key: value.contiguous() for key, value in state.items()}
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is cut short or damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete, copy it again")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({error}): copy the checkpoint again") from error


def read_adapter(source: Path, rank: int) -> dict[str, torch.Tensor]:
    """Reads a directory that `save_adapter` or PEFT wrote, named as `adapter_state` does.

    Raises:
        FileNotFoundError: one of its two files is missing.
        ValueError: its rank or alpha is not the checkpoint's (alpha = 2·rank), or its weights cannot be read.
    """
    path = source / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete, copy it again")
    config = LoraConfig.from_pretrained(str(source))
    if (config.r, config.lora_alpha) != (rank, 2 * rank):
        raise ValueError(f"{source} has rank {config.r} and alpha {config.lora_alpha}, config.json says lora_r {rank}")
    return {key.removeprefix(_PEFT_PREFIX): value for key, value in read_weights(source / WEIGHTS_FILE).items()}
