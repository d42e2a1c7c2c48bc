"""Loads a published checkpoint as a user without this project does; started by test_push.py in another directory.

Usage: python hub_probe.py REPOSITORY SUBFOLDER INPUT.json OUTPUT.pt
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
from transformers import AutoModel  # noqa: E402

torch.set_num_threads(1)
repository, subfolder, given, out = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text()), sys.argv[4]
model = AutoModel.from_pretrained(repository, subfolder=subfolder, trust_remote_code=True)
answers, topk = model.generate_from_questions(given["questions"], given["documents"])
vectors = model.compress_documents(given["documents"][0])[0]
torch.save({"vectors": vectors, "answers": answers, "topk": topk, "module": type(model).__module__}, out)
