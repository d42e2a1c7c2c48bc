#!/usr/bin/env bash
# Stage 2: retrieval and answering trained together, from the checkpoint PRETRAIN_CHECKPOINT (the instruction-tuned one
# unless told otherwise; the paper also reports starting from stage 1).
#   PRETRAIN_CHECKPOINT=checkpoints/my_stage1 bash scripts/train_stage_end_to_end.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
SAVE_MODEL_NAME="${SAVE_MODEL_NAME:-clara_stage2_debug}"
PRETRAIN_CHECKPOINT="${PRETRAIN_CHECKPOINT:-$CHECKPOINT_ROOT/clara_cluster1_2_2m_split_data_single_32_mistral}"

train --stage stage2 --pretrain_checkpoint "$PRETRAIN_CHECKPOINT" --generation_top_k 5 \
    --doc_max_length 256 --compress_rate 32 --max_len 1024 \
    --train_batch_size 32 --micro_train_batch_size 2 --learning_rate 5e-6 --max_epochs 1 \
    --bf16 --gradient_checkpointing --flash_attn --save_steps 200 "$@"
