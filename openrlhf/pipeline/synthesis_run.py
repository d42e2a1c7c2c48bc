"""The synthesis step over a whole raw_knowledge.jsonl: what is to do, doing it, and the two files it writes.

Contract: synthesized.jsonl and synthesis_report.json are pure functions of input, options and kept replies; they are
written whole, at the end, and only by a run that the server did not stop. Knows nothing about prompts and checks.
"""

import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openrlhf.pipeline import prompts, verify
from openrlhf.pipeline.endpoint import EndpointError
from openrlhf.pipeline.files import write_json, write_lines
from openrlhf.pipeline.replies import Tally, estimate_tokens, price
from openrlhf.pipeline.state import State, content_key
from openrlhf.pipeline.synthesis import KINDS, KNOWN, PAIR_KINDS, STEP, Synthesis, Task, passage
from openrlhf.pipeline.work import each

logger = logging.getLogger(__name__)

OUTPUT = "synthesized.jsonl"
REPORT = "synthesis_report.json"
TOLD_EVERY = 60  # seconds between lines on how far the work is
SHARED_BY_MOST = 8  # chunks of a document in which a term still ties two of them together
# Tokens of a usual reply, for the estimate; a paraphrase is as long as its passage.
REPLIES = {"simple_qa": 220, "complex_qa": 180, "multi_hop": 120, "summary": 90, "check": 220, "coverage": 60}


def read_chunks(path: Path) -> list[dict[str, Any]]:
    """The chunks of raw_knowledge.jsonl.

    Raises:
        ValueError: `file:line: reason`.
        OSError: it cannot be read.
    """
    rows: list[dict[str, Any]] = []
    ids: set[str] = set()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
                json.dumps(row, ensure_ascii=False).encode("utf-8")  # no halves of surrogate pairs
                wrong = _wrong_row(row, ids)
            except (UnicodeDecodeError, ValueError, RecursionError) as error:
                wrong = f"not JSON in UTF-8 ({error})"
            if wrong:
                raise ValueError(f"{path}:{number}: {wrong}; make the file again with scripts/extract_with_docling.py")
            ids.add(row["id"])
            rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no chunks: see extraction_report.json beside it for the reasons")
    return rows


def _wrong_row(row: object, ids: set[str]) -> str | None:
    if not isinstance(row, dict):
        return "not a JSON object"
    for name in ("id", "source", "text"):
        if not isinstance(row.get(name), str) or not row[name].strip():
            return f"{name} must be a non-empty text"
    return f"the id {row['id']} is there twice" if row["id"] in ids else None


