"""A checkpoint on the Hugging Face Hub: what is uploaded, and what is checked before anything leaves this machine.

Contract: only the files that loading needs are uploaded, and all in one commit, so that nobody ever sees half of it;
optimizer states, logs and whatever else lies beside them stay. What is uploaded loads on another machine: its adapters
are whole, its base model is on the Hub, its code is at the repository's root, where transformers looks for it whatever
the subfolder. A token comes from HF_TOKEN or `hf auth login` unless given, and is written nowhere.
"""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from .adapters import ADAPTERS, WEIGHTS_FILE, read_adapter, read_weights
from .checkpoint import CONFIG_FILE, EMBEDDINGS_FILE, adapters_of, find_checkpoint, read_config
from .configuration_clara import CLaRaConfig
from .public_format import ADAPTERS_FILE, CODE_FILE, LAYERS_FILE

logger = logging.getLogger(__name__)

Files = dict[str, Path | bytes]
"""Path in the repository → the file as it is, or its new content."""
ADAPTER_CONFIG, CARD_FILE = "adapter_config.json", "README.md"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
)
SETTINGS_FILE = "rag_config.yaml"  # for RAG, since scores of one checkpoint are not those of another
TAGS = ("clara", "retrieval-augmented-generation", "lora")
_SECRET = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[A-Z0-9]{16}\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_SECRET_NAME = re.compile(r"(TOKEN|API_KEY|SECRET|PASSWORD)$")
_SUBFOLDER = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)*")
# A path of this machine: absolute, or relative to where the program ran.
_LOCAL_PATH = re.compile(r"(?<![\w./:~-])(?:~|\.{1,2})?/[\w.-]+(?:/[\w.-]+)*")


def plan(
    checkpoint: str | Path,
    repo_id: str,
    subfolder: str = "",
    base_model: str | None = None,
    license: str | None = None,
) -> Files:
    """What `push` uploads, checked; nothing is sent.

    Args:
        checkpoint: a directory of our format.
        repo_id: `organisation/name`.
        subfolder: where in the repository the checkpoint goes, such as `compression-16`; its root by default.
        base_model: Hub id of the base model, in the place of a directory that the checkpoint names.
        license: of the card, where the checkpoint's card names none.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: it is damaged or of the public format, its base model is a directory of this machine, its card has
            no licence, a file holds what looks like a secret, or a name cannot be one on the Hub.
    """
    _check_names(repo_id, subfolder, base_model)
    root = find_checkpoint(checkpoint)
    if (root / ADAPTERS_FILE).is_file():
        raise ValueError(
            f"{root} is of the public format, whose weights are pickles: convert it first with "
            "python -m openrlhf.cli.import_checkpoint"
        )
    config, _ = read_config(root, None, {})
    adapters = adapters_of(root, config.training_stage)
    _check_weights(root, config, adapters)
    base = _hub_name(config.decoder_model_name, root, base_model)
    own: Files = {EMBEDDINGS_FILE: root / EMBEDDINGS_FILE}
    own[CONFIG_FILE] = _changed(root / CONFIG_FILE, {"decoder_model_name": base, "_name_or_path": ""})
    for name in adapters:
        own[f"{name}/{ADAPTER_CONFIG}"] = _changed(root / name / ADAPTER_CONFIG, {"base_model_name_or_path": base})
        own[f"{name}/{WEIGHTS_FILE}"] = root / name / WEIGHTS_FILE
    own |= {name: root / name for name in (*TOKENIZER_FILES, SETTINGS_FILE) if (root / name).is_file()}
    code: Files = {path.name: path for path in _code(root)}
    own |= code
    card = root / CARD_FILE
    before = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo_id}\n"
    if "/" in config.decoder_model_name:
        before = before.replace(config.decoder_model_name, base)
    licence = _licence(before, license)
    own[CARD_FILE] = _card(before, base, licence, repo_id, subfolder)
    files = {f"{subfolder}/{name}" if subfolder else name: content for name, content in own.items()}
    if subfolder:
        files |= code
        files[CARD_FILE] = _card(f"# {repo_id}\n", base, licence, repo_id, subfolder)
    _check_secrets(files)
    return dict(sorted(files.items()))


