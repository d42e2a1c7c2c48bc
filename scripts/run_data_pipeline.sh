#!/usr/bin/env bash
# From a folder of documents to training data: extraction, vision, synthesis, assembly. Start it again after an
# interruption, or with more documents, and only what is missing is done. DATA_PIPELINE_GUIDE.md has the variables.
#   RAW_DATA_DIR=./documents MODEL=gpt-4o-mini bash scripts/run_data_pipeline.sh [--dry_run] [--ray]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

DRY_RUN=""
for argument in "$@"; do
    case "$argument" in
        --dry_run) DRY_RUN=1 ;;
        --ray) RAY=1 ;;
        *)
            echo "run_data_pipeline: $argument is not known; there are --dry_run and --ray, all else is a variable" >&2
            exit 2
            ;;
    esac
done
RAW_DATA_DIR="${RAW_DATA_DIR:-}"
OUTPUT_DIR="${OUTPUT_DIR:-${GIVEN_DATA_PATH:-./data}}"
OUTPUT_DIR="${OUTPUT_DIR%/}"
DOC_MAX_LENGTH="${DOC_MAX_LENGTH:-256}"
RAY="${RAY:-0}"
find_python
PYTHON="${PIPELINE_PYTHON:-$PYTHON}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
KINDS=(pdf docx pptx html htm xhtml md markdown xlsx txt text png jpg jpeg)

# What is under RAW_DATA_DIR, such as " 2 docx, 7 pdf"; nothing where there is no document.
documents() {
    local kinds
    kinds="$(IFS='|' && echo "${KINDS[*]}")"
    # What cannot be listed is named by the extraction; links may lead to files.
    { find -H "$RAW_DATA_DIR" \( -type f -o -type l \) 2> /dev/null || true; } |
        sed -nE 's/.*\.([^./]+)$/\1/p' | tr '[:upper:]' '[:lower:]' |
        { grep -xE "$kinds" || true; } | sort | uniq -c | awk '{ printf "%s %d %s", comma, $1, $2; comma = "," }'
}

# Where the language model is, without what may stand before @.
server() { sed -E 's#//[^/@]*@#//#' <<< "${BASE_URL:-https://api.openai.com/v1}"; }

PROBLEMS=()
problem() { PROBLEMS+=("$*"); }

check_documents() {
    FOUND=""
    if [ -z "$RAW_DATA_DIR" ]; then
        problem "RAW_DATA_DIR is not set: give the folder with your documents"
        return
    elif [ ! -d "$RAW_DATA_DIR" ]; then
        problem "RAW_DATA_DIR: $RAW_DATA_DIR is no folder"
        return
    fi
    FOUND="$(documents)"
    [ -n "$FOUND" ] || problem "RAW_DATA_DIR: $RAW_DATA_DIR has no document (${KINDS[*]})"
    case "$(realpath -m "$OUTPUT_DIR")/" in
        "$(realpath -m "$RAW_DATA_DIR")"/*)
            problem "OUTPUT_DIR: $OUTPUT_DIR lies in RAW_DATA_DIR, so that results would be read as documents: choose another"
            ;;
    esac
    if [ -e "$OUTPUT_DIR" ] && [ ! -d "$OUTPUT_DIR" ]; then
        problem "OUTPUT_DIR: $OUTPUT_DIR is no folder"
    fi
}

check_packages() {
    local missing
    if ! command -v "$PYTHON" > /dev/null; then
        problem "$PYTHON is not there: set PIPELINE_PYTHON to the Python of your environment"
        return
    fi
    missing="$("$PYTHON" - "${VISION_MODEL:-}" "$RAY" << 'PYTHON'
import importlib.util, sys
wanted = ["docling", "transformers", "datasets", "openai", "bm25s", "filelock"]
wanted += ["rapidocr"] * (sys.argv[1] == "rapidocr") + ["ray"] * (sys.argv[2] == "1")
print(*[name for name in wanted if importlib.util.find_spec(name) is None])
PYTHON
    )"
    [ -z "$missing" ] || problem "$PYTHON lacks $missing: $PYTHON -m pip install -e '.[pipeline]', or set PIPELINE_PYTHON to an environment that has them"
}

check_tokenizer() {
    if [ -d "$MODEL_PATH" ]; then
        [ -f "$MODEL_PATH/tokenizer.json" ] || [ -f "$MODEL_PATH/tokenizer_config.json" ] ||
            problem "MODEL_PATH: $MODEL_PATH holds no tokenizer; chunks are measured with it"
    elif [ -z "$GIVEN_MODEL_PATH" ]; then
        problem "MODEL_PATH is not set and $MODEL_PATH is not there: python scripts/get_base_model.py makes it"
    elif [[ ! "$MODEL_PATH" =~ ^[A-Za-z0-9_-][A-Za-z0-9._-]*/[A-Za-z0-9._-]+$ ]]; then
        problem "MODEL_PATH: $MODEL_PATH is neither a model's directory nor a Hub id ORGANISATION/NAME"
    fi
}

check_endpoint() {
    [ -n "${MODEL:-}" ] || problem "MODEL is not set: give the name of the language model that writes questions and answers"
    [ -n "${OPENAI_API_KEY:-}${BASE_URL:-}" ] ||
        problem "OPENAI_API_KEY is not set: export it or write it into .env, or set BASE_URL to a server that needs none"
}

