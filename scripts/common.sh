# shellcheck shell=bash
# Sourced by the scripts beside it: variables, the virtual environment, and how training and evaluation are launched.
# Variables come from the caller's environment, then from .env, then from the defaults below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A line is NAME=value, with `export` before it or not; of a value in quotes the quotes are no part, of another one a
# comment after white space is none.
if [ -f .env ]; then
    while IFS= read -r line || [ -n "$line" ]; do
        line="${line#$'\xef\xbb\xbf'}"
        line="${line%$'\r'}"
        [[ "$line" =~ ^[[:space:]]*(export[[:space:]]+)?([A-Za-z_][A-Za-z0-9_]*)[[:space:]]*=(.*)$ ]] || continue
        name="${BASH_REMATCH[2]}" value="${BASH_REMATCH[3]}"
        if [[ "$value" =~ ^[[:space:]]*\"([^\"]*)\"[[:space:]]*(#.*)?$ ]] ||
            [[ "$value" =~ ^[[:space:]]*\'([^\']*)\'[[:space:]]*(#.*)?$ ]]; then
            value="${BASH_REMATCH[1]}"
        elif [[ "${value%%[[:space:]]#*}" =~ ^[[:space:]]*(.*[^[:space:]])?[[:space:]]*$ ]]; then
            value="${BASH_REMATCH[1]}"
        fi
        [ -n "${!name+set}" ] || export "$name=$value"
    done < .env
fi

GIVEN_MODEL_PATH="${MODEL_PATH:-}"
GIVEN_DATA_PATH="${DATA_PATH:-}"
MODEL_PATH="${MODEL_PATH:-.models/SmolLM2-135M-Instruct}"
DATA_PATH="${DATA_PATH:-./example}"
CHECKPOINT_ROOT="${CHECKPOINT_ROOT:-./checkpoints}"
NUM_NODES="${NUM_NODES:-1}"
NODE_RANK="${NODE_RANK:-0}"
MASTER="${MASTER:-127.0.0.1}"
MASTER_PORT="${MASTER_PORT:-29500}"

say() { printf '\n== %s\n' "$*"; }

# The interpreter: the active environment's, else .venv's, else the system's.
find_python() {
    if [ -n "${VIRTUAL_ENV:-}" ] || [ -n "${CONDA_PREFIX:-}" ] || [ ! -x .venv/bin/python ]; then
        PYTHON="${PYTHON:-python3}"
    else
        PYTHON="${PYTHON:-.venv/bin/python}"
    fi
}

# Makes .venv where it is absent and installs what is pinned, once for each state of the requirement files.
make_venv() {
    if [ ! -x .venv/bin/python ]; then
        local base
        for base in python3.11 python3.12 python3.10 python3; do
            "$base" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2> /dev/null && break
            base=""
        done
        [ -n "$base" ] || { echo "Python 3.10, 3.11 or 3.12 is needed" >&2; exit 1; }
        say "making .venv with $("$base" --version)"
        "$base" -m venv .venv
    fi
    PYTHON=.venv/bin/python
    local stamp
    stamp="$(cat requirements.txt setup.py "$@" | cksum)"
    if [ "$(cat .venv/installed 2> /dev/null)" != "$stamp" ]; then
        say "installing the pinned packages into .venv (a few minutes the first time)"
        local options=(-r requirements.txt)
        for file in "$@"; do options+=(-r "$file"); done
        DS_BUILD_OPS=0 "$PYTHON" -m pip install --quiet --disable-pip-version-check "${options[@]}"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps -e .
        echo "$stamp" > .venv/installed
    fi
}

# Sets DEVICES, the GPUs that are there, NUM_LOCAL_GPUS, the processes to start, and where there is no GPU their threads
# and their allocator: glibc's heap fills with holes between tensors of many sizes and gets slower by the step, that of
# jemalloc does not. It is taken where it is installed and none is preloaded.
find_devices() {
    DEVICES="$( (nvidia-smi -L 2> /dev/null || true) | grep -c '^GPU' || true)"
    NUM_LOCAL_GPUS="${NUM_LOCAL_GPUS:-$((DEVICES > 0 ? DEVICES : 1))}"
    if [ "$DEVICES" = 0 ]; then
        export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(($(nproc) > NUM_LOCAL_GPUS ? $(nproc) / NUM_LOCAL_GPUS : 1))}"
        local jemalloc
        jemalloc="$( (PATH="$PATH:/sbin:/usr/sbin" ldconfig -p 2> /dev/null || true) |
            awk '/libjemalloc.so.2 / && !found { found = $NF } END { print found }')"
        [ -z "$jemalloc" ] || export LD_PRELOAD="${LD_PRELOAD:-$jemalloc}"
    fi
}

# train STAGE_ARGUMENTS…: one process for each device of this node, NUM_NODES nodes.
train() {
    find_python
    find_devices
    if [ "$MODEL_PATH" = .models/SmolLM2-135M-Instruct ] && [ ! -f "$MODEL_PATH/config.json" ]; then
        echo "no base model yet: python scripts/get_base_model.py makes $MODEL_PATH, or set MODEL_PATH" >&2
        exit 1
    fi
    if [ "$NUM_NODES" -gt 1 ] && [ "$MASTER" = 127.0.0.1 ]; then
        echo "NUM_NODES=$NUM_NODES needs MASTER, the address of node 0 that the other nodes reach" >&2
        exit 1
    fi
    local meeting=(--nnodes "$NUM_NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER" --master_port "$MASTER_PORT")
    [ "$NUM_NODES" -gt 1 ] || meeting=(--standalone)
    local launcher=(-m torch.distributed.run "${meeting[@]}" --nproc_per_node "$NUM_LOCAL_GPUS")
    [ "$NUM_NODES$NUM_LOCAL_GPUS" != 11 ] || launcher=()
    if [ "$NUM_NODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ]; then
        # Left alone, gloo (training without GPUs) listens where this node's name resolves to, often loopback.
        local towards_master='
import psutil, socket, sys
family, kind, protocol, _, master = socket.getaddrinfo(sys.argv[1], 9, type=socket.SOCK_DGRAM)[0]
with socket.socket(family, kind, protocol) as probe:
    probe.connect(master)  # sends nothing, only finds the way
    own = probe.getsockname()[0]
print(*[name for name, has in psutil.net_if_addrs().items() if own in [a.address for a in has] and name != "lo"][:1])'
        GLOO_SOCKET_IFNAME="$("$PYTHON" -c "$towards_master" "$MASTER" 2> /dev/null || true)"
        [ -z "$GLOO_SOCKET_IFNAME" ] || export GLOO_SOCKET_IFNAME
    fi
    [ "$NODE_RANK" = 0 ] || say "node 0 ($MASTER) writes the trained checkpoint and the figures, in its CHECKPOINT_ROOT"
    "$PYTHON" "${launcher[@]}" -m openrlhf.cli.train_sft --pretrain "$MODEL_PATH" --dataset "$DATA_PATH" \
        --save_path "$CHECKPOINT_ROOT/$SAVE_MODEL_NAME" --ckpt_path "$CHECKPOINT_ROOT/$SAVE_MODEL_NAME/checkpoints" "$@"
}

# evaluate SUITE FLAGS…: measures CHECKPOINT with one process for each device of this machine.
evaluate() {
    local suite="$1" flags=() launcher=()
    shift
    find_python
    find_devices
    if [ -z "${EVAL_DATA:-}" ]; then
        EVAL_DATA=./evaluation/evaluation_data
        [ -d "$EVAL_DATA" ] || EVAL_DATA=./example/evaluation_data
    fi
    RESULTS_DIR="${RESULTS_DIR:-./results/$(basename "$CHECKPOINT")/$suite}"
    [ -z "$GIVEN_MODEL_PATH" ] || flags+=(--model_path "$GIVEN_MODEL_PATH")
    [ -z "${DATASETS:-}" ] || flags+=(--datasets "$DATASETS")
    [ -z "${SETTING:-}" ] || flags+=(--setting "$SETTING")
    [ -z "${MAX_QUESTIONS:-}" ] || flags+=(--max_questions "$MAX_QUESTIONS")
    if [ -n "${TEXT_RAG_CHECKPOINT:-}" ] && [ "$suite" != pretraining ]; then
        flags+=(--text_rag_checkpoint "$TEXT_RAG_CHECKPOINT")
    fi
    if [ "$NUM_LOCAL_GPUS" -gt 1 ] && [ "$DEVICES" != 0 ]; then
        launcher=(-m accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes "$NUM_LOCAL_GPUS"
            --main_process_port "$MASTER_PORT" --mixed_precision no --dynamo_backend no)
    elif [ "$NUM_LOCAL_GPUS" -gt 1 ]; then # accelerate would start several CPU processes through MPI only
        launcher=(-m torch.distributed.run --standalone --nproc_per_node "$NUM_LOCAL_GPUS")
    fi
    "$PYTHON" "${launcher[@]}" -m evaluation.evaluate --suite "$suite" --checkpoint "$CHECKPOINT" \
        --eval_data "$EVAL_DATA" --output_dir "$RESULTS_DIR" "${flags[@]}" "$@"
}
