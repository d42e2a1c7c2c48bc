"""Checkpoints on disk (SPEC 5): find the base model, load ours or the public format, save atomically.

Knows nothing about training; what a checkpoint contains is here, how the model computes is in modeling_clara.
"""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from .adapters import (
    ADAPTERS,
    DECODER,
    ENCODER,
    QUERY,
    adapter_state,
    load_adapter_state,
    read_adapter,
    read_weights,
    save_adapter,
)
from .configuration_clara import TEXT_RAG, CLaRaConfig
from .public_format import ADAPTERS_FILE, CODE_FILE, read_prompts, read_public_adapters, read_public_rows

logger = logging.getLogger(__name__)

CONFIG_FILE, EMBEDDINGS_FILE = "config.json", "special_embeddings.safetensors"
HUB_OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "proxies")
# Options that transformers' Auto classes hand on and that mean nothing for this model.
IGNORED_OPTIONS = ("trust_remote_code", "code_revision", "low_cpu_mem_usage", "use_safetensors", "adapter_kwargs")


def find_base(name: str, *roots: Path) -> tuple[str, Path | None]:
    """Where the base model is: (what transformers loads, its local directory or None for the Hub).

    Raises:
        FileNotFoundError: `name` is a path and nothing is there.
    """
    for root in roots:
        local = Path(root, os.path.expanduser(name))
        if (local / CONFIG_FILE).is_file():
            return str(local.resolve()), local.resolve()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise FileNotFoundError(_base_missing(name, roots))
    return name, None


def _base_missing(name: str, roots) -> str:
    looked = ", ".join(str(Path(root, name)) for root in roots)
    return (
        f"the base model {name!r} was not found (looked at {looked}, and on the Hub where the name is a Hub id): "
        "pass decoder_model_name= with the directory or Hub id of the base model"
    )


def load_decoder(
    config: CLaRaConfig, *roots: Path, dtype: torch.dtype | None = None, device_map=None, use_fast: bool = True
):
    """The base model: (decoder, tokenizer, local directory or None).

    dtype: bfloat16 where CUDA is used and float32 on CPU, unless asked.
    """
    source, base_path = find_base(config.decoder_model_name, *roots)
    on_cuda = torch.cuda.is_available() and str(device_map) != "cpu"
    options: dict = {"dtype": dtype or (torch.bfloat16 if on_cuda else torch.float32), "device_map": device_map}
    if options["dtype"] == torch.bfloat16 and not on_cuda and torch.backends.cpu.get_cpu_capability() == "AVX2":
        logger.warning("this processor has no bfloat16 arithmetic (AVX-512): float32 is several times as fast here")
    if config.attn_implementation:
        options["attn_implementation"] = config.attn_implementation
    if config.quantization != "no":
        from transformers import BitsAndBytesConfig

        four = config.quantization == "int4"
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=four, load_in_8bit=not four, bnb_4bit_compute_dtype=options["dtype"]
        )
    try:
        decoder = AutoModelForCausalLM.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, use_fast=use_fast)
    except OSError as error:
        raise FileNotFoundError(f"{_base_missing(config.decoder_model_name, roots)}\n({error})") from error
    return decoder, tokenizer, base_path


