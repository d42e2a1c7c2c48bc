"""RAGConfig: what `rag_config.yaml` says, checked. Knows nothing about models or stores."""

from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from openrlhf.models.publish import SETTINGS_FILE

ROOT_KEY = "rag_master"


@dataclass
class Compression:
    """Which model compresses and answers; `enabled: false` answers from texts, ranked by BM25, with the base model.
    Texts are cut into passages of `passage_tokens`, None: of as many as the model compresses together."""

    enabled: bool = True
    model: str | None = None
    rate: int | None = None
    passage_tokens: int | None = None


@dataclass
class Retrieval:
    """How many candidates each search gives, and how the two lists become one."""

    dense_top_k: int = 12
    sparse_top_k: int = 25
    fusion: str = "union"


@dataclass
class Reranking:
    """How many candidates are read, and the cosine below which none is."""

    top_k: int = 5
    min_score: float = 0.55


@dataclass
class Generation:
    """Length of an answer in tokens, temperature (0: greedy) and the seed of its draws."""

    max_new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0


@dataclass
class Guardrails:
    """What happens where no document is good enough."""

    allow_out_of_context: bool = False
    require_citations: bool = True


@dataclass
class RAGConfig:
    """The sections of `rag_master` in rag_config.yaml, each with its defaults.

    Raises:
        ValueError: a value that cannot be used; all that is wrong is listed.
    """

    compression: Compression = field(default_factory=Compression)
    retrieval: Retrieval = field(default_factory=Retrieval)
    reranking: Reranking = field(default_factory=Reranking)
    generation: Generation = field(default_factory=Generation)
    guardrails: Guardrails = field(default_factory=Guardrails)

    def __post_init__(self):
        problems = list(self._wrong())
        if problems:
            raise ValueError("rag_config: " + "; ".join(problems))

    def _wrong(self):
        for section in fields(self):
            for item in fields(getattr(self, section.name)):
                value = getattr(getattr(self, section.name), item.name)
                if not _fits(value, item.default):
                    expected = type(item.default).__name__ if item.default is not None else "a text or number"
                    yield f"{section.name}.{item.name} must be {expected}, got {value!r}"
                    return
        tokens = self.compression.passage_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            yield f"compression.passage_tokens must be positive, got {tokens!r}"
        if self.retrieval.fusion not in ("union", "rrf"):
            yield f"retrieval.fusion must be union or rrf, got {self.retrieval.fusion!r}"
        if self.retrieval.dense_top_k < 0 or self.retrieval.sparse_top_k < 0:
            yield "retrieval.dense_top_k and sparse_top_k must not be negative"
        elif self.retrieval.dense_top_k + self.retrieval.sparse_top_k < 1:
            yield "retrieval.dense_top_k and sparse_top_k leave no candidates: one of them must be positive"
        for name, value in (
            ("reranking.top_k", self.reranking.top_k),
            ("generation.max_new_tokens", self.generation.max_new_tokens),
        ):
            if value < 1:
                yield f"{name} must be positive, got {value}"
        if not -1 <= self.reranking.min_score <= 1:
            yield f"reranking.min_score is a cosine, between -1 and 1, got {self.reranking.min_score}"
        if self.generation.temperature < 0:
            yield f"generation.temperature must be at least 0, got {self.generation.temperature}"
        if self.guardrails.allow_out_of_context and self.guardrails.require_citations:
            yield (
                "guardrails.allow_out_of_context lets answers stand without documents, require_citations forbids that: "
                "set require_citations to false with it"
            )

    @classmethod
    def from_dict(cls, given: dict) -> "RAGConfig":
        """From the mapping under `rag_master`; a section or key that does not exist is an error."""
        return cls(**_sections(cls, given, ""))

    @classmethod
    def from_yaml(cls, path: str | Path) -> "RAGConfig":
        """From a file with the root key `rag_master`.

        Raises:
            ValueError: not YAML, another root key, unknown keys, or wrong values; the file is named.
            OSError: the file cannot be read.
        """
        try:
            whole = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if not isinstance(whole, dict) or set(whole) != {ROOT_KEY}:
                raise ValueError(f"it must have the one root key {ROOT_KEY}")
            return cls.from_dict(whole[ROOT_KEY] or {})
        except (yaml.YAMLError, ValueError) as error:
            raise ValueError(f"{path}: {' '.join(str(error).split())}") from None

    @classmethod
    def chosen(cls, given: "RAGConfig | str | Path | None", model: Any) -> "RAGConfig":
        """The settings that are given, themselves or as a file; else those that a checkpoint carries in its directory
        or on the Hub, else the defaults."""
        if isinstance(given, cls):
            return given
        path = given or (_carried(model) if isinstance(model, (str, Path)) else None)
        return cls.from_yaml(path) if path else cls()  # type: ignore[arg-type]


def _carried(model: str | Path) -> Path | None:
    """The settings' file of a checkpoint: a directory, or else a repository on the Hub."""
    if Path(model).is_dir():
        own = Path(model) / SETTINGS_FILE
        return own if own.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError

    try:
        return Path(hf_hub_download(str(model), SETTINGS_FILE))
    except (EntryNotFoundError, HFValidationError, OSError):
        return None  # no such file, repository or connection: loading the model says which of the last two


def _fits(value: Any, default: Any) -> bool:
    if default is None:
        return value is None or isinstance(value, (str, int)) and not isinstance(value, bool)
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    return isinstance(value, (int, float) if isinstance(default, float) else type(default))


def _sections(cls: type, given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"{where or ROOT_KEY} must hold keys and values, got {given!r}")
    known = {item.name: item for item in fields(cls)}
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"unknown key {where}{unknown[0]}; there are {', '.join(where + name for name in known)}")
    made = {}
    for key, value in given.items():
        factory = known[key].default_factory
        nested = is_dataclass(factory)
        made[key] = factory(**_sections(factory, value or {}, f"{key}.")) if nested else value  # type: ignore[arg-type,operator]
    return made
