"""What can be checked of a sample without a model: is it grounded in its passage, does it stand by itself?

Contract: pure functions of text, for English and other languages with spaces and for Chinese. A check gives None where
nothing is wrong, and else the reason in a few words. They are strict where it is cheap (a number or a name that the
passage does not have is refused, even if it could be reckoned from it) and leave meaning to the model's own check:
each catches what the other lets through. Knows nothing about servers and rounds.
"""

import re
import unicodedata
from collections.abc import Sequence

# Shares of a text's content words that must be found in the passage.
GROUNDED = {"simple_qa": 0.8, "complex_qa": 0.6, "multi_hop": 0.6, "paraphrase": 0.35, "summary": 0.45}
COPIED = 0.8  # of a paraphrase's runs of six words found in the passage: no paraphrase
RUN = 6
COVERED = 0.6  # of a fact's content words found in one question with its answer
LENGTHS = {"paraphrase": (0.4, 2.0), "summary": (0.05, 0.85)}  # of the passage's length
SHORT = 60  # characters of a passage below which a summary may be as long
STRAY_NAMES = 0.2  # of a paraphrase's or summary's names
KEPT_NUMBERS = 0.6  # of the passage's numbers that a paraphrase keeps

_SMALL_WORDS = (
    "a about after all also although an and any are as at be because been before being between both but by can could "
    "did do does during each for from had has have he her his how i if in into is it its just like many may more most "
    "much must no not of on one only or other our out over same she should so some such than that the their them then "
    "there these they this those though through to too under until up upon very was we were what when where which "
    "while who whom whose why will with would you your yes"
)
STOP = frozenset(_SMALL_WORDS.split())
STOP_WIDE = frozenset("的了是在和与及或也都就被把对于从到由为其之以这那个哪什么谁何时怎样如多少吗呢有它他她们")
_SMALL_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
_TENS = "thirty forty fifty sixty seventy eighty ninety"
NUMBER_WORDS = {word: value for value, word in enumerate(_SMALL_NUMBERS.split())} | {
    word: 10 * value for value, word in enumerate(_TENS.split(), 3)
}
SCALES = {
    "hundred": 100, "thousand": 1e3, "million": 1e6, "billion": 1e9, "trillion": 1e12,
    "百": 100, "千": 1e3, "万": 1e4, "百万": 1e6, "千万": 1e7, "亿": 1e8, "万亿": 1e12,
}  # fmt: skip
NUMBER = re.compile(
    r"(?<![\d.])((?:\d{1,3}(?:[, \u00a0\u202f]\d{3})+(?!\d)|\d+)(?:\.\d+)?)\s?"
    r"(hundred|thousand|million|billion|trillion|万亿|百万|千万|百|千|万|亿)?",
    re.IGNORECASE,
)
WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d[\d.,]*", re.UNICODE)
WIDE = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+")
SENTENCE = re.compile(r"(?<=[.!?])[\"”’)]*\s+(?=[\"“‘(]*[A-Z\d\u00c0-\u00de])|(?<=[。！？])|\n+")

