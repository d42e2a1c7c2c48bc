"""What a vLLM server needs of a checkpoint: the untouched base model, the generator as a LoRA beside it, and the
generator added into the base's weights.

    base/             the base model's own files, byte for byte; not where they are left out
    decoder_adapter/  the generator, a LoRA that PEFT and vLLM load
    merged/           base + generator in one, for servers where prompt embeddings and LoRA do not go together
    README.md         the commands that serve them
    export.json       what was exported, and the files that make it up

Contract: the export is there whole or not at all, and nothing that another hand made is replaced. Prompts reach vLLM as
embeddings, so it needs no memory tokens: embedding matrix and tokenizer are the base model's own. Works on the files,
one shard at a time: no model is built, so that it takes little memory and no conversion of names or configuration comes
between the base model's files and those that are served. Knows nothing about HTTP.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from openrlhf.models.adapters import DECODER, WEIGHTS_FILE, read_adapter
from openrlhf.models.checkpoint import CONFIG_FILE, find_base, find_checkpoint, read_config
from openrlhf.models.configuration_clara import CLaRaConfig
from openrlhf.models.public_format import ADAPTERS_FILE, read_public_adapters

logger = logging.getLogger(__name__)

BASE, MERGED, MANIFEST = "base", "merged", "export.json"
MADE_BY = "openrlhf.cli.export_vllm"
DTYPES = ("bfloat16", "float16", "float32")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM's --max-lora-rank takes."""
SHARD_BYTES = 4 * 10**9
_ROOM = 64 * 2**20  # bytes kept free beside what is written: tokenizer files, the file system's own
_INDEX, _ONE_FILE = "model.safetensors.index.json", "model.safetensors"
# A base model's files beside its weights; a consolidated.safetensors (the same weights again) and code stay behind.
_SMALL = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
    "chat_template.json",
)


@dataclass(frozen=True)
class Export:
    """All that an export is made of; `plan` finds and checks it."""

    output: Path
    config: CLaRaConfig
    base: Path
    base_name: str
    """The base model as the user names it, for a server that loads it from there."""
    adapter: dict[str, torch.Tensor]
    """LoRA weights under the names of the base model's modules: `….q_proj.lora_A.weight`."""
    dtype: torch.dtype
    with_base: bool

    @property
    def max_lora_rank(self) -> int:
        """The smallest --max-lora-rank that the adapter fits in."""
        return next(rank for rank in RANKS if rank >= self.config.lora_r)


