"""From one chunk to its verified samples: questions, multi-hop questions, a paraphrase, a summary.

Contract: `Synthesis()(task, state)` gives one line of synthesized.jsonl. What it gives depends on the chunk, its
partner, the model and the options alone; every reply is in the state before the next one is asked for, and the finished
chunk too. A round asks for what is missing, refuses what `verify` finds wrong, has the model check the rest against the
passage, and looks for facts that no question covers; then the next round. Knows nothing about files, and HTTP only by
the errors of `endpoint`.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from pydantic import BaseModel

from openrlhf.pipeline import prompts, verify
from openrlhf.pipeline.endpoint import BadReply, Endpoint, RequestFailed
from openrlhf.pipeline.replies import Meter
from openrlhf.pipeline.state import State, content_key

STEP = "synthesis"
PAIR_KINDS = ("simple_qa", "complex_qa", "multi_hop")
REWRITES = ("paraphrase", "summary")
KINDS = PAIR_KINDS + REWRITES
KNOWN = ("id", "sha256", "source", "document_sha256", "model")  # fields of a line that its work does not make
LEAST = {"complex_qa": 3, "multi_hop": 2}  # questions asked for at most, a request; simple ones by sentences
ACROSS = 3  # questions in another language
LEAST_UNITS = 6  # content words below which there is nothing to ask about
ITEMS = 12  # items that one check holds
REPEATS = 2  # rounds in a row in which a model only repeats itself, after which it is not asked again

Sample = dict[str, Any]


class Task(TypedDict):
    """A chunk of raw_knowledge.jsonl and the chunk of its document that multi-hop questions join with it."""

    chunk: dict[str, Any]
    partner: dict[str, Any] | None


def passage(chunk: dict[str, Any]) -> tuple[str, str]:
    """Title and text of a chunk as a model reads them."""
    return str(chunk.get("title") or ""), chunk["text"]


def source_of(chunk: dict[str, Any]) -> str:
    """All that a sample of this chunk may draw on."""
    return "\n".join([str(chunk.get("title") or ""), *map(str, chunk.get("headings") or []), chunk["text"]])


@dataclass(frozen=True)
class Slot:
    """One thing that is asked for: a kind, and for questions a language."""

    kind: str
    language: str


@dataclass
class Draft:
    """A chunk under way."""

    task: Task
    language: str
    accepted: list[Sample] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    counts: list[dict[str, int]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    closed: set[Slot] = field(default_factory=set)
    repeats: Counter = field(default_factory=Counter)
    seen: set[str] = field(default_factory=set)
    stopped: str | None = None  # what the server refused

    def of(self, *kinds: str) -> list[Sample]:
        """Accepted samples of these kinds."""
        return [sample for sample in self.accepted if sample["kind"] in kinds]

    def refuse(self, number: int, sample: Sample, reason: str) -> None:
        """Notes that a sample, or a whole request, came to nothing."""
        line = {"kind": sample["kind"], "round": number, "reason": reason}
        if "question" in sample:
            line["question"] = sample["question"]
        self.rejected.append(line)

    def refused(self, slot: Slot) -> list[tuple[str, str]]:
        """What a model is told of its refused samples: (question or nothing, reason)."""
        lines = [line for line in self.rejected if line["kind"] == slot.kind]
        return list(dict.fromkeys((line.get("question", "an earlier try"), line["reason"]) for line in lines))


@dataclass
class Synthesis:
    """The work on one chunk; can be pickled.

    Args:
        languages: each of them ("en", "zh") gets at least one question; the passage's own language always does.
        rounds: at most.
    """

    endpoint: Endpoint
    languages: tuple[str, ...] = ()
    rounds: int = 10

    def key(self, task: Task) -> str:
        """What a finished chunk depends on."""
        partner = task["partner"]
        endpoint = self.endpoint
        options = [endpoint.model, endpoint.temperature, endpoint.seed, endpoint.max_tokens, endpoint.tries]
        options += [endpoint.extra] if endpoint.extra else []
        texts = [task["chunk"].get("language"), source_of(task["chunk"])]
        pair = [task["chunk"]["id"], partner["id"], source_of(partner)] if partner else None
        return content_key(
            "synthesis 1", prompts.FINGERPRINT, options, sorted(self.languages), self.rounds, texts, pair
        )

    def __call__(self, task: Task, state: State) -> dict[str, Any]:
        """One line of synthesized.jsonl, with three fields more for the run.

        `new`: what was sent in this run. `failed`: why the chunk is unfinished. `refused`: what the server refused. A
        chunk with either is not kept: whether the fault lay in it or in the server, only the whole run can tell.

        Raises:
            EndpointError: nothing more can be asked of the server.
        """
        key = self.key(task)
        made = state.get(STEP, key)
        meter, failed, refused = Meter(), None, None
        if made is None:
            draft = Draft(task, task["chunk"].get("language") or verify.language_of(task["chunk"]["text"]))
            try:
                self._work(draft, state, meter)
            except RequestFailed as error:
                failed = str(error)
                draft.accepted.clear()
                draft.refuse(len(draft.counts) + 1, {"kind": "request"}, failed)
            made, refused = _made(draft, meter), draft.stopped
            if failed is refused is None:
                state.put(STEP, key, made)
        known = {name: task["chunk"].get(name) for name in KNOWN[:-1]} | {"model": self.endpoint.model}
        return known | made | {"new": vars(meter.new), "failed": failed, "refused": refused}

    def _work(self, draft: Draft, state: State, meter: Meter) -> None:
        """All rounds of one chunk."""
        if len(verify.units(verify.without_orders(draft.task["chunk"]["text"]))) < LEAST_UNITS:
            draft.refuse(0, {"kind": "chunk"}, "there is too little text to ask about")
            return
        for number in range(1, self.rounds + 1):
            slots = self.needed(draft, number)
            if not slots:
                break
            before = len(draft.accepted), len(draft.rejected)
            try:
                self._round(draft, number, slots, state, meter)
            except RequestFailed as error:
                if not error.refused:
                    raise
                draft.stopped = str(error)
                draft.refuse(number, {"kind": "request"}, draft.stopped)
            accepted, rejected = len(draft.accepted) - before[0], len(draft.rejected) - before[1]
            draft.counts.append({"asked": accepted + rejected, "accepted": accepted, "rejected": rejected})
            if draft.stopped:
                break

    def needed(self, draft: Draft, number: int) -> list[Slot]:
        """What this round asks for."""
        own = draft.language
        slots = []
        if not draft.of("simple_qa") or draft.missing or number == 1:
            slots.append(Slot("simple_qa", own))
        if not draft.of("complex_qa"):
            slots.append(Slot("complex_qa", own))
        there = {sample["language"] for sample in draft.of("simple_qa", "complex_qa")}
        slots += [Slot("simple_qa", other) for other in self.languages if other != own and other not in there]
        if draft.task["partner"] and not draft.of("multi_hop"):
            slots.append(Slot("multi_hop", own))
        slots += [Slot(kind, own) for kind in REWRITES if not draft.of(kind)]
        return [slot for slot in slots if slot not in draft.closed]

    def _round(self, draft: Draft, number: int, slots: Sequence[Slot], state: State, meter: Meter) -> None:
        made: list[Sample] = []
        for slot in slots:
            made += self._generate(draft, number, slot, state, meter)
        sound = []
        for sample in made:
            reason = self._wrong(draft, sample)
            if reason is None:
                sound.append(sample)
            else:
                draft.refuse(number, sample, reason)
        new = self._checked(draft, number, sound, state, meter)
        draft.accepted += new
        if number < self.rounds and any(sample["kind"] in ("simple_qa", "complex_qa") for sample in new):
            self._look_for_missing(draft, state, meter)

    def _generate(self, draft: Draft, number: int, slot: Slot, state: State, meter: Meter) -> list[Sample]:
        """New samples for a slot; closes the slot when the model has no more to say."""
        messages, shape = self._request(draft, slot)
        try:
            reply = self.endpoint.ask(state, messages, shape, meter)
        except BadReply as error:
            draft.refuse(number, {"kind": slot.kind}, f"the reply could not be used: {error}")
            return self._nothing_new(draft, slot)
        if isinstance(reply, prompts.Rewrite):
            made: list[Sample] = [{"kind": slot.kind, "text": reply.text.strip()}]
        else:
            made = [_pair(slot, pair) for pair in reply.pairs]  # type: ignore[attr-defined]
            if not made and not draft.missing:
                draft.closed.add(slot)
        new = []
        for sample in made:
            mark = content_key(
                slot.kind, verify.plain(sample.get("question", "")), sample.get("answer", sample.get("text"))
            )
            if mark not in draft.seen:
                draft.seen.add(mark)
                new.append(sample)
        if new:
            draft.repeats[slot] = 0
            return new
        return self._nothing_new(draft, slot)

    def _nothing_new(self, draft: Draft, slot: Slot) -> list[Sample]:
        draft.repeats[slot] += 1
        if draft.repeats[slot] >= REPEATS:
            draft.closed.add(slot)
        return []

    def _request(self, draft: Draft, slot: Slot) -> tuple[list[dict[str, str]], type[BaseModel]]:
        chunk, partner = draft.task["chunk"], draft.task["partner"]
        refused = draft.refused(slot)
        if slot.kind in REWRITES:
            length = _length(chunk["text"], draft.language)
            count = max(20, length * 2 // 5)
            reasons = [reason for _, reason in refused]
            return prompts.ask_rewrite(passage(chunk), slot.kind, slot.language, count, reasons), prompts.Rewrite
        across = slot.language != draft.language
        count = ACROSS if across else LEAST.get(slot.kind, _simple_count(chunk["text"]))
        shown = [chunk, partner] if slot.kind == "multi_hop" and partner else [chunk]
        facts = draft.missing if slot == Slot("simple_qa", draft.language) else []
        messages = prompts.ask_pairs(
            [passage(one) for one in shown],
            slot.kind,
            slot.language,
            count,
            quoted=across,
            facts=facts[: prompts.MOST_PAIRS],
            asked=[sample["question"] for sample in draft.of(slot.kind)],
            refused=refused,
        )
        return messages, prompts.QuotedPairs if across else prompts.Pairs

    def _wrong(self, draft: Draft, sample: Sample) -> str | None:
        """What our own checks find."""
        chunk, partner = draft.task["chunk"], draft.task["partner"]
        if sample["kind"] in REWRITES:
            return verify.check_rewrite(sample["kind"], sample["text"], source_of(chunk), draft.language)
        asked = {verify.plain(other["question"]) for other in draft.of(*PAIR_KINDS)}
        if verify.plain(sample["question"]) in asked:
            return "the question is there already"
        shown = [chunk, partner] if sample["kind"] == "multi_hop" and partner else [chunk]
        sources = [source_of(one) for one in shown]
        return verify.check_pair(
            sample["kind"],
            sample["question"],
            sample["answer"],
            sources,
            sample["language"],
            draft.language,
            sample.get("evidence"),
        )

    def _checked(self, draft: Draft, number: int, samples: list[Sample], state: State, meter: Meter) -> list[Sample]:
        """The samples that the model finds supported by the passage."""
        chunk, partner = draft.task["chunk"], draft.task["partner"]
        accepted: list[Sample] = []
        both = [passage(chunk), passage(partner)] if partner else []
        for shown, mine in (
            ([passage(chunk)], [sample for sample in samples if sample["kind"] != "multi_hop"]),
            (both, [sample for sample in samples if sample["kind"] == "multi_hop"]),
        ):
            for start in range(0, len(mine), ITEMS):
                part = mine[start : start + ITEMS]
                verdicts = self._verdicts(shown, part, state, meter)
                for place, sample in enumerate(part, 1):
                    reason = verdicts[place]
                    if reason is None:
                        accepted.append(sample)
                    else:
                        draft.refuse(number, sample, reason)
        return accepted

    def _verdicts(
        self, shown: Sequence[tuple[str, str]], samples: Sequence[Sample], state: State, meter: Meter
    ) -> dict[int, str | None]:
        """Reason by number, None where an item is supported."""
        messages = prompts.ask_check(shown, [_item(sample) for sample in samples])
        numbers = set(range(1, len(samples) + 1))

        def incomplete(reply: prompts.Verdicts) -> str | None:
            if len(samples) == 1:
                reply.verdicts[0].number = 1
            absent = numbers - {verdict.number for verdict in reply.verdicts}
            return f"there must be a verdict for each number, also for {sorted(absent)}" if absent else None

        try:
            reply = self.endpoint.ask(state, messages, prompts.verdicts(len(samples)), meter, incomplete)
        except BadReply as error:
            return dict.fromkeys(numbers, f"the check could not be used: {error}")
        found: dict[int, str | None] = {}
        for verdict in reply.verdicts:
            if verdict.supported and found.get(verdict.number) is None:
                found[verdict.number] = None
            else:  # of two verdicts on one item the worse one counts
                found[verdict.number] = f"the check: {' '.join(verdict.reason.split())[:200] or 'not supported'}"
        return found

    def _look_for_missing(self, draft: Draft, state: State, meter: Meter) -> None:
        """Facts for the next round: what the model misses and really stands there, and sentences without a question."""
        text = source_of(draft.task["chunk"])
        pairs = [
            {name: sample[name] for name in ("question", "answer")} for sample in draft.of("simple_qa", "complex_qa")
        ]
        try:
            messages = prompts.ask_coverage(passage(draft.task["chunk"]), pairs)
            said = self.endpoint.ask(state, messages, prompts.Uncovered, meter).facts
        except BadReply:
            said = []
        facts = [fact for fact in said if verify.is_fact(fact, text, pairs)]
        for sentence in verify.uncovered(draft.task["chunk"]["text"], pairs):
            if not any(verify.share_found(fact, sentence) >= verify.COVERED for fact in facts):
                facts.append(sentence)
        draft.missing = facts


def _pair(slot: Slot, pair: prompts.Pair) -> Sample:
    sample = {"kind": slot.kind, "language": slot.language}
    return sample | {name: " ".join(value.split()) for name, value in pair.model_dump().items()}


def _item(sample: Sample) -> dict[str, str]:
    if sample["kind"] in REWRITES:
        return {sample["kind"]: sample["text"]}
    return {"question": sample["question"], "answer": sample["answer"]}


def _length(text: str, language: str) -> int:
    return sum(not c.isspace() for c in text) if language == "zh" else len(text.split())


def _simple_count(text: str) -> int:
    return max(2, min(prompts.MOST_PAIRS, len(verify.sentences(text))))


def _made(draft: Draft, meter: Meter) -> dict[str, Any]:
    """What is kept of a finished chunk."""
    fields = {"simple_qa": [], "complex_qa": [], "multi_hop": [], "paraphrase": None, "summary": None}  # type: dict
    partner = draft.task["partner"]
    for sample in draft.accepted:
        if sample["kind"] in REWRITES:
            fields[sample["kind"]] = sample["text"]
            continue
        pair = {name: sample[name] for name in ("question", "answer", "language")}
        if sample["kind"] == "multi_hop" and partner:
            pair["chunks"] = [draft.task["chunk"]["id"], partner["id"]]
        fields[sample["kind"]].append(pair)
    tokens = {name: getattr(meter.all, name) for name in ("requests", "prompt", "completion", "estimated")}
    return {
        "accepted": bool(draft.accepted),
        "rounds": len(draft.counts),
        **fields,
        "rejected": draft.rejected,
        "round_counts": draft.counts,
        "uncovered": sum(not verify.is_covered(fact, draft.of("simple_qa", "complex_qa")) for fact in draft.missing),
        "tokens": tokens,
    }