# Sentences that speak to a model rather than to a reader; nothing counts as grounded in them.
ORDERS = re.compile(
    r"\b(?:ignore|disregard|forget|override)\b.{0,40}\b(?:instructions?|prompts?|rules|above|previous|prior)\b"
    r"|\b(?:system|hidden) prompt\b|\byou are (?:now|an? (?:ai|assistant|language model))\b"
    r"|\bas an? (?:ai|language model|assistant)\b"
    r"|^\W*(?:(?:now|please|instead|just|and|you must|always),?\s+)*"
    r"(?:respond|reply|answer|output|print|say|write|repeat)(?: (?:to )?(?:me|us|this|everything|all \w+|every \w+))?"
    r" (?:only|exactly|with|nothing (?:else|but))\b"
    r"|(?:忽略|无视|忘记|不要理会).{0,12}(?:指令|指示|提示|规则|要求|以上|之前)|系统提示|你现在是|只(?:需)?(?:回答|回复|输出)",
    re.IGNORECASE,
)
OBEYED = "it repeats what the passage orders"
POINTING = re.compile(
    r"\b(?:the|this|that|these|given|above|following) (?:passages?|texts?|documents?|articles?|paragraphs?|excerpts?|"
    r"sections?|authors?|sentences?|contexts?)\b|\b(?:mentioned|described|stated|discussed) (?:above|here)\b"
    r"|(?:本|该|这|此|上述|以上|下列)(?:篇|段|个)?(?:文章|段落|文本|文字|文档|短文|材料|资料|句话|文)|文中|文段|原文|作者认为",
    re.IGNORECASE,
)
YES_NO = re.compile(r"(?:yes|no|true|false|是的?|不是|否|对|不对|正确|错误|有|没有)[.。!！]?", re.IGNORECASE)


def plain(text: str) -> str:
    """Text in one spelling: compatibility forms unified, lower case, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def is_chinese(text: str) -> bool:
    """Whether at least a fifth of its letters are Chinese characters, and it is not Japanese or Korean."""
    letters = sum(character.isalpha() for character in text)
    wide = sum(len(run) for run in WIDE.findall(text))
    foreign = len(re.findall(r"[\u3040-\u30ff\uac00-\ud7af]", text))
    return wide > 0 and wide >= 0.2 * letters and foreign * 10 < wide


def language_of(text: str) -> str:
    """zh, en (by its small words) or other."""
    if is_chinese(text):
        return "zh"
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not words or sum(word.isascii() for word in words) < 0.9 * len(words):
        return "other"
    return "en" if len(words) < 6 or sum(word in STOP for word in words) >= 0.15 * len(words) else "other"


def sentences(text: str) -> list[str]:
    """The sentences and lines of a text."""
    return [part.strip() for part in SENTENCE.split(text) if part and part.strip()]


def without_orders(text: str) -> str:
    """A passage without the sentences that try to tell a model what to do."""
    return "\n".join(sentence for sentence in sentences(text) if not ORDERS.search(sentence))


def ordered(text: str, source: str) -> bool:
    """Whether a text holds words that only the orders in a passage hold."""
    return bool(units(text) & (units(source) - units(without_orders(source))))


def units(text: str) -> set[str]:
    """Content units: stems of the words that carry meaning; pairs of neighbouring characters in Chinese."""
    found: set[str] = set()
    for word in WORD.findall(plain(WIDE.sub(" ", text))):
        if word in NUMBER_WORDS:
            found.add(str(NUMBER_WORDS[word]))
        elif word not in STOP and (len(word) > 1 or word.isdigit()):
            found.add(_stem(word))
    for run in WIDE.findall(text):
        kept = "".join(character if character not in STOP_WIDE else " " for character in run).split()
        for part in kept:
            found.update(part[i : i + 2] for i in range(max(1, len(part) - 1)))
    return found


def _stem(word: str) -> str:
    """Crude on purpose: forms of a word should meet, and rare collisions do no harm."""
    word = re.sub(r"['’]s?$", "", word).strip(".,")
    if word[:1].isdigit():
        return word.replace(",", "")
    for ending in ("ies", "ing", "ed", "es", "s", "ly"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            word = word[: -len(ending)]
            break
    return word[:6] if len(word) > 6 else word.rstrip("ey") if len(word) > 3 else word


def numbers(text: str, words: bool = True) -> list[set[float]]:
    """The numbers of a text, each with the values it may stand for: "1.4 million" is 1.4 and 1,400,000.

    Args:
        words: number words too.
    """
    text = unicodedata.normalize("NFKC", text)
    found: list[set[float]] = []
    for digits, scale in NUMBER.findall(text):
        value = float(re.sub(r"[, \u00a0\u202f]", "", digits))
        parts = [float(part) for part in re.split(r"[, \u00a0\u202f]", digits)] if not scale else []
        found.append({value, *([round(value * SCALES[scale.lower()], 6)] if scale else []), *parts})
    for word in re.findall(r"[a-z]+", text.lower()) if words else []:
        if word in NUMBER_WORDS:
            found.append({float(NUMBER_WORDS[word])})
    return found


def names(text: str) -> set[str]:
    """Capitalised words inside sentences, lower case; in a text without small letters between them, none."""
    found: set[str] = set()
    for sentence in sentences(text):
        words = WORD.findall(sentence)
        capital = [word for word in words[1:] if word[0].isupper() and len(word) > 1]
        if len(capital) * 2 > len(words) and len(words) > 3:
            continue  # a heading
        found.update(plain(re.sub(r"['’]s?$", "", word)) for word in capital)
    return found - STOP


def share_found(text: str, source: str) -> float:
    """Share of a text's content units that a source has; 1.0 for a text without any."""
    wanted = units(text)
    known = units(source) | set(
        "".join(WIDE.findall(source))
    )  # a single character stands in the source as part of a run
    return len(wanted & known) / len(wanted) if wanted else 1.0