def plan(
    checkpoint: str,
    output: Path,
    decoder_model_name: str | None = None,
    dtype: str = "bfloat16",
    with_base: bool = True,
) -> Export:
    """Finds and checks everything that an export needs, and reads the adapter; writes nothing.

    Args:
        checkpoint: directory or Hub name.
        output: a new directory, or an earlier export that is to be replaced.
        decoder_model_name: the base model, where the checkpoint names one that is not here.
        dtype: of `merged/`.
        with_base: whether the base model's files are copied too.

    Raises:
        FileNotFoundError: the checkpoint, its base model or one of their files is missing.
        ValueError: the two do not belong together, vLLM could not load the result, or `output` is something else.
        OSError: the disk has not enough room.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    check_replaceable(output)
    root = find_checkpoint(checkpoint)
    overrides = {"decoder_model_name": decoder_model_name} if decoder_model_name else {}
    config, _ = read_config(root, None, overrides)
    if config.quantization != "no":
        raise ValueError(
            f"{root} was trained over a base model quantised to {config.quantization}, and the export would serve the "
            "base model as it is, which is another one: train over an unquantised base model to serve with vLLM"
        )
    if config.lora_r > RANKS[-1]:
        raise ValueError(f"{root} has adapters of rank {config.lora_r}; vLLM loads ranks up to {RANKS[-1]}")
    name, base = find_base(config.decoder_model_name, root, Path.cwd())
    base = base or _download(name)
    public = (root / ADAPTERS_FILE).is_file()
    adapter = read_public_adapters(root)[DECODER] if public else read_adapter(root / DECODER, config.lora_r)
    export = Export(output, config, base, str(name), adapter, getattr(torch, dtype), with_base)
    tensors = list(base_tensors(base))
    _check_fits(export, tensors)
    if not public:
        _check_tokenizer(root, base, config)
    _check_room(export, tensors)
    return export


def write(export: Export) -> None:
    """Writes the export beside its place and then moves it there.

    Raises:
        OSError: the disk is full, or not writable; what was there before is untouched.
    """
    output = export.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    _clear_drafts(output)
    draft = _draft(output, os.getpid())
    try:
        draft.mkdir()
        if export.with_base:
            _copy_base(export.base, draft / BASE)
        _write_adapter(export, draft / DECODER)
        _write_merged(export, draft / MERGED)
        (draft / "README.md").write_text(readme(export), encoding="utf-8")
        _write_manifest(export, draft)
        _settle(draft)
        check_replaceable(output)  # again: somebody may have put something there meanwhile
        aside = _draft(output, f"{os.getpid()}-before")
        if output.exists():
            os.replace(output, aside)
        os.replace(draft, output)
        shutil.rmtree(aside, ignore_errors=True)
    except SafetensorError as error:
        raise OSError(f"{output} could not be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def check_replaceable(output: Path) -> None:
    """Raises ValueError when something is at `output` that is not, file by file, an export."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        if manifest["made_by"] != MADE_BY:
            raise ValueError
        made = {MANIFEST, *manifest["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{output} is there and is not an earlier export: choose another --output") from None
    others = sorted({str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()} - made)
    if others:
        raise ValueError(
            f"{output} is an earlier export with other files in it ({', '.join(others[:3])}), which would be lost: "
            "move them away, or choose another --output"
        )


def base_tensors(base: Path) -> Iterator[tuple[Path, str, tuple[int, ...], int]]:
    """(file, name, shape, bytes) of each weight of a base model, in the order of its files.

    Raises:
        FileNotFoundError: it has no safetensors, or one of them is missing.
        ValueError: one of them is cut short or damaged.
    """
    for path in _weight_files(base):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a dictionary)
                    part = file.get_slice(name)
                    shape = tuple(part.get_shape())
                    yield path, name, shape, torch.Size(shape).numel() * _item_bytes(part.get_dtype())
        except SafetensorError as error:
            raise ValueError(f"{path} is cut short or damaged ({error}): get the base model again") from error


