"""What a paraphrase keeps of its document: the named entities (spaCy) and the meaning (BERTScore).

Both need a model of their own, given by its name or directory and never downloaded. The `check_` functions find a
missing one before anything large is loaded. ROUGE, which needs none, is in `evaluation.metrics`.
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from spacy.language import Language


def check_entity_model(model: str) -> "Language":
    """The loaded spaCy pipeline. Raises ValueError where spaCy or the model is missing, or it finds no entities."""
    try:
        import spacy
    except ImportError as error:
        raise ValueError("Entities need spaCy, which is not installed: pip install spacy") from error
    try:
        pipeline = spacy.load(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model!r} is no spaCy model that is installed, nor a directory with one; "
            f"try: python -m spacy download en_core_web_sm ({' '.join(str(error).split())[:200]})"
        ) from error
    if not any("doc.ents" in pipeline.get_pipe_meta(name).assigns for name in pipeline.pipe_names):
        raise ValueError(
            f"The spaCy model {model!r} has no part that finds named entities (its parts: {pipeline.pipe_names}); "
            "choose one with ner."
        )
    return pipeline


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def entity_preservation(predictions: Sequence[str], documents: Sequence[str], model: str) -> list[float | None]:
    """Share of the document's different named entities whose text occurs in the prediction; None where it has none.

    Entities are the texts of spaCy's `doc.ents`, compared in lower case with white space squeezed, as whole words:
    "AI" does not occur in "said". model: name or directory of a spaCy model. Raises ValueError as
    `check_entity_model`, and when the lengths differ.
    """
    pairs = list(zip(predictions, documents, strict=True))
    parsed = check_entity_model(model).pipe(documents)
    shares: list[float | None] = []
    quiet = not sys.stderr.isatty()
    for (prediction, _), doc in tqdm(zip(pairs, parsed, strict=True), "entities", len(pairs), disable=quiet):
        entities = {_plain(entity.text) for entity in doc.ents} - {""}
        text = _plain(prediction)
        kept = sum(re.search(rf"(?<!\w){re.escape(entity)}(?!\w)", text) is not None for entity in entities)
        shares.append(kept / len(entities) if entities else None)
    return shares


def check_bert_model(path: str | Path) -> None:
    """Raises ValueError unless `path` is a directory with a config, a tokenizer and safetensors weights."""
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{path} is no directory; give that of an encoder or decoder model in Hugging Face format.")
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"{path} has no .safetensors file; weights in other formats are not read.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries below raise half a dozen kinds for a broken or unknown file
        raise ValueError(f"{path} has no config and tokenizer that transformers can read: {error}") from error
    if config.is_encoder_decoder:
        raise ValueError(f"{path} is an encoder-decoder model; BERTScore takes an encoder or a decoder.")


@torch.inference_mode()
def _token_directions(
    texts: list[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of the last hidden layer (float32 [B, L, H]) and which of them belong to the text (bool [B, L])."""
    batch = tokenizer(
        texts,
        padding=True,
        truncation=True,
        max_length=max_length,
        return_special_tokens_mask=True,
        return_tensors="pt",
    ).to(model.device)
    text_BL = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    if not text_BL.shape[1]:  # only empty texts, and no special tokens around them
        return torch.zeros(len(texts), 1, 1, device=model.device), text_BL.new_zeros(len(texts), 1)
    hidden_BLH = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return torch.nn.functional.normalize(hidden_BLH.float(), dim=-1), text_BL


def bert_scores(
    predictions: Sequence[str], references: Sequence[str], model_path: str | Path, batch_size: int = 16
) -> list[float]:
    """BERTScore F1 (Zhang et al. 2020, equation 1) of each pair, without idf weights and without rescaling.

    Each token is matched with the token of the other text of highest cosine similarity between last hidden states;
    recall is the mean over the reference's tokens, precision over the prediction's. Special tokens are left out. A
    text longer than the model takes is cut at its end. A pair with an empty text scores 0. Figures of different
    models, or with rescaling, do not compare.

    model_path: directory of an encoder or decoder model, run in float32, on a GPU where there is one. Raises
    ValueError as `check_bert_model`, and when the lengths differ.
    """
    check_bert_model(model_path)
    pairs = list(zip(predictions, references, strict=True))
    tokenizer = AutoTokenizer.from_pretrained(model_path, local_files_only=True, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModel.from_pretrained(model_path, local_files_only=True, use_safetensors=True, dtype=torch.float32)
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    # RoBERTa and its relatives count positions from 2, so two of theirs cannot be used.
    max_length = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", 514) - 2)
    # Texts of similar length share a batch, which saves padding.
    order = sorted(range(len(pairs)), key=lambda i: max(len(text) for text in pairs[i]))
    scores = [0.0] * len(pairs)
    for start in tqdm(range(0, len(pairs), batch_size), "BERTScore", disable=not sys.stderr.isatty()):
        chosen = order[start : start + batch_size]
        left_BPH, in_left_BP = _token_directions([pairs[i][0] for i in chosen], model, tokenizer, max_length)
        right_BRH, in_right_BR = _token_directions([pairs[i][1] for i in chosen], model, tokenizer, max_length)
        for row, i in enumerate(chosen):
            scores[i] = _matching_f1(left_BPH[row, in_left_BP[row]], right_BRH[row, in_right_BR[row]])
    return scores


def _matching_f1(left_PH: torch.Tensor, right_RH: torch.Tensor) -> float:
    """Greedy matching of unit vectors: F1 of the mean best cosine of either side; 0 without a vector or a match."""
    if not len(left_PH) or not len(right_RH):
        return 0.0
    cosine_PR = left_PH @ right_RH.T
    precision, recall = cosine_PR.amax(dim=1).mean().item(), cosine_PR.amax(dim=0).mean().item()
    return 2 * precision * recall / (precision + recall) if min(precision, recall) > 0 else 0.0