def partners(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each chunk the one of its document that multi-hop questions join with it; by id, no pair twice.

    The one with which it shares most of the document's rarer terms, of several the nearest; where none shares any, the
    next one. A chunk for which no new pair is left has none.
    """
    documents: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        documents[row["source"]].append(row)
    found: dict[str, dict[str, Any]] = {}
    for chunks in documents.values():
        terms = [verify.units(chunk["text"]) for chunk in chunks]
        holders: dict[str, list[int]] = defaultdict(list)
        for place, mine in enumerate(terms):
            for term in mine:
                holders[term].append(place)
        taken: set[frozenset[int]] = set()
        for place, chunk in enumerate(chunks):
            scores: Counter[int] = Counter({near: 0 for near in (place + 1, place - 1) if 0 <= near < len(chunks)})
            for term in terms[place]:
                if 2 <= len(holders[term]) <= SHARED_BY_MOST:
                    scores.update({other: 60 // len(holders[term]) for other in holders[term] if other != place})
            order = sorted(scores, key=lambda other: (-scores[other], abs(other - place), -other))
            best = next((other for other in order if frozenset((place, other)) not in taken), None)
            if best is not None:
                taken.add(frozenset((place, best)))
                found[chunk["id"]] = chunks[best]
    return found


def select(rows: Sequence[dict[str, Any]], most: int | None, seed: int) -> list[dict[str, Any]]:
    """At most `most` chunks, drawn by the seed and spread over the documents, in the file's order.

    Every document gives one before any gives a second, and a larger number holds the smaller number's chunks, so that
    what was paid for a trial counts for the whole.
    """
    if most is None or most >= len(rows):
        return list(rows)
    documents: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        documents[row["source"]].append(row["id"])
    ranks: list[tuple[int, str, str]] = []
    for source, ids in documents.items():
        drawn = sorted(ids, key=lambda one: content_key(seed, one))
        ranks += [(rank, content_key(seed, source), one) for rank, one in enumerate(drawn)]
    chosen = {one for _, _, one in sorted(ranks)[:most]}
    return [row for row in rows if row["id"] in chosen]


def tasks_of(rows: Sequence[dict[str, Any]], most: int | None, seed: int) -> list[Task]:
    """What is to be done, in the file's order. Partners are chosen from all chunks."""
    others = partners(rows)
    return [{"chunk": row, "partner": others.get(row["id"])} for row in select(rows, most, seed)]


@dataclass
class Plan:
    """What a run will do; requests and tokens for one round and for the most rounds.

    `least`: every chunk passes in its first round. `most`: every chunk takes all rounds.
    """

    chunks: int
    done: int
    least: Tally
    most: Tally


def plan(work: Synthesis, tasks: Sequence[Task], state: State | None) -> Plan:
    """The plan, without any request."""
    done = 0
    least, most = Tally(estimated=True), Tally(estimated=True)
    for task in tasks:
        if state is not None and state.get(STEP, work.key(task)) is not None:
            done += 1
            continue
        once = _estimate(work, task)
        least.add(vars(once))
        most.add({name: value * work.rounds for name, value in vars(once).items()})
    return Plan(len(tasks), done, least, most)


def _estimate(work: Synthesis, task: Task) -> Tally:
    """Requests and tokens of one round of one chunk."""
    chunk, partner = task["chunk"], task["partner"]
    own = chunk.get("language") or verify.language_of(chunk["text"])
    asked = ["simple_qa", "complex_qa", "paraphrase", "summary", "check", "coverage"]
    asked += ["simple_qa"] * sum(language != own for language in work.languages)
    asked += ["multi_hop", "check"] if partner else []
    tokens = estimate_tokens(chunk["text"])
    tally = Tally(estimated=True)
    for kind in asked:
        shown = [passage(chunk)] + ([passage(partner)] if partner and kind == "multi_hop" else [])
        said = "\n".join(message["content"] for message in prompts.messages(shown, kind, prompts.TASKS[kind]))
        listed = REPLIES["simple_qa"] + REPLIES["complex_qa"] if kind in ("check", "coverage") else 0
        reply = REPLIES.get(kind, tokens)
        tally.add({"prompt": estimate_tokens(said) + listed, "completion": reply, "estimated": True})
    return tally


def probe(work: Synthesis, tasks: Sequence[Task], state: State) -> None:
    """Tries the endpoint, where anything is left to ask.

    Raises:
        EndpointError: in one sentence that says what to do.
    """
    if any(state.get(STEP, work.key(task)) is None for task in tasks):
        work.endpoint.probe()


def run(
    work: Synthesis, tasks: Sequence[Task], state: State, output: Path, workers: int, ray: bool = False
) -> tuple[dict[str, Any], Tally]:
    """Does what is missing and writes both files; gives the report and what was sent in this run.

    Raises:
        EndpointError: the server stopped the work; what was done is in the state, the files are as they were.
    """
    new, lines, told, began = Tally(), [], time.monotonic(), time.monotonic()
    for number, line in enumerate(each(work, tasks, state, workers, "synthesis", ray=ray), 1):
        new.add(line.pop("new"))
        lines.append(line)
        if time.monotonic() - told > TOLD_EVERY and number < len(tasks):
            told = time.monotonic()
            left = (told - began) / number * (len(tasks) - number) / 60
            logger.info("%d of %d chunks, about %.1f minutes left", number, len(tasks), left)
    _judge(lines, work)
    report = report_of(work, lines)
    for task, line in zip(tasks, lines, strict=True):
        del line["failed"]
        if line.pop("refused"):
            state.put(STEP, work.key(task), {name: line[name] for name in line if name not in KNOWN})
    output.mkdir(parents=True, exist_ok=True)
    write_lines(output / OUTPUT, lines)
    write_json(output / REPORT, report)
    return report, new


def _judge(lines: Sequence[dict[str, Any]], work: Synthesis) -> None:
    """Raises EndpointError where so much failed that the fault must be the server's: then nothing is written."""
    bad = [reason for line in lines if (reason := line["failed"] or line["refused"])]
    if 2 * len(bad) > len(lines):
        raise EndpointError(
            f"{len(bad):,} of {len(lines):,} chunks failed at {work.endpoint.place}, the first because {bad[0]}. What "
            "was done is kept: see to the server, then give the same command again"
        )


def report_of(work: Synthesis, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts over all chunks."""
    total = Tally()
    accepted: Counter[str] = Counter({kind: 0 for kind in KINDS})
    rejected: Counter[str] = Counter({kind: 0 for kind in KINDS})
    languages: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rounds: list[Counter[str]] = []
    for line in lines:
        total.add(line["tokens"])
        for kind in PAIR_KINDS:
            accepted[kind] += len(line[kind])
            languages.update(pair["language"] for pair in line[kind])
        accepted.update(kind for kind in KINDS if kind not in PAIR_KINDS and line[kind])
        rejected.update(one["kind"] for one in line["rejected"])
        reasons.update(_class_of(one["reason"]) for one in line["rejected"])
        for number, count in enumerate(line["round_counts"]):
            if number == len(rounds):
                rounds.append(Counter(chunks=0, asked=0, accepted=0, rejected=0))
            rounds[number].update(count | {"chunks": 1})
    return {
        "model": work.endpoint.model,
        "languages": list(work.languages),
        "rounds": work.rounds,
        "chunks": {
            "asked": len(lines),
            "accepted": sum(line["accepted"] for line in lines),
            "dropped": sum(not line["accepted"] and not line["failed"] for line in lines),
            "failed": sum(bool(line["failed"]) for line in lines),
        },
        "accepted": dict(accepted),
        "rejected": dict(sorted(rejected.items())),
        "question_languages": dict(sorted(languages.items())),
        "uncovered_facts": sum(line["uncovered"] for line in lines),
        "by_round": [dict(count) for count in rounds],
        "reasons": dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0]))),
        "tokens": vars(total),
        "cost": total.cost(),
        "failed": [{"id": line["id"], "reason": line["failed"]} for line in lines if line["failed"]],
    }


def _class_of(reason: str) -> str:
    """A reason without what is special to one sample."""
    if reason.startswith("the check:"):
        return "the check finds it not supported"
    for start in ("the reply could not be used", "the check could not be used", "the server refuses the request"):
        if reason.startswith(start):
            return start
    for what in ("number", "name"):
        if f"the {what} " in reason and "not in the passage" in reason:
            return f"a {what} is not in the passage"
    return "too few of its words are in the passage" if "of its words" in reason else reason.removeprefix("question: ")


def told_plan(made: Plan, work: Synthesis) -> str:
    """The plan for people."""

    def figures(tally: Tally) -> str:
        cost = tally.cost()
        priced = f", {cost:,.2f} by PRICE_PER_M_INPUT and PRICE_PER_M_OUTPUT" if cost is not None else ""
        return f"{tally.requests:,} requests, {tally.prompt:,} + {tally.completion:,} tokens{priced}"

    left = made.chunks - made.done
    lines = {
        "model": f"{work.endpoint.model} at {work.endpoint.place}",
        "chunks": f"{made.chunks:,}, of which {made.done:,} are done and {left:,} to do",
        "one round": f"about {figures(made.least)}",
        "at most": f"about {figures(made.most)}, if every chunk took all {work.rounds} rounds",
    }
    if price() is None:
        lines["cost"] = "set PRICE_PER_M_INPUT and PRICE_PER_M_OUTPUT (for a million tokens) to see it"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())


def told_report(report: dict[str, Any], new: Tally, output: Path) -> str:
    """What was done, for people."""
    chunks, rejected = report["chunks"], sum(report["rejected"].values())
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in report["accepted"].items())
    about = "about " if new.estimated else ""
    sent = f"{new.requests:,} requests, {about}{new.prompt:,} + {new.completion:,} tokens"
    cost, whole = new.cost(), report["tokens"]
    lines = {
        "chunks": f"{chunks['accepted']:,} accepted, {chunks['dropped']:,} dropped, of {chunks['asked']:,}",
        "samples": f"{kinds}; {rejected:,} rejected",
        "this run": sent + (f", cost {cost:,.4f}" if cost is not None else ""),
        "in all": f"{whole['requests']:,} requests, {whole['prompt']:,} + {whole['completion']:,} tokens"
        + (f", cost {report['cost']:,.4f}" if report["cost"] is not None else ""),
    }
    if chunks["failed"]:
        lines["unfinished"] = (
            f"{chunks['failed']:,} chunks, the first because {report['failed'][0]['reason']}. The same command asks "
            "for them again"
        )
    if reasons := list(report["reasons"].items())[:3]:
        lines["rejected"] = "; ".join(f"{reason} ({count:,})" for reason, count in reasons)
    lines["files"] = f"{output / OUTPUT}, {output / REPORT}"
    lines["next"] = f"python scripts/assemble_data.py --input_dir {output}"
    return "\n".join(f"{name:12}{text}" for name, text in lines.items())