def left_out(checkpoint: str | Path, files: Files, subfolder: str = "") -> list[str]:
    """What lies in the checkpoint's directory and is not uploaded."""
    root = Path(checkpoint)
    there = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    return sorted(there - {name.removeprefix(f"{subfolder}/" if subfolder else "") for name in files})


def push(
    checkpoint: str | Path,
    repo_id: str,
    subfolder: str = "",
    base_model: str | None = None,
    license: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Uploads a checkpoint in one commit; its address.

    The repository is made where it is not there. Adapters and settings that an earlier push left in the same place, and
    that this checkpoint does not have, are deleted in the same commit. When a subfolder is pushed, a card at
    the root stays as it is; the code at the root becomes this checkpoint's.

    Args:
        checkpoint, repo_id, subfolder, base_model, license: see `plan`.
        private: of a new repository; None takes the account's default.
        token: default: HF_TOKEN, or that of `hf auth login`.
        commit_message: default: names the stage and the rate.

    Raises:
        ValueError, FileNotFoundError: see `plan`; nobody is logged in, the base model is not on the Hub, or the
            repository is public and `private` was asked for. Nothing was uploaded.
        OSError: the Hub refused, or was not reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    files = plan(checkpoint, repo_id, subfolder, base_model, license)
    token = token or get_token()
    if not token:
        raise ValueError("nobody is logged in to the Hugging Face Hub: run `hf auth login`, or set HF_TOKEN")
    api, place = HfApi(token=token), f"{subfolder}/" if subfolder else ""
    config = json.loads(_content(files[f"{place}{CONFIG_FILE}"]))
    said = commit_message or f"CLaRa {config['training_stage']}, rate {config['compr_rate']}"
    with _told_by_the_hub():
        _check_base(api, config["decoder_model_name"])
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise ValueError(f"{repo_id} is there already and is public: make it private on the Hub, or push elsewhere")
        there = api.list_repo_files(repo_id)
        if subfolder and CARD_FILE in there:
            del files[CARD_FILE]
        stale = [name for name in there if _is_stale(name, place) and name not in files]
        operations: list[Any] = [CommitOperationDelete(name) for name in stale]
        for name, content in files.items():
            operations.append(CommitOperationAdd(name, content if isinstance(content, bytes) else str(content)))
        logger.info("%d files, %.1f MB to %s", len(files), size(files) / 1e6, repo_id)
        api.create_commit(repo_id, operations, commit_message=said)
    return f"{url}/tree/main/{subfolder}" if subfolder else str(url)


def size(files: Files) -> int:
    """Bytes of all files."""
    return sum(size_of(content) for content in files.values())


def size_of(content: Path | bytes) -> int:
    """Bytes of one file."""
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _content(content: Path | bytes) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def _check_names(repo_id: str, subfolder: str, base_model: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in (repo_id, base_model):
        try:
            if name is not None:
                validate_repo_id(name)
        except HFValidationError as error:
            raise ValueError(f"{name!r} cannot be the name of a repository on the Hub: {error}") from None
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} lacks an owner: give the repository as owner/name")
    if subfolder and not _SUBFOLDER.fullmatch(subfolder):
        raise ValueError(f"{subfolder!r} cannot be a folder of a repository: give a name such as compression-16")


def _check_weights(root: Path, config: CLaRaConfig, adapters: list[str]) -> None:
    """Raises FileNotFoundError or ValueError unless every adapter is whole, as far as that shows without the base."""
    states = {name: read_adapter(root / name, config.lora_r) for name in adapters}
    first, *others = adapters
    for name in adapters:
        keys = set(states[name])
        half = {key for key in keys if key.replace(".lora_A.", ".lora_B.") not in keys
                or key.replace(".lora_B.", ".lora_A.") not in keys}  # fmt: skip
        if not keys or half:
            raise ValueError(
                f"{root / name} is not a whole adapter (e.g. {sorted(half)[:1]}): copy the checkpoint again"
            )
        bad = [key for key, value in states[name].items() if not value.isfinite().all()]
        if bad:
            raise ValueError(f"{root / name} holds NaN or infinity in {bad[0]}: this training went wrong")
    for name in others:
        if set(states[name]) != set(states[first]):
            raise ValueError(f"{root / name} has other layers than {first}: copy the checkpoint again")
    rows = read_weights(root / EMBEDDINGS_FILE).get("embed_tokens")
    if rows is None or len(rows) != len(config.special_tokens):
        raise ValueError(
            f"{root / EMBEDDINGS_FILE} must hold {len(config.special_tokens)} rows of embed_tokens: copy the "
            "checkpoint again"
        )


def _hub_name(named: str, root: Path, given: str | None) -> str:
    """The base model's Hub id.

    Raises:
        ValueError: the checkpoint names a directory, and none is given.
    """
    if given is not None:
        return given
    local = any(Path(place, os.path.expanduser(named)).is_dir() for place in (root, Path.cwd()))
    if local or not re.fullmatch(r"[\w.-]+/[\w.-]+", named) or named.startswith("."):
        raise ValueError(
            f"{root} names the base model {named!r}, a place on this machine that others do not have: give the Hub id "
            "of the same model with base_model (--base_model)"
        )
    return named


def _check_base(api: Any, base: str) -> None:
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        api.model_info(base)
    except RepositoryNotFoundError:
        raise ValueError(f"the base model {base} is not on the Hub, or not for you to see: give another one") from None


def _changed(path: Path, values: dict) -> bytes:
    fields = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps({**fields, **values}, indent=2, ensure_ascii=False) + "\n").encode()


