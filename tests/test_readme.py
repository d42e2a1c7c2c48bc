"""The documentation tells the truth: the README's snippets run, and what the guides name exists."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from evaluation import systems
from evaluation.config import EvaluationConfig
from evaluation.sources import READERS
from openrlhf.cli.estimate import FLAGS as ESTIMATED
from openrlhf.cli.train_sft import FIXED
from openrlhf.models.modeling_clara import CLaRa, CLaRaConfig
from openrlhf.trainer.config import TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
README, GUIDE, DATA = "README.md", "docs/TRAINING_GUIDE.md", "DATA_PIPELINE_GUIDE.md"
INDEX, EVALUATION, EVALUATION_DATA = "docs/PAPER_INDEX.md", "docs/EVALUATION_GUIDE.md", "docs/EVALUATION_DATA.md"
HARDWARE, BENCHMARKS = "docs/HARDWARE_REQUIREMENTS.md", "benchmarks/README.md"
RAG, REPRODUCTION = "docs/RAG_GUIDE.md", "docs/REPRODUCTION_GUIDE.md"
HOSTING = "docs/LLM_HOSTING_GUIDE.md"
OTHER_PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", HARDWARE, BENCHMARKS, RAG, REPRODUCTION, HOSTING)
PAGES = (README, GUIDE, DATA, INDEX, EVALUATION, EVALUATION_DATA, *OTHER_PAGES)
# What scripts/prepare_eval_data.py makes.
MADE = "evaluation/evaluation_data"
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"(?<![\w/.$-])(?:(?:scripts|openrlhf|evaluation|example|docs|figs|tests|benchmarks)/[\w./-]*\w/?"
                   r"|[A-Z_]{6,}\.md|LICENSE|setup\.py|requirements[\w-]*\.txt|\.env\.example)(?![\w/])")  # fmt: skip
# Flags of programs that are not ours, by the first word of the command.
VLLM = (
    "--served-model-name",
    "--dtype",
    "--enable-prompt-embeds",
    "--enable-lora",
    "--lora-modules",
    "--max-lora-rank",
)
VLLM += ("--host", "--port", "--gpu-memory-utilization", "--max-model-len", "--max-num-seqs")
OTHERS = {"pip": ("-r", "-e", "--no-deps"), "conda": ("-n",), "curl": ("-s", "-d", "-F", "-X"), "vllm": VLLM}


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [textwrap.dedent(body) for _, kind, body in BLOCK.findall(read(page)) if kind == language]


def inline(page: str) -> list[str]:
    """What stands between backticks outside code blocks, line breaks as blanks."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", BLOCK.sub("", read(page)))]


def option_strings(file: Path) -> set[str]:
    own = set(re.findall(r'"(--[a-z_]+)"', file.read_text(encoding="utf-8")))
    return own | {f"--{name}" for name in READERS} if file.stem == "prepare_eval_data" else own


EVALUATION_FLAGS = {f"--{field.name}" for field in dataclasses.fields(EvaluationConfig)}
TRAINING_FLAGS = {f"--{field.name}" for field in dataclasses.fields(TrainingConfig)} | {"--no_qa_loss"}
LAUNCHER_FLAGS = {option for action in get_args_parser()._actions for option in action.option_strings}


def known_flags(command: str) -> set[str]:
    """Flags that the program of a command takes; fails for a program that is not there."""
    words = [word for word in command.split() if not re.fullmatch(r"[A-Z_]+=\S*", word)]
    module = re.search(r"-m ([\w.]+)", command)
    if module and not module[1].startswith(("openrlhf", "evaluation")):
        return {"-m"}
    if module:
        file = ROOT / (module[1].replace(".", "/") + ".py")
        own = {"train_sft": TRAINING_FLAGS, "evaluate": EVALUATION_FLAGS}.get(file.stem) or option_strings(file)
        own = own | {f"--{name}" for name in ESTIMATED} if file.stem == "estimate" else own
        return own | {"-m"} | (LAUNCHER_FLAGS if words[0] == "torchrun" else set())
    if words[0] in ("bash", "python") or words[0].startswith("scripts/"):
        script = words[0] if words[0].startswith("scripts/") else words[1]
        if script.startswith("scripts/evaluation_"):
            return EVALUATION_FLAGS
        return TRAINING_FLAGS if script.startswith("scripts/train_") else {"-k"} | option_strings_of(script)
    return set(OTHERS.get(words[0], ()))


def option_strings_of(script: str) -> set[str]:
    cases = set(re.findall(r"^ *(--[a-z_]+)\)", read(script), re.MULTILINE))
    own = option_strings(ROOT / script) if script.endswith(".py") else cases
    return own | option_strings(ROOT / "benchmarks/common.py") if script.startswith("benchmarks/") else own