def _stray_number(text: str, source: str) -> str | None:
    """A number that the source does not have. Words up to three ("both of the two") may be of the text's own making."""
    known = {value for values in numbers(source) for value in values}
    strict = numbers(text, words=False)
    for values in strict + [values for values in numbers(text) if values not in strict and max(values) > 3]:
        if not values & known:
            return f"{max(values):g}"
    return None


def _stray_name(text: str, source: str, allowed: float) -> str | None:
    known, whole, mine = units(source), plain(source), names(text)
    strays = sorted(name for name in mine if name not in whole and _stem(name) not in known)
    return strays[0] if len(strays) > allowed * len(mine) else None


def ungrounded(text: str, source: str, share: float, known: str = "", strays: float = 0.0) -> str | None:
    """Why a text does not come from its source.

    Args:
        share: of its content units that must be found in the source.
        known: more text whose words (not numbers and names) may occur, such as the question.
        strays: share of its names that may be others ("Polish" for "of Poland").
    """
    if number := _stray_number(text, source):
        return f"the number {number} is not in the passage"
    if name := _stray_name(text, source, strays):
        return f"the name {name} is not in the passage"
    found = share_found(text, f"{source}\n{known}")
    return None if found >= share else f"only {found:.0%} of its words are in the passage"


def wrong_language(text: str, language: str) -> str | None:
    """Whether a text is visibly not in the language that was asked for."""
    if (language == "zh") != is_chinese(text):
        return {"zh": "it is not in Chinese", "en": "it is not in English"}.get(language, "it is in Chinese")
    if language == "en" and sum(c.isalpha() and not c.isascii() for c in text) * 2 > sum(c.isalpha() for c in text):
        return "it is not in English"
    return None


def check_pair(
    kind: str,
    question: str,
    answer: str,
    passages: Sequence[str],
    language: str,
    passage_language: str,
    evidence: str | None = None,
) -> str | None:
    """What is wrong with a question and its answer.

    Args:
        passages: one, or the two of a multi-hop question, with their titles.
        language: that was asked for.
        evidence: the passage's words, for a question in another language than the passage.
    """
    source = "\n".join(without_orders(passage) for passage in passages)
    if len(units(question)) < 2:
        return "the question says too little"
    if POINTING.search(question) or POINTING.search(answer):
        return "it points at a text that the reader does not see"
    if YES_NO.fullmatch(answer.strip()):
        return "yes or no is no answer"
    if len(answer) > len(source):
        return "the answer is longer than the passage"
    if plain(answer).strip(" .?。？") == plain(question).strip(" .?。？"):
        return "the answer repeats the question"
    if reason := wrong_language(question, language):
        return reason
    if ordered(f"{question}\n{answer}", "\n".join(passages)):
        return OBEYED
    if language != passage_language:
        return _across(question, answer, source, language, evidence)
    if reason := ungrounded(answer, source, GROUNDED[kind], question):
        return reason
    if reason := ungrounded(question, source, 0.0):
        return f"question: {reason}"
    if kind == "multi_hop":
        return _needs_both(f"{question} {answer}", passages)
    return None


