#!/usr/bin/env bash
# Answers from all documents of each question: a checkpoint of any stage beside the baselines.
#   CHECKPOINT=checkpoints/my_stage1_2 EVAL_DATA=data/evaluation DATASETS=nq,hotpotqa SETTING=normal bash scripts/evaluation_instruction_tuning.sh
# Flags of evaluation.evaluate may follow and win: --dense_model, --cross_encoder, --max_new_tokens, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
CHECKPOINT="${CHECKPOINT:-$CHECKPOINT_ROOT/clara_cluster1_2_2m_split_data_single_32_mistral}"

evaluate instruction_tuning "$@"