def commands(page: str) -> list[str]:
    """Commands in shell blocks and between backticks that carry flags."""
    lines = [
        line.strip()
        for block in blocks(page, "bash")
        for line in block.replace("\\\n", " ").splitlines()
        if not line.startswith("#")
    ]
    lines = [line.removeprefix("run ") for line in lines if not line.startswith(("export ", "run()", "MASTER="))]
    spoken = [code for code in inline(page) if re.match(r"([A-Z_]+=\S+ )*(bash|python|torchrun|pip) ", code)]
    return [command for command in (*lines, *spoken) if re.search(r"\s--?[a-z]", command)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory, vectors) -> Path:
    """A directory as the quickstart leaves it, with tiny checkpoints."""
    root = tmp_path_factory.mktemp("readme")
    base = vectors / "decoders" / "sys"
    for stage in ("stage1", "stage1_2", "stage2"):
        model = CLaRa.from_base(CLaRaConfig(decoder_model_name=str(base), lora_r=4, generation_top_k=5))
        if stage == "stage2":
            model.add_query_reasoner()
        model.train_stage(stage)
        model.save_pretrained(root / "checkpoints" / "quickstart" / stage)
    return root


def test_python_snippets_run_as_printed(quickstart):
    snippets = blocks(README, "python")
    assert len(snippets) == 4
    runner = (
        "import json, sys\n"
        "for snippet in json.load(sys.stdin):\n"
        "    exec(compile(snippet, '<README>', 'exec'), {'__name__': '__main__'})\n"
        "    print('\\n== done ==')\n"
    )
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {"HF_HOME": str(quickstart / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", runner],
        input=json.dumps(snippets),
        cwd=quickstart,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    printed = run.stdout.split("== done ==")
    assert len(printed) == 5 and all(part.strip() for part in printed[:4])
    assert printed[1].count("→") == 2
    assert (quickstart / "checkpoints" / "quickstart" / "library.safetensors").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_files_and_folders_named_exist(page):
    named = {name for name in NAMED.findall(read(page)) if not name.startswith(MADE)}
    assert named or page == "CHANGELOG.md"
    # A page may name a neighbour as well as something from the repository's root.
    missing = [
        name for name in sorted(named) if not (ROOT / name).exists() and not (ROOT / page).with_name(name).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target, anchor in re.findall(r"\]\(((?!https?:)[^)#\s]*)(?:#([\w-]+))?\)", read(page)):
        file = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{target}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != INDEX])
def test_flags_in_commands_exist(page):
    for command in commands(page):
        used = set(re.findall(r"(?<=\s)(--?[a-zA-Z][\w-]*)", command))
        assert used <= known_flags(command), f"{command}: {sorted(used - known_flags(command))}"


@pytest.mark.parametrize("page", PAGES)
def test_flags_named_in_the_text_exist(page):
    files = [
        path for room in ("scripts", "openrlhf/cli", "evaluation", "benchmarks") for path in ROOT.glob(f"{room}/*.py")
    ]
    known = (TRAINING_FLAGS | EVALUATION_FLAGS).union(VLLM, *map(option_strings, files))
    named = {flag for code in inline(page) if code.startswith("--") for flag in re.findall(r"--[a-z][\w-]*", code)}
    assert named <= known


def shown_default(field: dataclasses.Field) -> str:
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    if field.name in ("pretrain", "dataset", "checkpoint"):
        return "required"
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, list):
        return " ".join(map(str, default))
    if isinstance(default, float):
        return f"{default:g}".replace("e-0", "e-") if default < 1e-3 and default else str(default)
    return "none" if default in (None, "") else str(default)


def test_training_guide_lists_every_flag_with_its_default():
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([^|]+?) \|", read(GUIDE), re.MULTILINE))
    assert rows == {field.name: shown_default(field) for field in dataclasses.fields(TrainingConfig)}


def test_evaluation_guide_lists_every_flag_with_its_default():
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([^|]+?) \|", read(EVALUATION), re.MULTILINE))
    assert rows == {field.name: shown_default(field) for field in dataclasses.fields(EvaluationConfig)}


def test_evaluation_guide_lists_every_system_and_variable():
    own = {systems.CLARA, systems.CLOSED_BOOK, systems.TEXT_RAG, systems.ORACLE_TEXT, systems.LLMLINGUA}
    own |= {systems.TEXT_RAG_TUNED, systems.ORACLE_TEXT_TUNED}
    own |= {systems.RANDOM, systems.BM25, systems.DENSE, systems.CROSS_ENCODER}
    listed = read(EVALUATION).split("## What is compared")[1].split("## Metrics")[0]
    assert own == set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]+) \|", listed, re.MULTILINE))))
    variables = set(re.findall(r"^\| `([A-Z_]+)` \|", read(EVALUATION), re.MULTILINE))
    used = set(re.findall(r"\$\{?([A-Z_]+)", read("scripts/common.sh").split("evaluate() {")[1]))
    used = {name.replace("GIVEN_", "") for name in used} - {"PYTHON", "DEVICES", "MASTER_PORT"}
    assert variables == used


