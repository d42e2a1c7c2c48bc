"""The public on-disk format: `adapters.pth`, `decoder_first_last_layers.pth`, prompts inside a Python file.

Everything is read with `weights_only=True` and Python's `ast`; nothing of such a checkpoint is ever run.
"""

import ast
import pickle
from collections.abc import Iterable
from pathlib import Path

import torch

from .adapters import ADAPTERS, DECODER, ENCODER

ADAPTERS_FILE, LAYERS_FILE, CODE_FILE = "adapters.pth", "decoder_first_last_layers.pth", "modeling_clara.py"


def _read_tensors(path: Path) -> dict:
    """What a .pth file holds, tensors only; FileNotFoundError or ValueError, with its name, where that fails."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the checkpoint is not complete, copy it again")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is cut short, damaged, or holds more than tensors: copy it again") from error


def read_public_adapters(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """LoRA weights of each adapter; copies of embeddings and LM head inside the dictionaries are left out.

    Raises:
        ValueError: the compressor or the generator is missing, or an adapter is unknown.
    """
    saved = _read_tensors(root / ADAPTERS_FILE)
    missing, unknown = {ENCODER, DECODER} - set(saved), set(saved) - set(ADAPTERS)
    if missing or unknown:
        raise ValueError(f"{root / ADAPTERS_FILE}: adapters missing {sorted(missing)}, unknown {sorted(unknown)}")
    return {
        name: {key: value for key, value in saved[name].items() if "lora_" in key} for name in ADAPTERS if name in saved
    }


def read_public_rows(root: Path, model) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows of the added tokens, in the input embedding and in an untied LM head.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: its old rows are not the base model's, so it belongs to another base model.
    """
    path = root / LAYERS_FILE
    layers = _read_tensors(path)
    found: dict[str, torch.Tensor] = {}
    for key, value in layers.items():
        kind = "lm_head" if key.endswith("lm_head.weight") else "embed_tokens"
        layer = model.decoder.get_output_embeddings() if kind == "lm_head" else model.decoder.get_input_embeddings()
        first, count = model.tokens.first_special_id, model.tokens.n_special
        if len(value) < first + count:
            raise ValueError(f"{path}: {key} has {len(value)} rows, {first + count} are needed")
        old = min(first, len(layer.weight))
        base_VD = layer.weight[:old].detach().cpu()
        coarse = min(base_VD.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
        if not torch.equal(base_VD.to(coarse), value[:old].to(coarse)):
            raise ValueError(
                f"{path}: rows of {key} differ from the base model {model.config.decoder_model_name}; pass the base "
                "model this checkpoint was trained on as decoder_model_name="
            )
        found[kind] = value[first : first + count]
    if "embed_tokens" not in found:
        raise ValueError(f"{path} holds no input embedding, only {sorted(layers)}")
    return found["embed_tokens"], found.get("lm_head") if model.special.head is not None else None


def read_prompts(folders: Iterable[Path]) -> dict | None:
    """The prompts written in the checkpoint's own modeling_clara.py, None where there is no such file.

    Args:
        folders: where the file may be, the checkpoint's own directory first.

    Raises:
        ValueError: the file is there but its prompts are not where the format has them.
    """
    path = next((folder / CODE_FILE for folder in folders if (folder / CODE_FILE).is_file()), None)
    if path is None:
        return None
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise ValueError(
            f"{path} is not Python ({error}), so its prompts cannot be read; pass prompts={{…}}"
        ) from error
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    try:
        answer = functions.get("_blend_standard_prompt") or functions["_blend_prompt_and_selected_memory_tokens"]
        answer_texts = _assigned(answer)
        qa_texts, paraphrase_texts = (
            _assigned(functions["_blend_qa_prompt"]),
            _assigned(functions["_blend_paraphrase_prompt"]),
        )
        return {
            "answer_system": answer_texts["prompt_system"],
            "answer_user": answer_texts["prompt_user"],
            "qa_system": qa_texts["prompt_system"],
            "qa_user": qa_texts["prompt_user"],
            "paraphrase_system": paraphrase_texts["prompt_system"],
            "paraphrase_instructions": _instructions(tree),
        }
    except KeyError as error:
        raise ValueError(
            f"{path} does not hold the prompts where they are expected ({error}); pass prompts={{…}}"
        ) from error


def _assigned(function: ast.FunctionDef) -> dict[str, str]:
    """Texts assigned to names in a function: plain strings, and f-strings with `{name}` for their fields."""
    texts: dict[str, str] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            text = _text(node.value)
            if text is not None:
                texts.setdefault(node.targets[0].id, text)
    return texts


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _text(node.left), _text(node.right)
        return None if left is None or right is None else left + right
    if not isinstance(node, ast.JoinedStr):
        return None
    parts = []
    for piece in node.values:
        if isinstance(piece, ast.Constant):
            parts.append(str(piece.value))
        elif isinstance(piece, ast.FormattedValue) and isinstance(piece.value, ast.Name):
            parts.append("{" + piece.value.id + "}")
        else:
            return None
    return "".join(parts)


def _instructions(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PARAPHRASE_INSTRUCTIONS":
            return list(ast.literal_eval(node.value))
    raise KeyError("PARAPHRASE_INSTRUCTIONS")
