"""scripts/common.sh: what the processes that it starts find in their environment."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JEMALLOC = "/somewhere/libjemalloc.so.2"
LISTED = f"2 libs\\n\\tlibm.so.6 (libc6) => /lib/libm.so.6\\n\\tlibjemalloc.so.2 (libc6,x86-64) => {JEMALLOC}\\n"
SHOW = "import json, os; print(json.dumps(dict(os.environ)))"


def environment(tools: Path, listed: str, gpus: str = "", **variables: str) -> dict[str, str]:
    """After find_devices, on a machine with these libraries and GPUs. What is to be preloaded is not there: the dynamic
    linker says so, and goes on."""
    for name, said in (("ldconfig", listed), ("nvidia-smi", gpus)):
        (tools / name).write_text(f"#!/bin/sh\nprintf '%b' '{said}'\n")
        (tools / name).chmod(0o755)
    line = f"source scripts/common.sh; find_devices; exec {sys.executable} -c '{SHOW}'"
    own = {key: value for key, value in os.environ.items() if key not in ("LD_PRELOAD", "OMP_NUM_THREADS")}
    own |= {"PATH": f"{tools}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, env=own, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("listed", "gpus", "given", "preloaded"),
    [
        (LISTED, "", {}, JEMALLOC),
        (LISTED, "", {"LD_PRELOAD": "/mine/libtcmalloc.so"}, "/mine/libtcmalloc.so"),
        (LISTED, "GPU 0: one\\n", {}, None),
        ("\\tlibm.so.6 (libc6) => /lib/libm.so.6\\n", "", {}, None),
    ],
)
def test_jemalloc_is_preloaded_on_a_cpu_where_it_is_installed(tmp_path, listed, gpus, given, preloaded):
    found = environment(tmp_path, listed, gpus, **given)
    assert found.get("LD_PRELOAD") == preloaded
    assert ("OMP_NUM_THREADS" in found) == (not gpus)