def _code(root: Path) -> list[Path]:
    """modeling_clara.py and every module it imports; a FileNotFoundError where one is missing."""
    try:
        files = [root / CODE_FILE, *map(Path, get_relative_import_files(root / CODE_FILE))]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error.filename} is missing: the checkpoint is not complete, copy it again") from None
    return sorted(set(files))


def _parsed(text: str) -> Any:
    from huggingface_hub import ModelCard

    return ModelCard(text if text.startswith("---") else f"---\n{{}}\n---\n{text}")


def _licence(card: str, given: str | None) -> str:
    """Raises ValueError where the card names none and none is given."""
    licence = given or _parsed(card).data.license
    if not licence:
        raise ValueError(
            "the model card names no licence: give one with license (--license) that the base model's allows, "
            "such as apache-2.0"
        )
    return licence


def _card(text: str, base: str, licence: str, repo_id: str, subfolder: str) -> bytes:
    """A model card with the Hub's metadata and how to load it, and without places of this machine."""
    card = _parsed(text)
    card.data.base_model, card.data.base_model_relation = base, "adapter"
    card.data.license, card.data.library_name = licence, "transformers"
    card.data.tags = list(dict.fromkeys([*(card.data.tags or []), *TAGS]))
    card.text = _LOCAL_PATH.sub(lambda found: found[0].rpartition("/")[2], card.text)
    where = f'"{repo_id}"' + (f', subfolder="{subfolder}"' if subfolder else "")
    card.text = card.text.replace('"PATH_OF_THIS_DIRECTORY"', where)
    if where not in card.text:
        card.text += (
            "\n```python\nfrom transformers import AutoModel\n\n"
            f"model = AutoModel.from_pretrained({where}, trust_remote_code=True)\n```\n"
        )
    return str(card).encode()


def _check_secrets(files: Files) -> None:
    """Raises ValueError, without repeating it, where a text that is to be uploaded holds what looks like a secret."""
    known = {value for name, value in os.environ.items() if _SECRET_NAME.search(name) and len(value) > 7}
    for name, content in files.items():
        if Path(name).suffix in (".safetensors", ".model") or Path(name).name == "tokenizer.json":
            continue
        text = _content(content).decode("utf-8", "replace")
        if _SECRET.search(text) or any(value in text for value in known):
            raise ValueError(f"{name} holds what looks like a token or key: remove it, and withdraw that token")


def _is_stale(name: str, place: str) -> bool:
    """Whether loading from this place in the repository would read the file as the checkpoint's."""
    inside = name.removeprefix(place) if name.startswith(place) else ""
    return inside.partition("/")[0] in ADAPTERS or inside in (ADAPTERS_FILE, LAYERS_FILE, SETTINGS_FILE)


@contextmanager
def _told_by_the_hub() -> Iterator[None]:
    """Turns what the Hub's client raises, over whatever HTTP library, into an OSError of one line."""
    try:
        yield
    except Exception as error:
        library = type(error).__module__.partition(".")[0]
        if library not in ("huggingface_hub", "httpx", "httpx2", "requests") and not isinstance(error, RuntimeError):
            raise
        reason = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        raise OSError(f"the Hub did not take it: {' '.join(str(reason).split())[:400]}") from error
