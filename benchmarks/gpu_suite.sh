#!/usr/bin/env bash
# All benchmarks on a GPU, for Mistral-7B's shape with random weights and for the small real model, in slices.
#   bash benchmarks/gpu_suite.sh [SECONDS]
# Starts no benchmark after SECONDS (default 300) and gives each until 170 seconds beyond that; what is finished has its
# JSON in benchmarks/results and is not run again, so the same command goes on. DATA_STAGE1 and DATA_STAGE2 name the records
# (default: example/), DEVICE another device, LAYERS fewer layers of the 7B shape, to try the script without a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1
limit=${1:-300}
device=${DEVICE:-cuda}
stage1=${DATA_STAGE1:-example/pretrain_data.jsonl}
stage2=${DATA_STAGE2:-example/end_to_end_data.jsonl}
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)
left=0

bench() { # NAME MODEL FLAGS…: the model is 7b or small
  local name=$1 model=$2
  shift 2
  local out="benchmarks/results/${name}_${device}_${model}.json" which=()
  [ -e "$out" ] && return
  if [ "$SECONDS" -ge "$limit" ]; then
    left=$((left + 1))
    return
  fi
  [ "$model" = 7b ] && which=(--shape mistral-7b ${LAYERS:+--layers "$LAYERS"})
  echo "== $name, $model ($SECONDS s)"
  timeout $((limit + 170 - SECONDS)) "$python" "benchmarks/${name%%-*}.py" "${which[@]}" --device "$device" --out "$out" "$@" ||
    { echo "$name, $model did not finish: the same command tries it again"; left=$((left + 1)); }
}

for model in 7b small; do
  bench compress "$model" --data "$stage1" --documents 512 --batch 64 --rounds 3 --merge
  bench stage1_step "$model" --data "$stage1" --records 64 --micro_batch 16 --rounds 3
  bench stage1_step-checkpointed "$model" --data "$stage1" --records 64 --micro_batch 16 --rounds 3 --gradient_checkpointing
  bench stage2_step "$model" --data "$stage2" --questions 32 --micro_batch 8
  bench memory "$model" --micro_batches 2 8
  bench memory-checkpointed "$model" --micro_batches 2 8 --gradient_checkpointing
  bench first_token "$model" --data "$stage1" --rounds 5
  bench decode "$model" --data "$stage2" --new_tokens 64 --rounds 3
  bench scaling "$model" --data "$stage1" --questions "$stage2" --sizes 64 128 256 512 --parts documents batch cached --rounds 3
done
if [ "$left" -gt 0 ]; then
  echo "$left benchmarks are left: type the same command again"
else
  echo "all measured: benchmarks/results/*_${device}_*.json"
fi