def _item_bytes(name: str) -> int:
    return max(1, int("".join(c for c in name if c.isdigit())[:2] or 8) // 8)  # F32, BF16, F8_E4M3, BOOL


def _weight_files(base: Path) -> list[Path]:
    if (base / _INDEX).is_file():
        names = sorted(set(json.loads((base / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [_ONE_FILE]
    missing = [name for name in names if not (base / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{base} holds no {missing[0]}: the export needs the base model's weights as safetensors; get it whole, or "
            "save it again with transformers' save_pretrained"
        )
    return [base / name for name in names]


def _download(name: str) -> Path:
    """The directory of a base model from the Hub."""
    from huggingface_hub import snapshot_download

    try:
        patterns = [*_SMALL, _INDEX, "model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except OSError as error:
        raise FileNotFoundError(
            f"the base model {name!r} is neither a directory nor to be had from the Hub: pass --decoder_model_name "
            f"with its directory ({error})"
        ) from error


def _pairs(adapter: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Weight of the base → its A `[R, D]` and B `[O, R]`."""
    modules = {key.removesuffix(".lora_A.weight") for key in adapter if key.endswith(".lora_A.weight")}
    return {f"{m}.weight": (adapter[f"{m}.lora_A.weight"], adapter[f"{m}.lora_B.weight"]) for m in modules}


def _check_fits(export: Export, tensors: list) -> None:
    """Raises ValueError when the adapter is not one over the weights of this base model."""
    odd = [key for key in export.adapter if not key.endswith((".lora_A.weight", ".lora_B.weight"))]
    if odd or len(export.adapter) != 2 * len(_pairs(export.adapter)) or not export.adapter:
        raise ValueError(f"the {DECODER} holds more or less than pairs of LoRA matrices, which vLLM cannot load: {odd}")
    shapes = {name: shape for _, name, shape, _ in tensors}
    for name, (a_RD, b_OR) in _pairs(export.adapter).items():
        if shapes.get(name) != (b_OR.shape[0], a_RD.shape[1]):
            found = f"is {list(shapes[name])}" if name in shapes else "does not exist"
            raise ValueError(
                f"the {DECODER} does not belong to the base model {export.base}: {name} {found} there, the adapter "
                f"is for {[b_OR.shape[0], a_RD.shape[1]]}. Pass --decoder_model_name with the one it was trained on"
            )


def _check_tokenizer(root: Path, base: Path, config: CLaRaConfig) -> None:
    """Raises ValueError when the checkpoint's tokenizer is not the base model's with our tokens added: vLLM would spell
    out other text than the model means."""
    if not (root / "tokenizer.json").is_file():
        return
    ours = PreTrainedTokenizerFast.from_pretrained(root).get_vocab()
    first = min(ours.get(token, len(ours)) for token in config.special_tokens)
    theirs = AutoTokenizer.from_pretrained(base).get_vocab()
    if {token: i for token, i in ours.items() if i < first} != {t: i for t, i in theirs.items() if i < first}:
        raise ValueError(
            f"the base model {base} has another tokenizer than the one the checkpoint was trained with: pass "
            "--decoder_model_name with the base model it was trained on"
        )


def _check_room(export: Export, tensors: list) -> None:
    """Raises OSError when what is to be written does not fit on the disk."""
    size = {name: torch.Size(shape).numel() * export.dtype.itemsize for _, name, shape, _ in tensors}
    needed = sum(size.values()) + sum(t.numel() * t.element_size() for t in export.adapter.values()) + _ROOM
    needed += sum(count for *_, count in tensors) if export.with_base else 0
    there = next(path for path in export.output.absolute().parents if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        hint = "; --no_base leaves out the copy of the base model" if export.with_base else ""
        raise OSError(f"{needed / 1e9:.1f} GB are needed in {there}, {free / 1e9:.1f} GB are free{hint}")


def _draft(output: Path, owner: int | str) -> Path:
    return output.with_name(f".{output.name}.draft-{owner}")


def _clear_drafts(output: Path) -> None:
    """Removes what exports that were killed have left."""
    start = _draft(output, "").name
    for left in [path for path in output.parent.iterdir() if path.name.startswith(start)]:
        owner = left.name.removeprefix(start).partition("-")[0]
        if owner.isdigit() and not _runs(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _settle(draft: Path) -> None:
    """Sees every file onto the disk, readable by all."""
    for path in draft.rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _copy_base(base: Path, target: Path) -> None:
    target.mkdir()
    small = [base / name for name in (*_SMALL, _INDEX) if (base / name).is_file()]
    for path in tqdm([*small, *_weight_files(base)], desc=BASE, unit="file", disable=None):
        shutil.copyfile(path, target / path.name)


def _write_adapter(export: Export, target: Path) -> None:
    """The generator as PEFT and vLLM read it: plain LoRA of one rank, no further trained modules."""
    target.mkdir()
    rank = export.config.lora_r
    names = sorted({key.rpartition(".lora_")[0].rpartition(".")[2] for key in export.adapter})
    config = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.1, target_modules=names, task_type="CAUSAL_LM")
    config.base_model_name_or_path = f"../{BASE}" if export.with_base else export.base_name
    config.inference_mode = True
    config.save_pretrained(str(target))
    weights = {f"base_model.model.{key}": value.contiguous() for key, value in export.adapter.items()}
    save_file(weights, target / WEIGHTS_FILE, metadata={"format": "pt"})


def _write_merged(export: Export, target: Path) -> None:
    """W + s·B·A for each weight that the generator has an update of, s = alpha / r = 2, added in float32 and rounded
    once; every other weight in the export's dtype. In shards of at most `SHARD_BYTES`."""
    target.mkdir()
    for name in _SMALL:
        if (export.base / name).is_file():
            shutil.copyfile(export.base / name, target / name)
    fields = json.loads((export.base / CONFIG_FILE).read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in fields else "torch_dtype"  # the latter is what older versions of transformers read
    fields[key] = str(export.dtype).removeprefix("torch.")
    text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    (target / CONFIG_FILE).write_text(text, encoding="utf-8")

    tensors = list(base_tensors(export.base))
    shards = _shards(tensors, export.dtype)
    total = sum(torch.Size(shape).numel() * export.dtype.itemsize for _, _, shape, _ in tensors)
    pairs, weight_map = _pairs(export.adapter), {}
    with tqdm(total=len(tensors), desc=MERGED, unit="weight", disable=None) as bar:
        for number, shard in enumerate(shards, 1):
            place = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _ONE_FILE
            weights = {}
            for path, name, *_ in shard:
                with safe_open(path, "pt") as file:
                    weights[name] = _merged(file.get_tensor(name), pairs.get(name), export.dtype)
                weight_map[name] = place
                bar.update()
            save_file(weights, target / place, metadata={"format": "pt"})
    if len(shards) > 1:
        index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        (target / _INDEX).write_text(index, encoding="utf-8")


def _merged(base_OD: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
    if pair is None:
        return base_OD.to(dtype) if base_OD.is_floating_point() else base_OD
    a_RD, b_OR = pair
    return (base_OD.float() + 2 * (b_OR.float() @ a_RD.float())).to(dtype)


def _shards(tensors: list, dtype: torch.dtype) -> list[list]:
    """Cuts the weights, in their order, into groups of at most `SHARD_BYTES`; a greater one is alone."""
    shards: list[list] = [[]]
    filled = 0
    for item in tensors:
        size = torch.Size(item[2]).numel() * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(item)
        filled += size
    return shards


def _write_manifest(export: Export, draft: Path) -> None:
    files = {str(path.relative_to(draft)): path.stat().st_size for path in sorted(draft.rglob("*")) if path.is_file()}
    facts = {
        "made_by": MADE_BY,
        "base_model": export.base_name,
        "training_stage": export.config.training_stage,
        "lora_rank": export.config.lora_r,
        "dtype": str(export.dtype).removeprefix("torch."),
        "files": files,
    }
    (draft / MANIFEST).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def readme(export: Export) -> str:
    """README.md of the export: the commands that serve it."""
    dtype = str(export.dtype).removeprefix("torch.")
    base = BASE if export.with_base else export.base_name
    held = f"`{BASE}/` is the base model, untouched. " if export.with_base else f"The base model is `{base}`. "
    return f"""# CLaRa for vLLM

{held}`{DECODER}/` is the generator, a LoRA of rank {export.config.lora_r} over it; `{MERGED}/` is both in one, in
{dtype}. Prompts come as embeddings in which the documents' memory vectors are in place, so neither has memory tokens.
Commands are given in this folder.

The base model with the generator as a LoRA, which is the model named `clara`:

```bash
vllm serve {base} --served-model-name clara-base --dtype {dtype} \\
  --enable-prompt-embeds --enable-lora --lora-modules clara={DECODER} --max-lora-rank {export.max_lora_rank} \\
  --host 127.0.0.1 --port 8001
```

Or, where the version of vLLM does not take prompt embeddings and LoRA together, the merged model:

```bash
vllm serve {MERGED} --served-model-name clara --dtype {dtype} --enable-prompt-embeds --host 127.0.0.1 --port 8001
```

Both listen to this machine alone, beside the answering server at port 8000. With VLLM_API_KEY set in the environment of
both sides, requests need the key. Prompt embeddings are tensors that vLLM unpacks: let nobody but the answering server
reach it.
"""
