"""Loads checkpoints as a user without this project does; started by test_remote_code.py in another directory.

Usage: python remote_probe.py REPOSITORY INPUT.json OUTPUT_DIRECTORY
"""

import json
import sys
from pathlib import Path


class NotInstalled:
    """Makes `import openrlhf` fail even where the project is installed in this environment."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("openrlhf", "evaluation", "tests"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return None


sys.meta_path.insert(0, NotInstalled())
try:
    import openrlhf  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("openrlhf can be imported here: the probe would show nothing")

import torch  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoTokenizer  # noqa: E402

torch.set_num_threads(1)
repository, given, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
TRUST = {"trust_remote_code": True}


def results(model) -> dict:
    answers, topk = model.generate_from_questions(given["questions"], given["documents"])
    return {
        "vectors": model.compress_documents(given["documents"][0])[0],
        "queries": model.encode_queries(given["questions"]),
        "answers": answers,
        "topk": topk,
        "paraphrases": model.generate_from_paraphrase(given["questions"], given["documents"]),
        "dtype": model.dtype,
        "training": model.training,
        "module": type(model).__module__,
    }


def error(**options) -> str:
    try:
        AutoModel.from_pretrained(repository, subfolder="compression-4", **TRUST, **options)
    except Exception as raised:
        return f"{type(raised).__name__}: {raised}"
    return "no error"


found = {"root": results(AutoModel.from_pretrained(repository, **TRUST))}
inner = AutoModel.from_pretrained(repository, subfolder="compression-4", **TRUST)
found["subfolder"] = results(inner)
inner.save_pretrained(out / "resaved")
found["resaved"] = results(AutoModel.from_pretrained(str(out / "resaved"), **TRUST))
found["bfloat16"] = str(AutoModel.from_pretrained(repository, dtype=torch.bfloat16, **TRUST).dtype)
found["top_k"] = AutoModel.from_pretrained(repository, generation_top_k=1, **TRUST).generate_from_questions(
    given["questions"], given["documents"]
)[1]
found["errors"] = {
    "unknown": error(compress_rate=8),
    "rate": error(compr_rate=8),
    "value": error(generation_top_k=0),
}
reader = AutoModel.from_pretrained(repository, subfolder="text-rag", **TRUST)
found["text"] = {"answers": reader.generate_from_text(given["questions"], given["documents"])}
found["text"]["adapters"] = list(reader.decoder.peft_config)
try:
    reader.compress_documents(given["documents"][0])
except ValueError as refused:
    found["text"]["error"] = str(refused)
found["config"] = AutoConfig.from_pretrained(repository, **TRUST).to_dict()["compr_rate"]
found["memory_id"] = AutoTokenizer.from_pretrained(repository, **TRUST).convert_tokens_to_ids("<MEM0>")
torch.save(found, out / "found.pt")
