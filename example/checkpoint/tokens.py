"""Text to token ids: the compressor's and the generator's inputs. Knows nothing about weights.

What a user writes is always plain text: `<MEM0>`, `</s>` or a chat marker inside a document, a question or an answer
never becomes the special token it spells.
"""

import copy
import os
import re
from dataclasses import dataclass
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from .configuration_clara import CLaRaConfig
from .prompts import PARAPHRASE

# Private-use characters, so that no text of ours or of a template contains them.
_ANCHOR = "\ue0f0clara\ue0f1"
_DOCS, _QUERY, _ANSWER = "\ue0f2docs\ue0f3", "\ue0f2query\ue0f3", "\ue0f2answer\ue0f3"
_FIELDS = re.compile(f"{_QUERY}|{_ANSWER}")


@dataclass
class Prompt:
    """Token ids of one generator input; `ids[:n_prompt]` is what generation starts from."""

    ids: list[int]
    n_prompt: int


class ClaraTokens:
    """A Hugging Face tokenizer with CLaRa's special tokens and input layouts.

    Args:
        tokenizer: the base model's tokenizer, or one saved with a checkpoint; the missing special tokens are added.
        config: gives the special tokens, `doc_max_length` and `sep`.

    Raises:
        ValueError: the tokenizer already uses one of the special tokens in another place.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: CLaRaConfig):
        names = config.special_tokens
        missing = [
            AddedToken(name, special=True, normalized=False) for name in names if name not in tokenizer.get_vocab()
        ]
        tokenizer.add_tokens(missing, special_tokens=True)
        ids = [int(tokenizer.convert_tokens_to_ids(name)) for name in names]  # type: ignore[arg-type]
        if ids != list(range(ids[0], ids[0] + len(names))):
            raise ValueError(f"the tokenizer must hold {names} as its last tokens in this order, found them at {ids}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = "left"
        self.tokenizer = tokenizer
        self.config = config
        self.first_special_id = ids[0]
        self.n_special = len(names)
        memory = ids[: len(config.memory_tokens)]
        self.memory_ids = memory if config.different_mem_tokens else memory * config.n_memory_tokens
        self.enc_id, self.sep_id = ids[-2], ids[-1]
        self.pad_id = tokenizer.pad_token_id
        self._plain = copy.deepcopy(tokenizer)
        self._plain.add_tokens([AddedToken(_ANCHOR, special=False, normalized=False)])
        self._anchor_id = self._plain.convert_tokens_to_ids(_ANCHOR)
        special = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special = {token.content: (i, token.lstrip, token.rstrip) for i, token in special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, [_DOCS, *longest_first])) + ")")
        self._rendered: dict[tuple[str, str], tuple[str, str, str]] = {}

    def plain_ids(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text as it reads right after a special token, whatever special tokens it spells."""
        if not texts:  # the tokenizer cannot
            return []
        anchored = [_ANCHOR + text.replace(_ANCHOR, "") for text in texts]
        rows = self._plain(anchored, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        assert all(row[0] == self._anchor_id for row in rows), "the anchor must stay one token"
        return [row[1:] for row in rows]

    def encoder_rows(self, texts: list[str]) -> list[list[int]]:
        """`<ENC>` + bos + text + eos, cut on the right to doc_max_length + 3 ids; no memory tokens, no padding."""
        start = [i for i in (self.enc_id, self.tokenizer.bos_token_id) if i is not None]
        end = [i for i in (self.tokenizer.eos_token_id,) if i is not None]
        limit = self.config.doc_max_length + 3
        return [(start + row + end)[:limit] for row in self.plain_ids(texts)]

    def encoder_batch(self, rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Left-pads encoder rows to the longest and appends the memory tokens: ids and mask `[N, T + L]`, int64."""
        return self.pad_left([row + self.memory_ids for row in rows])

    def pad_left(self, rows: list[list[int]], value: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids padded on the left (with the pad token unless told otherwise) and attention mask, both `[B, T]` int64."""
        value = self.pad_id if value is None else value
        width = max(len(row) for row in rows)
        ids = [[value] * (width - len(row)) + row for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, dtype=torch.long), torch.tensor(mask, dtype=torch.long)

    def prompt(self, system: str, user: str, n_docs: int, query: str = "", answer: str | None = None) -> Prompt:
        """One generator input.

        Args:
            system: system text.
            user: user text with `{docs}` and, for answering, `{query}`.
            n_docs: documents; each becomes L memory tokens followed by `<SEP>` (without it when `sep` is false).
            query: takes the place of `{query}`.
            answer: the assistant's turn; its tokens and the end-of-turn token follow the prompt. None: prompt only.
        """
        start, turn_start, after_answer = self._render(system, user)
        prompt_ids = self._assemble(start, n_docs, query)
        if answer is None:
            return Prompt(prompt_ids, len(prompt_ids))
        joint = self._assemble(start + turn_start + _ANSWER, n_docs, query, answer)
        # A token may straddle the border (a prompt that ends in a space): it belongs to the answer.
        same = len(os.path.commonprefix([prompt_ids, joint]))
        return Prompt(joint + self._end_of_turn(after_answer), same)

    def build_prompt(
        self, kind: str, n_docs: int, query: str = "", answer: str | None = None, instruction: int = 0
    ) -> Prompt:
        """A generator input of one kind (`answer`, `qa` or `paraphrase`) from the config's prompts.

        Raises:
            ValueError: the checkpoint's prompts are not known.
        """
        prompts = self._known_prompts()
        user = prompts["paraphrase_instructions"][instruction] if kind == PARAPHRASE else prompts[f"{kind}_user"]
        return self.prompt(prompts[f"{kind}_system"], user, n_docs, query, answer)

    def _known_prompts(self) -> dict:
        if self.config.prompts is None:
            raise ValueError(
                "this checkpoint carries no prompts: pass prompts={…} to from_pretrained, or keep the "
                "modeling_clara.py it came with in its directory (its prompts are read from there). "
                "Compressing works without"
            )
        return self.config.prompts

    def plain_prompt(self, system: str, user: str, answer: str | None = None) -> Prompt:
        """A prompt without memory tokens: all of `user` is plain text, whatever placeholders or tokens it spells."""
        return self.prompt(system, "{query}", 0, query=user, answer=answer)

    def text_prompt(self, question: str, documents: list[str], answer: str | None = None) -> Prompt:
        """See `CLaRa.text_prompt`; with `answer`, the assistant's turn follows as in `prompt`."""
        prompts = self._known_prompts()
        texts = {"{docs}": "\n\n".join(self.seen_text(doc) for doc in documents), "{query}": question}
        user = re.sub(r"\{docs\}|\{query\}", lambda field: texts[field[0]], prompts["answer_user"])
        return self.plain_prompt(prompts["answer_system"], user, answer)

    @property
    def text_limit(self) -> int:
        """Tokens of a document's text that the compressor reads at most."""
        start = [i for i in (self.enc_id, self.tokenizer.bos_token_id) if i is not None]
        return self.config.doc_max_length + 3 - len(start)

    def seen_text(self, document: str) -> str:
        """The part of a document that the compressor reads: the whole, or what is left after its cut on the right."""
        (ids,) = self.plain_ids([document])
        limit = self.text_limit
        return document if len(ids) <= limit else str(self.tokenizer.decode(ids[:limit])).rstrip("\ufffd")

    def end_of_turn_ids(self, system: str, user: str) -> list[int]:
        """Ids that end the assistant's turn in the chat template."""
        return self._end_of_turn(self._render(system, user)[2])

    def _end_of_turn(self, after_answer: str) -> list[int]:
        pieces = [self._special[p][0] for p in self._split.split(after_answer) if p in self._special]
        return pieces[:1] or [self.tokenizer.eos_token_id]

    def _render(self, system: str, user: str) -> tuple[str, str, str]:
        """The chat template as (prompt, what comes between prompt and answer, what follows the answer)."""
        key = (system, user)
        if key not in self._rendered:
            marked = user.replace("{docs}", _DOCS).replace("{query}", _QUERY)
            try:
                turns = [{"role": "system", "content": system}, {"role": "user", "content": marked}]
                start, full = self._template(turns)
                refused = system.strip() not in start
            except TemplateError:
                refused = True
            if refused:
                start, full = self._template([{"role": "user", "content": f"{system}\n{marked}"}])
            before, _, after = full.partition(_ANSWER)
            if not before.startswith(start):
                raise ValueError(
                    "the chat template writes an assistant turn that does not start with its own generation prompt; "
                    f"prompt {start[-60:]!r}, turn {before[-60:]!r}: give the tokenizer a template where it does"
                )
            self._rendered[key] = (start, before[len(start) :], after)
        return self._rendered[key]

    def _template(self, turns: list[dict]) -> tuple[str, str]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("the base model's tokenizer has no chat template; use an instruction-tuned model")
        options: dict[str, Any] = {"tokenize": False, "enable_thinking": False}
        start = str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, **options))
        turns = [*turns, {"role": "assistant", "content": _ANSWER}]
        return start, str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=False, **options))

    def _assemble(self, rendered: str, n_docs: int, query: str, answer: str = "") -> list[int]:
        """Ids of a rendered template: its special tokens as such, everything else as plain text."""
        document = [*self.memory_ids, self.sep_id] if self.config.sep else self.memory_ids
        pieces = self._split.split(rendered)
        for i in range(1, len(pieces), 2):
            _, lstrip, rstrip = self._special.get(pieces[i], (0, False, False))
            pieces[i - 1] = pieces[i - 1].rstrip() if lstrip else pieces[i - 1]
            pieces[i + 1] = pieces[i + 1].lstrip() if rstrip else pieces[i + 1]
        # In one pass, so that nothing a question spells is replaced in its turn.
        texts = [_FIELDS.sub(lambda mark: query if mark[0] == _QUERY else answer, piece) for piece in pieces[::2]]
        ids: list[int] = []
        for i, plain in enumerate(self.plain_ids(texts)):
            ids += plain
            if 2 * i + 1 < len(pieces):
                marker = pieces[2 * i + 1]
                ids += document * n_docs if marker == _DOCS else [self._special[marker][0]]
        return ids
