#!/usr/bin/env bash
# Makes .venv where it is absent, installs what is pinned, checks style and types, runs the tests. Arguments go to pytest.
#   bash scripts/test.sh            bash scripts/test.sh tests/models -k topk
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv requirements-test.txt

export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
"$PYTHON" -m pytest -q --durations 10 "$@"
