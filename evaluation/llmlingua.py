"""LLMLingua-2 (arXiv 2403.12968), the text compression that CLaRa is compared with: a small classifier keeps words.

It does not look at the question, so a passage is compressed once, however many questions have it. This wraps the
package llmlingua (0.2.2 tried) without its two uses of the network: the download of OpenAI's vocabulary, and remote
code. All else is as the package does it; so an XLM-R model reads unknown tokens where <s> and </s> belong.
"""

import functools
import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import torch
from tqdm import tqdm

from evaluation.rankers import check_package, classifier_labels, model_directory

_FAMILIES = ("xlm-roberta-large", "bert-base-multilingual-cased")


def check_llmlingua(model_name: str) -> str:
    """Finds what is wrong with an LLMLingua-2 model before anything is loaded; returns `model_name` as it is.

    Raises ValueError when the package is not installed, or the model is neither a Hub id nor a directory with a
    two-class token classifier, or its name does not hold the family from which the package knows how words begin.
    """
    check_package("llmlingua", "LLMLingua-2")
    if not any(family in model_name for family in _FAMILIES):
        raise ValueError(f"The path or Hub id {model_name} must contain {' or '.join(_FAMILIES)} to be read right.")
    directory = model_directory(model_name)
    if directory is not None and classifier_labels(directory, "ForTokenClassification") != 2:
        raise ValueError(f"{directory} is no LLMLingua-2 model: it needs a token classification head with two labels.")
    return model_name


def compress_texts(
    documents: list[list[str]],
    target_tokens: int,
    count_tokens: Callable[[str], int],
    model_name: str,
    device: str,
    batch_size: int,
) -> list[list[str]]:
    """Each passage cut down to its most important words, at most `target_tokens` tokens of them.

    documents: lists of passages; the result has the same shape. count_tokens: length of a text in tokens of the model
    that will read it, without special tokens. A passage within the budget is left as it is. The package keeps the
    words above a percentile of their probabilities, in whole percent: this takes the lowest percentile whose result
    fits, so a text may end below the budget, and empty where a single percent of the passage exceeds it.
    Seeds the global random generators (the package does).
    """
    if target_tokens < 1:
        raise ValueError(f"target_tokens is {target_tokens}; a passage keeps at least 1 token.")
    count = functools.cache(count_tokens)
    result = {text: text for passages in documents for text in passages}
    waiting: dict[int, list[str]] = defaultdict(list)
    for text in result:
        if count(text) > target_tokens:
            waiting[_first_percentile(count(text), target_tokens)].append(text)
    if waiting:
        compressor = _compressor(model_name, device, batch_size, count)
        bar = tqdm(total=sum(map(len, waiting.values())), desc="LLMLingua-2", disable=not sys.stderr.isatty())
        for percentile in range(1, 101):
            for start in range(0, len(waiting[percentile]), batch_size):
                texts = waiting[percentile][start : start + batch_size]
                for text, shorter in zip(texts, _keep_above(compressor, texts, percentile), strict=True):
                    if count(shorter) <= target_tokens or percentile == 100:
                        result[text] = shorter
                        bar.update()
                    else:
                        waiting[percentile + 1].append(text)
        bar.close()
    return [[result[text] for text in passages] for passages in documents]


def _first_percentile(length: int, target: int) -> int:
    """A few percent below the share to drop: words joined to a text often take fewer tokens than one by one."""
    return max(1, 100 - 100 * target // length - 3)


def _keep_above(compressor, texts: list[str], percentile: int) -> list[str]:
    """The texts' words whose probability of being kept lies above this percentile of the text's tokens."""
    # The package cuts at the percentile int(100 * (1 - rate) + 1); the half keeps rounding away from the edges.
    rate = 1 - (percentile - 0.5) / 100
    known = [bool(set(compressor.tokenizer.tokenize(text)) - compressor.special_tokens) for text in texts]
    readable = [text for text, is_known in zip(texts, known, strict=True) if is_known]
    if not readable:
        return [""] * len(texts)
    answer = compressor.compress_prompt(readable, rate=rate, use_context_level_filter=False)
    shorter = iter(answer["compressed_prompt_list"])
    return [next(shorter) if is_known else "" for is_known in known]


def _compressor(model_name: str, device: str, batch_size: int, count_tokens: Callable[[str], int]):
    """The package's compressor with the counter of tokens in place of OpenAI's, which is downloaded when made."""
    from llmlingua import PromptCompressor

    class LocalCompressor(PromptCompressor):
        def __init__(self) -> None:
            self.model_name, self.use_llmlingua2 = model_name, True
            self.oai_tokenizer = SimpleNamespace(encode=lambda text: range(count_tokens(text)))
            self.load_model(model_name, device, {"trust_remote_code": False})
            self.init_llmlingua2(max_batch_size=batch_size, max_force_token=0)

    compressor = LocalCompressor()
    compressor.model = _once_a_row(compressor.model)
    return compressor


def _once_a_row(model) -> Callable:
    """`model(input_ids, attention_mask)` that runs each distinct row once, without the package's padding to 512.

    A passage is tried at several percentiles, and only the first needs the model.
    """
    model.eval()
    logits_of: dict[bytes, torch.Tensor] = {}

    def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        keys = [row.tobytes() for row in input_ids.cpu().numpy()]
        new = [row for row, key in enumerate(keys) if key not in logits_of]
        if new:
            used = int(attention_mask[new].sum(dim=1).max())
            logits_BTC = model(input_ids=input_ids[new, :used], attention_mask=attention_mask[new, :used]).logits
            padding = (0, 0, 0, input_ids.shape[1] - used)
            padded_BTC = torch.nn.functional.pad(logits_BTC.float().cpu(), padding)
            logits_of.update(zip([keys[row] for row in new], padded_BTC, strict=True))
        return SimpleNamespace(loss=None, logits=torch.stack([logits_of[key] for key in keys]).to(input_ids.device))

    return forward
