"""Make questions, answers, paraphrases and summaries out of raw_knowledge.jsonl, checked against their passages.

    python scripts/synthesize_data.py --input_file data/raw_knowledge.jsonl --output_dir data --model gpt-4.1-mini

asks any server that speaks OpenAI's chat protocol (BASE_URL, OPENAI_API_KEY) and writes synthesized.jsonl and
synthesis_report.json. Stopped or killed, the same command goes on where it was and pays nothing twice but what was
under way. --dry_run says what it would take and asks nothing. Guide: DATA_PIPELINE_GUIDE.md.
"""

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from openrlhf.pipeline.endpoint import Endpoint, key_from_environment
from openrlhf.pipeline.replies import price
from openrlhf.pipeline.state import State
from openrlhf.pipeline.synthesis import Synthesis
from openrlhf.pipeline.synthesis_run import plan, probe, read_chunks, run, tasks_of, told_plan, told_report
from openrlhf.utils.logging import set_up_logging

NAME = "synthesize_data"
STATE = "pipeline_state.sqlite"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog=NAME, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--input_file", type=Path, required=True, help="raw_knowledge.jsonl of the extraction")
    parser.add_argument("--output_dir", type=Path, required=True, help="where the two files go")
    parser.add_argument("--model", default=os.environ.get("MODEL"), help="model that is asked (default: MODEL)")
    parser.add_argument(
        "--languages",
        default=os.environ.get("LANGUAGES", ""),
        help="en,zh: at least one question in each of these (default: LANGUAGES, else the passage's own language)",
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds of asking and checking, at most (10)")
    parser.add_argument("--concurrency", type=int, default=4, help="chunks under way at once (4)")
    parser.add_argument(
        "--max_chunks",
        type=int,
        default=os.environ.get("MAX_CHUNKS") or None,
        help="only so many, spread over the documents by --seed (default: MAX_CHUNKS, else all)",
    )
    parser.add_argument("--seed", type=int, default=42, help="of --max_chunks, and passed to the model (42)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of the model (0: as repeatable as it can be)")
    parser.add_argument("--max_tokens", type=int, default=2048, help="of one reply (2048); more for models that think")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for one reply (120)")
    parser.add_argument("--retries", type=int, default=6, help="of a request, on 429, 5xx, time-outs (6)")
    parser.add_argument(
        "--extra_body",
        type=fields,
        default=os.environ.get("EXTRA_BODY") or "{}",
        help="more fields of each request as JSON, such as '{\"enable_thinking\": false}' (default: EXTRA_BODY)",
    )
    parser.add_argument("--state", type=Path, help=f"what is done (default: OUTPUT_DIR/{STATE})")
    parser.add_argument("--ray", action="store_true", help="over the Ray cluster at RAY_ADDRESS")
    parser.add_argument("--dry_run", action="store_true", help="say what it would take, ask nothing")
    args = parser.parse_args(argv)
    args.languages = tuple(dict.fromkeys(part.strip() for part in args.languages.split(",") if part.strip()))
    if not args.model:
        parser.error("--model is missing: give the name of a model of your provider, or set MODEL")
    if unknown := [language for language in args.languages if language not in ("en", "zh")]:
        parser.error(f"--languages takes en and zh, not {', '.join(unknown)}")
    for name in ("rounds", "concurrency", "max_tokens", "timeout", "max_chunks"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name} must be more than 0, got {value}")
    if args.retries < 0 or not 0 <= args.temperature <= 2:
        parser.error("--retries must be at least 0 and --temperature between 0 and 2")
    return args


def fields(text: str) -> dict[str, Any]:
    """A JSON object given on the command line."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"it must be a JSON object, got {text}")
    return value


def main(argv: list[str] | None = None) -> None:
    """Entry point."""
    args = parse(argv)
    set_up_logging(0)
    code = 2
    try:
        price()
        endpoint = Endpoint(
            args.model,
            args.temperature,
            args.seed,
            args.max_tokens,
            timeout=args.timeout,
            retries=args.retries,
            extra=args.extra_body,
        )
        work = Synthesis(endpoint, args.languages, args.rounds)
        tasks = tasks_of(read_chunks(args.input_file), args.max_chunks, args.seed)
        path = args.state or args.output_dir / STATE
        if args.dry_run:
            with State(path) if path.is_file() else nullcontext() as state:
                print(told_plan(plan(work, tasks, state), work))
            return
        key_from_environment()
        with State(path) as state:
            probe(work, tasks, state)
            code = 1
            report, new = run(work, tasks, state, args.output_dir, args.concurrency, args.ray)
        print(told_report(report, new, args.output_dir))
    except KeyboardInterrupt:
        print(f"\n{NAME}: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"{NAME}: {error}", file=sys.stderr)
        sys.exit(code)


if __name__ == "__main__":
    main()
