#!/usr/bin/env bash
# Says documents again from their memory vectors: what compression keeps. EVAL_DATA may be a file of stage-1 records.
#   CHECKPOINT=checkpoints/my_stage1 EVAL_DATA=data/stage1_val.jsonl MAX_QUESTIONS=100 bash scripts/evaluation_pretraining.sh
# Flags of evaluation.evaluate may follow and win: --bertscore_model, --entity_model, --max_new_tokens, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
CHECKPOINT="${CHECKPOINT:-$CHECKPOINT_ROOT/clara_cluster2_2m_mix_stage1}"

evaluate pretraining "$@"
