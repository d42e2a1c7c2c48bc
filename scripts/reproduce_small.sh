#!/usr/bin/env bash
# Trains SmolLM2-135M through all stages on real data and measures it beside every baseline; docs/REPRODUCTION.md is
# written from what came out. DATA_DIR has train/, eval/ and extra/ (docs/REPRODUCTION_GUIDE.md).
#   DATA_DIR=data bash scripts/reproduce_small.sh              rates 4 and 16, then 32, 64, 128, and the ablations: a GPU
#   DATA_DIR=data PART=cpu bash scripts/reproduce_small.sh     rate 4, documents of 128 tokens, half a day: any CPU
#   SLICE=460 …                                                stops after so many seconds; the same command goes on
# Flags of scripts/reproduce_small.py may follow: --list shows the steps, --only NAME runs those of one kind.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
find_python
find_devices
[ "$MODEL_PATH" != .models/SmolLM2-135M-Instruct ] || "$PYTHON" scripts/get_base_model.py
exec "$PYTHON" scripts/reproduce_small.py --data "${DATA_DIR:?the directory with train/, eval/ and extra/}" \
    --base "$MODEL_PATH" --part "${PART:-full}" --slice "${SLICE:-0}" "$@"
