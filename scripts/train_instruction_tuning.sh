#!/usr/bin/env bash
# Stage 1_2: instruction tuning on questions over K documents, from the stage-1 checkpoint PRETRAIN_CKPT.
#   PRETRAIN_CKPT=checkpoints/my_stage1 bash scripts/train_instruction_tuning.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SAVE_MODEL_NAME="${SAVE_MODEL_NAME:-clara_cluster1_2_2m_split_data_single_32_mistral}"
PRETRAIN_CKPT="${PRETRAIN_CKPT:-$CHECKPOINT_ROOT/clara_cluster2_2m_mix_stage1}"

train --stage stage1_2 --pretrain_checkpoint "$PRETRAIN_CKPT" --mse_loss --generation_top_k 5 \
    --doc_max_length 256 --compress_rate 32 --max_len 2048 \
    --train_batch_size 128 --micro_train_batch_size 2 --learning_rate 1e-4 --max_epochs 1 \
    --bf16 --gradient_checkpointing --flash_attn --save_steps 500 "$@"
