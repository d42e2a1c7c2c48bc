#!/usr/bin/env bash
# From nothing to answers: makes .venv, fetches a small real base model, trains the three stages on example/, evaluates,
# answers held-out questions, and asks example/checkpoint, which was trained longer. About 20 minutes on two CPU cores
# after the downloads; uses a GPU where there is one.
# Start it again after an interruption and it goes on where it was.
#   bash scripts/quickstart.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
make_venv
CHECKPOINT_ROOT="$CHECKPOINT_ROOT/quickstart"
EVAL_DATA="$DATA_PATH/evaluation_data"

say "base model"
[ "$MODEL_PATH" != .models/SmolLM2-135M-Instruct ] || "$PYTHON" scripts/get_base_model.py

# bfloat16 only where the hardware has it; a few records, since this shall take minutes: see the last lines it prints.
PRECISION=true
nvidia-smi > /dev/null 2>&1 || grep -qm1 avx512_bf16 /proc/cpuinfo 2> /dev/null || PRECISION=false
SHORT=(--doc_max_length 256 --compress_rate 16 --micro_train_batch_size 2 --gradient_checkpointing false
    --bf16 "$PRECISION" --save_steps 10 --eval_steps 1000000 --load_checkpoint)

stage() {
    local name="$1" script="$2"
    shift 2
    if [ -f "$CHECKPOINT_ROOT/$name/config.json" ]; then
        say "$name is trained already (delete $CHECKPOINT_ROOT/$name to train it again)"
        return
    fi
    say "training $name"
    CHECKPOINT_ROOT="$CHECKPOINT_ROOT" SAVE_MODEL_NAME="$name" MODEL_PATH="$MODEL_PATH" DATA_PATH="$DATA_PATH" \
        bash "$script" "${SHORT[@]}" "$@"
}

stage stage1 scripts/train_pretraining.sh --max_samples 128 --train_batch_size 4 --learning_rate 1e-3
PRETRAIN_CKPT="$CHECKPOINT_ROOT/stage1" \
    stage stage1_2 scripts/train_instruction_tuning.sh --max_samples 36 --train_batch_size 2 --learning_rate 5e-4
PRETRAIN_CHECKPOINT="$CHECKPOINT_ROOT/stage1_2" \
    stage stage2 scripts/train_stage_end_to_end.sh --max_samples 120 --train_batch_size 4 --learning_rate 2e-5 \
    --eval_dataset "$EVAL_DATA/end_to_end_evaluation/example/eval_processed_with_pos.jsonl"

if [ "$MODEL_PATH" = .models/SmolLM2-135M-Instruct ]; then
    say "a small model after five hours of training (example/checkpoint), asked about ten invented documents"
    "$PYTHON" scripts/ask_fresh.py --checkpoint example/checkpoint --select 1
fi

say "what was learned in these minutes"
"$PYTHON" scripts/quickstart_report.py --root "$CHECKPOINT_ROOT" \
    --questions "$EVAL_DATA/end_to_end_evaluation/example/eval_processed_with_pos.jsonl"
