#!/usr/bin/env bash
# Stage 1: compression pretraining on QA sets and paraphrases. Any flag of train_sft may follow.
#   MODEL_PATH=mistralai/Mistral-7B-Instruct-v0.2 DATA_PATH=data/train bash scripts/train_pretraining.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SAVE_MODEL_NAME="${SAVE_MODEL_NAME:-clara_cluster2_2m_mix_stage1}"

train --stage stage1 --mse_loss --qa_loss \
    --doc_max_length 256 --compress_rate 32 --max_len 2048 \
    --train_batch_size 128 --micro_train_batch_size 2 --learning_rate 1e-4 --max_epochs 1 \
    --bf16 --gradient_checkpointing --flash_attn --save_steps 500 "$@"