def test_training_guide_names_what_a_resumed_run_must_share():
    paragraph = re.search(r"\*\*What is refused\.\*\*(.*?)\n\n", read(GUIDE), re.DOTALL)[1]
    named = set(re.findall(r"`(\w+)`", paragraph))
    assert {*FIXED, "pretrain", "pretrain_checkpoint", "records", "world_size"} <= named


def test_variables_of_the_scripts_have_the_defaults_of_the_readme():
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]+?) \|", read(README), re.MULTILINE))
    common = read("scripts/common.sh")
    for name, shown in rows.items():
        found = re.search(rf'^ *{name}="\${{{name}:-(.*)}}"', common, re.MULTILINE)
        if shown.startswith("`"):
            assert found and shown.strip("`") == found[1], name
        else:
            assert found or any(f"${{{name}:-" in read(f"scripts/{s.name}") for s in ROOT.glob("scripts/train_*.sh")), (
                name
            )
    assert set(re.findall(r'^([A-Z_]+)="\$\{', common, re.MULTILINE)) - {"GIVEN_MODEL_PATH", "GIVEN_DATA_PATH"} <= set(
        rows
    )


def test_data_guide_lists_every_variable_of_the_pipeline_with_its_default():
    """Also those that the steps themselves read."""
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| ([^|]+?) \|", read(DATA), re.MULTILINE))
    script = read("scripts/run_data_pipeline.sh")
    used = set(re.findall(r"\$\{([A-Z_]+):-", script)) - {"GIVEN_DATA_PATH", "FOUND"} | {"MODEL_PATH"}
    steps = ("extract_with_docling", "extract_images", "synthesize_data", "assemble_data")
    code = "".join(read(f"scripts/{step}.py") for step in steps) + read("openrlhf/pipeline/endpoint.py")
    used |= set(re.findall(r'environ(?:\.get\(|\[)"([A-Z_]+)"', code))
    used |= set(re.findall(r'"(PRICE_[A-Z_]+)"', read("openrlhf/pipeline/replies.py")))
    assert set(rows) == used - {"DATA_PATH"} and "`DATA_PATH`" in rows["OUTPUT_DIR"]
    for name in ("DOC_MAX_LENGTH", "RAY"):
        assert f'{name}="${{{name}:-{rows[name].strip("`")}}}"' in script
    assert "GIVEN_DATA_PATH:-./data" in script and "`./data`" in rows["OUTPUT_DIR"]
    assert set(re.findall(r"^# ([A-Z_]+)=", read(".env.example"), re.MULTILINE)) >= set(rows)


def test_directories_of_the_stages_are_those_of_the_scripts():
    rows = re.findall(
        r"^\| `(scripts/train_\w+\.sh)` \| (\w+) \|.*`\$CHECKPOINT_ROOT/(\w+)` \|$", read(README), re.MULTILINE
    )
    assert len(rows) == 3
    for script, stage, folder in rows:
        text = read(script)
        assert f"SAVE_MODEL_NAME:-{folder}}}" in text and f"--stage {stage} " in text


def test_records_shown_in_the_readme_are_from_the_example_data():
    shown = [line for block in blocks(README, "json") for line in block.splitlines()]
    files = ["pretrain_data", "pretrain_data", "instruction_data", "end_to_end_data"]
    for line, name in zip(shown, files, strict=True):
        texts = [piece for text in re.findall(r'"((?:[^"\\]|\\.)*)"', line) for piece in text.split("…")]
        records = read(f"example/{name}.jsonl").splitlines()
        assert any(all(text.strip() in record for text in texts) for record in records), line


def without_joints(source: str) -> str:
    """Source text with implicitly joined string literals as one."""
    return re.sub(r'"\s*f?"', "", source)


def test_messages_quoted_in_the_guides_are_those_of_the_code():
    source = without_joints("".join(file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("openrlhf/*/*.py"))))
    reasons = re.findall(r"^\| `([^`]+)` \|", read(DATA).split("## What is checked")[1], re.MULTILINE)
    assert len(reasons) > 10
    quoted = [
        "the base model … was not found",
        "holds no complete CLaRa checkpoint",
        "already holds a checkpoint",
        "--load_checkpoint: no checkpoint … yet",
        "answers cut away entirely",
        "these flags cannot train",
        "could not be written",
    ]
    for text in quoted:
        assert text in " ".join((read(README) + read(GUIDE)).split()), text
    for text in (*reasons, *quoted):
        for piece in filter(None, map(str.strip, text.split("…"))):
            assert piece in source, text


def test_paper_index_names_code_and_tests_that_exist():
    named = re.findall(r"((?:openrlhf|evaluation|tests)/[\w/]+\.py)::([\w.]+)", read(INDEX))
    assert any(file.startswith("tests/") for file, _ in named)
    for file, name in named:
        for part in name.split("."):
            assert re.search(rf"^ *(?:def|class) {part}\b|^{part}\b.*=", read(file), re.MULTILINE), f"{file}::{name}"
