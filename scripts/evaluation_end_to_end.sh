#!/usr/bin/env bash
# Selects among the candidates of each question and answers: a stage-2 checkpoint beside the baselines.
#   CHECKPOINT=checkpoints/my_stage2 EVAL_DATA=data/evaluation DATASETS=nq,hotpotqa SETTING=oracle MAX_QUESTIONS=100 bash scripts/evaluation_end_to_end.sh
# Flags of evaluation.evaluate may follow and win: --dense_model, --cross_encoder, --max_new_tokens, …
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
CHECKPOINT="${CHECKPOINT:-$CHECKPOINT_ROOT/clara_stage2_debug}"

evaluate end_to_end "$@"