def _across(question: str, answer: str, source: str, language: str, evidence: str | None) -> str | None:
    """Between languages words cannot be compared: the quotation must be the passage's, and numbers must be there."""
    if evidence is None or not _letters(evidence) or _letters(evidence) not in _letters(source):
        return "the evidence is not in the passage"
    if number := _stray_number(answer, source) or _stray_number(question, source):
        return f"the number {number} is not in the passage"
    latin = re.findall(r"[A-Za-z]{3,}", answer) if language == "zh" else []
    strays = [word for word in latin if word.lower() not in plain(source)]
    return f"the name {strays[0]} is not in the passage" if strays else None


def _letters(text: str) -> str:
    return "".join(character for character in plain(text) if character.isalnum())


def _needs_both(text: str, passages: Sequence[str]) -> str | None:
    first, second = (units(without_orders(passage)) for passage in passages)
    wanted = units(text)
    return None if wanted & (first - second) and wanted & (second - first) else "one passage is enough to answer it"


def check_rewrite(kind: str, text: str, passage: str, language: str) -> str | None:
    """What is wrong with a paraphrase or a summary of a passage (with its title)."""
    source = without_orders(passage)
    low, high = LENGTHS[kind]
    if len(text) < low * len(source):
        return "it is too short"
    if len(text) > max(high * len(source), SHORT):
        return "it is too long"
    if reason := wrong_language(text, language):
        return reason
    if ORDERS.search(text) or ordered(text, passage):
        return OBEYED
    if reason := ungrounded(text, source, GROUNDED[kind], strays=STRAY_NAMES):
        return reason
    if kind == "paraphrase":
        wanted = numbers(source)
        known = {value for values in numbers(text) for value in values}
        if wanted and sum(bool(values & known) for values in wanted) < KEPT_NUMBERS * len(wanted):
            return "it loses numbers of the passage"
        if copied(text, source) > COPIED:
            return "it copies the passage"
    return None


def copied(text: str, source: str) -> float:
    """Share of a text's runs of six words (characters in Chinese) that stand in the source."""

    def runs(value: str) -> set[tuple[str, ...]]:
        items = re.findall(r"[\u3400-\u9fff]|[^\W\u3400-\u9fff]+", plain(value))
        return {tuple(items[i : i + RUN]) for i in range(max(1, len(items) - RUN + 1))}

    mine = runs(text)
    return len(mine & runs(source)) / len(mine)


def is_covered(fact: str, pairs: Sequence[dict[str, str]]) -> bool:
    """Whether one question with its answer holds most of a fact's content."""
    wanted = units(fact)
    return any(len(wanted & units(f"{p['question']} {p['answer']}")) >= COVERED * len(wanted) for p in pairs)


def uncovered(text: str, pairs: Sequence[dict[str, str]]) -> list[str]:
    """Sentences of a passage with a number or a name which no question touches: none has its answer from there."""
    left = []
    for sentence in sentences(without_orders(text)):
        mine = units(sentence)
        if len(mine) < 4 or not (numbers(sentence) or names(sentence) or is_chinese(sentence)):
            continue
        answered = any(
            len(units(p["answer"]) & mine) * 2 > len(units(p["answer"])) and len(units(p["question"]) & mine) > 0
            for p in pairs
        )
        if not answered:
            left.append(sentence)
    return left


def is_fact(fact: str, text: str, pairs: Sequence[dict[str, str]]) -> bool:
    """Whether what a model says is missing really stands in the passage and is really missing."""
    source = without_orders(text)
    return len(units(fact)) > 1 and ungrounded(fact, source, 0.6) is None and not is_covered(fact, pairs)