# Asks the server once, by a trifle, before a long extraction; not where its work has been done before.
check_server() {
    local said
    if [ "${#PROBLEMS[@]}" != 0 ] || [ -f "$OUTPUT_DIR/synthesized.jsonl" ]; then
        return
    fi
    said="$("$PYTHON" - "$MODEL" << 'PYTHON' 2>&1
import logging, sys
from openrlhf.pipeline.endpoint import Endpoint
logging.disable(logging.WARNING)
try:
    Endpoint(sys.argv[1], timeout=60, retries=2).probe()
except (ValueError, OSError) as error:
    sys.exit(str(error))
PYTHON
    )" || problem "$said"
}

plan() {
    say "plan"
    cat << PLAN
documents   ${RAW_DATA_DIR:-(not set)}:${FOUND:- none}
results     $OUTPUT_DIR
tokenizer   $MODEL_PATH, chunks of at most $DOC_MAX_LENGTH tokens
1 extract   scripts/extract_with_docling.py
2 vision    ${VISION_MODEL:-skipped, VISION_MODEL is not set}
3 synthesis ${MODEL:-(MODEL is not set)} at $(server), languages ${LANGUAGES:-as in the documents}, chunks ${MAX_CHUNKS:-all}
4 assembly  training files, held-out evaluation files, quality report
where       $([ "$RAY" = 1 ] && echo "Ray at ${RAY_ADDRESS:-this machine}" || echo "this machine")
PLAN
}

check_documents
check_packages
check_tokenizer
check_endpoint
plan
[ -n "$DRY_RUN" ] || check_server
if [ "${#PROBLEMS[@]}" != 0 ]; then
    printf '\nrun_data_pipeline: nothing was done, because\n' >&2
    printf -- '- %s\n' "${PROBLEMS[@]}" >&2
    exit 2
fi

STATE="$OUTPUT_DIR/pipeline_state.sqlite"
ON_RAY=()
[ "$RAY" != 1 ] || ON_RAY=(--ray)
EXTRACT=("$PYTHON" scripts/extract_with_docling.py --input_dir "$RAW_DATA_DIR"
    --output_file "$OUTPUT_DIR/raw_knowledge.jsonl" --tokenizer "$MODEL_PATH" --doc_max_length "$DOC_MAX_LENGTH"
    --state "$STATE" "${ON_RAY[@]}")
VISION=("$PYTHON" scripts/extract_images.py --input_dir "$RAW_DATA_DIR" --model "${VISION_MODEL:-}"
    --output_file "$OUTPUT_DIR/raw_knowledge.jsonl" --state "$STATE" "${ON_RAY[@]}")
SYNTHESIZE=("$PYTHON" scripts/synthesize_data.py --input_file "$OUTPUT_DIR/raw_knowledge.jsonl"
    --output_dir "$OUTPUT_DIR" --model "${MODEL:-}" --state "$STATE" "${ON_RAY[@]}")
[ -z "${LANGUAGES:-}" ] || SYNTHESIZE+=(--languages "$LANGUAGES")
[ -z "${MAX_CHUNKS:-}" ] || SYNTHESIZE+=(--max_chunks "$MAX_CHUNKS")
[ -z "${ROUNDS:-}" ] || SYNTHESIZE+=(--rounds "$ROUNDS")
[ -z "${CONCURRENCY:-}" ] || SYNTHESIZE+=(--concurrency "$CONCURRENCY")
ASSEMBLE=("$PYTHON" scripts/assemble_data.py --input_dir "$OUTPUT_DIR" --tokenizer "$MODEL_PATH" --state "$STATE")
[ -z "${EMBEDDING_MODEL:-}" ] || ASSEMBLE+=(--embedding_model "$EMBEDDING_MODEL")

if [ -n "$DRY_RUN" ]; then
    if [ -f "$OUTPUT_DIR/raw_knowledge.jsonl" ]; then
        say "estimate of the synthesis, from the chunks that are there"
        "${SYNTHESIZE[@]}" --dry_run
    else
        echo "the cost of the synthesis can be told once documents are extracted"
    fi
    exit 0
fi

mkdir -p "$OUTPUT_DIR"
trap 'printf "\nrun_data_pipeline: stopped; what was done is kept, and the same command goes on from there\n" >&2' ERR
say "1 of 4: extraction"
"${EXTRACT[@]}"
say "2 of 4: vision (${VISION_MODEL:-skipped})"
"${VISION[@]}"
say "3 of 4: synthesis ($MODEL)"
"${SYNTHESIZE[@]}"
say "4 of 4: assembly"
"${ASSEMBLE[@]}"

say "done"
"$PYTHON" - "$OUTPUT_DIR/synthesis_report.json" << 'PYTHON'
import json, sys
failed = json.load(open(sys.argv[1], encoding="utf-8")).get("failed", [])
if failed:
    print(f"{len(failed)} chunks have no usable reply yet; the same command asks for them again")
PYTHON
cat << NEXT
training data   $OUTPUT_DIR/{pretrain,instruction,end_to_end}_data.jsonl
everything      $OUTPUT_DIR/clara_training_data.jsonl, with sources
held out        $OUTPUT_DIR/eval (for --eval_dataset), $OUTPUT_DIR/evaluation_data (for EVAL_DATA)
quality report  $OUTPUT_DIR/quality_report.html
Train on it:
  export MODEL_PATH=$MODEL_PATH DATA_PATH=$OUTPUT_DIR
  bash scripts/train_pretraining.sh
  bash scripts/train_instruction_tuning.sh
  bash scripts/train_stage_end_to_end.sh
NEXT