def find_checkpoint(name: str | Path, subfolder: str = "", **hub) -> Path:
    """The checkpoint's directory: a local path where there is one, else downloaded from the Hub.

    Raises:
        FileNotFoundError: neither is there, or the directory holds no complete checkpoint.
    """
    if Path(name).is_dir():
        root = Path(name, subfolder or "")
    else:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            patterns = [f"{subfolder}/*", CODE_FILE] if subfolder else None
            root = Path(snapshot_download(str(name), allow_patterns=patterns, **hub), subfolder or "")
        except (OSError, HFValidationError) as error:
            raise FileNotFoundError(
                f"no checkpoint at {name}: no such directory, and not on the Hub ({error})"
            ) from error
    if not (root / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{root} holds no complete CLaRa checkpoint: {CONFIG_FILE} is missing")
    return root


def read_config(root: Path, given: CLaRaConfig | None, overrides: dict) -> tuple[CLaRaConfig, CLaRaConfig]:
    """(config to use, config as saved). Overrides must be fields of the config.

    Raises:
        ValueError: an override would change the number of memory tokens that the weights were trained with, or
            config.json is not a CLaRa checkpoint's.
        TypeError: an unknown keyword.
    """
    fields = json.loads((root / CONFIG_FILE).read_text(encoding="utf-8"))
    if fields.get("model_type") != CLaRaConfig.model_type:
        raise ValueError(f"{root / CONFIG_FILE} is of model_type {fields.get('model_type')!r}, not a CLaRa checkpoint")
    saved = CLaRaConfig(**fields)
    config = given if given is not None else CLaRaConfig(**fields)
    for key, value in overrides.items():
        if not hasattr(config, key):
            raise TypeError(
                f"from_pretrained got an unknown keyword {key!r}; it is neither an option nor a config field"
            )
        setattr(config, key, value)
    for key in ("compr_rate", "doc_max_length", "different_mem_tokens", "lora_r"):
        if getattr(config, key) != getattr(saved, key):
            raise ValueError(
                f"{key} is {getattr(saved, key)} in this checkpoint and cannot be changed to {getattr(config, key)}: "
                "its weights were trained with it; train a checkpoint of that setting instead"
            )
    if TEXT_RAG in (saved.training_stage, config.training_stage) and config.training_stage != saved.training_stage:
        raise ValueError(
            f"{root} is a {saved.training_stage} checkpoint and cannot be taken for one of {config.training_stage}: a "
            "text_rag checkpoint, the baseline that reads documents as text, has no compressor, and all others have one"
        )
    config.check()
    return config, saved


def load_pretrained(cls, source, given: CLaRaConfig | None = None, *, subfolder: str = "", dtype=None, torch_dtype=None,
                    device_map=None, use_fast: bool = True, **options):  # fmt: skip
    """Loads a checkpoint of our format or of the public one (SPEC 5), in eval mode.

    Args:
        source: directory, or Hub repository; `subfolder` inside it.
        given: a config object to use instead of the saved one (AutoModel passes it).
        dtype: bfloat16 on CUDA, float32 on CPU unless asked; `torch_dtype` is its older name.
        device_map: as in transformers.
        options: Hub options, and overrides of any config field; anything else is an error.

    Raises:
        FileNotFoundError: the checkpoint, one of its files or its base model is missing.
        ValueError: a weight is missing or of another shape, or an override does not fit the weights.
        TypeError: an unknown keyword.
    """
    hub = {key: options.pop(key) for key in HUB_OPTIONS if key in options}
    overrides = {k: v for k, v in options.items() if k not in IGNORED_OPTIONS and not k.startswith("_")}
    root = find_checkpoint(source, subfolder, **hub)
    config, saved = read_config(root, given, overrides)
    public = (root / ADAPTERS_FILE).is_file()
    if public and config.prompts is None:
        # The code, and with it the prompts, may lie at the root of a repository (SPEC 4).
        config.prompts = read_prompts([root, *list(root.parents)[: len(Path(subfolder or "").parts)]])
    dtype = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    load = {"dtype": dtype or torch_dtype, "device_map": device_map or config.device_map, "use_fast": use_fast}
    if public:
        states = read_public_adapters(root)
    else:
        states = {name: read_adapter(root / name, config.lora_r) for name in adapters_of(root, saved.training_stage)}
    decoder, tokenizer, base_path = load_decoder(config, root, Path.cwd(), **load)
    if (root / "tokenizer.json").is_file() and not public:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(root)
    model = cls(config, decoder, tokenizer, adapters=tuple(states), base_path=base_path)
    for name, state in states.items():
        load_adapter_state(model.decoder, name, state, str(root))
    rows, head = read_public_rows(root, model) if public else _read_rows(root, model)
    _load_rows(model, rows, head, root)
    if config.training_stage.startswith("stage2") and QUERY not in states:
        logger.warning("%s holds no query reasoner: it starts as a copy of the compressor", root)
        model.add_query_reasoner()
    return model.eval()


def adapters_of(root: Path, stage: str) -> list[str]:
    """The adapters of a checkpoint of ours: those its stage needs, and any other that is there."""
    if stage == TEXT_RAG:
        return [DECODER]
    needed = (ENCODER, DECODER, *([QUERY] if stage.startswith("stage2") else []))
    return list(dict.fromkeys((*needed, *(name for name in ADAPTERS if (root / name).is_dir()))))


def _read_rows(root: Path, model) -> tuple[torch.Tensor, torch.Tensor | None]:
    rows = read_weights(root / EMBEDDINGS_FILE)
    if "embed_tokens" not in rows:
        raise ValueError(f"{root / EMBEDDINGS_FILE} holds no embed_tokens, only {sorted(rows)}")
    return rows["embed_tokens"], rows.get("lm_head")


def _load_rows(model, rows_SD: torch.Tensor, head_SD: torch.Tensor | None, root: Path) -> None:
    special = model.special
    n_memory = len(special.memory)
    if rows_SD.shape != (n_memory + len(special.others), special.memory.shape[1]):
        raise ValueError(
            f"{root}: the special embeddings have shape {tuple(rows_SD.shape)}, not that of this base model"
        )
    if (head_SD is None) != (special.head is None):
        raise ValueError(f"{root}: the checkpoint and the base model do not agree on whether the LM head is tied")
    with torch.no_grad():
        special.memory.copy_(rows_SD[:n_memory])
        special.others.copy_(rows_SD[n_memory:])
        if head_SD is not None:
            special.head.copy_(head_SD)


def trained_state(model) -> dict[str, torch.Tensor]:
    """Everything a checkpoint stores of the weights, by parameter name; on CPU and detached."""
    state = {name: p for name, p in model.named_parameters() if "lora_" in name or name.startswith("special.")}
    state.update({name: b for name, b in model.named_buffers() if name.startswith("special.")})
    return {name: tensor.detach().cpu() for name, tensor in state.items()}


def save_pretrained(model, target: Path, state: dict | None = None, card: str | None = None) -> None:
    """Writes a whole checkpoint to `target`; at no moment is a half one there that loads.

    Files are written beside their place first, so a full disk leaves what was there untouched; config.json, without
    which nothing loads, goes in last.

    Args:
        state: what `trained_state` returns, where the parameters themselves are partitioned over ranks (ZeRO-3).
        card: README.md; a short one is made when not given.

    Raises:
        ValueError: `target` is the base model's directory, or holds a checkpoint of the public format.
    """
    if model.base_path is not None and target.resolve() == model.base_path.resolve():
        raise ValueError(f"{target} is the directory of the base model: save the checkpoint in another one")
    if (target / ADAPTERS_FILE).exists():
        raise ValueError(
            f"{target} holds a checkpoint of the public format, which would go on being read: save elsewhere"
        )
    state = state or trained_state(model)
    target.mkdir(parents=True, exist_ok=True)
    for left in target.glob(".incoming-*"):  # of a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    staged = target / f".incoming-{os.getpid()}"
    try:
        _write_files(model, staged, target, state, card)
        (target / CONFIG_FILE).unlink(missing_ok=True)
        for name in ADAPTERS:
            shutil.rmtree(target / name, ignore_errors=True)
        written = [path for path in sorted(staged.rglob("*")) if path.is_file() and path.name != CONFIG_FILE]
        for path in [*written, staged / CONFIG_FILE]:
            place = target / path.relative_to(staged)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, place)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _write_files(model, staged: Path, target: Path, state: dict, card: str | None) -> None:
    staged.mkdir()
    base = os.path.relpath(model.base_path, target.resolve()) if model.base_path else model.config.decoder_model_name
    for name in model.decoder.peft_config:
        names = {key: f"decoder.{_with_adapter(key, name)}" for key in adapter_state(model.decoder, name)}
        save_adapter(model.decoder, name, {key: state[full] for key, full in names.items()}, staged / name, base)
    rows = {
        "embed_tokens": torch.cat([state["special.memory"], state["special.others"].to(state["special.memory"].dtype)])
    }
    if "special.head" in state:
        rows["lm_head"] = state["special.head"]
    tokens = json.dumps(model.config.special_tokens)
    save_file({k: v.contiguous() for k, v in rows.items()}, staged / EMBEDDINGS_FILE, metadata={"tokens": tokens})
    model.tokens.tokenizer.save_pretrained(staged)
    for source in Path(__file__).parent.glob("*.py"):
        if source.name != "__init__.py":
            shutil.copyfile(source, staged / source.name)
    fields = model.config.to_dict()
    fields["decoder_model_name"] = base
    fields["architectures"] = ["CLaRa"]
    fields["auto_map"] = {"AutoConfig": "modeling_clara.CLaRaConfig", "AutoModel": "modeling_clara.CLaRa"}
    (staged / "README.md").write_text(card or _short_card(fields), encoding="utf-8")
    (staged / CONFIG_FILE).write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for path in staged.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _with_adapter(key: str, adapter: str) -> str:
    head, _, tail = key.rpartition(".lora_")
    matrix, _, rest = tail.partition(".")
    return f"{head}.lora_{matrix}.{adapter}.{rest}"


def _short_card(fields: dict) -> str:
    if fields["training_stage"] == TEXT_RAG:
        return (
            f"# Text RAG baseline\n\nBase model: {fields['decoder_model_name']}. Stage: {TEXT_RAG}. An adapter that "
            f"reads documents as text, {fields['doc_max_length']} tokens of each; there is no compressor.\n"
        )
    return (
        f"# CLaRa checkpoint\n\nBase model: {fields['decoder_model_name']}. Stage: {fields['training_stage']}. "
        f"Documents of {fields['doc_max_length']} tokens at rate {fields['compr_rate']}.\n"
    )
