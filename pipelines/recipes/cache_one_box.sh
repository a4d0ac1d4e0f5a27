#!/bin/bash
# Fill one store with one process per GPU of this machine (one process where there is none):
#
#   STORE=stores/l31-8b DATA=/data/fineweb bash pipelines/recipes/cache_one_box.sh
#
# WRITERS=2 sets the number of processes. Ctrl-C stops all of them; the same command continues.
set -euo pipefail
: "${STORE:?set STORE to the folder of the store}"
: "${DATA:?set DATA to parquet files, a folder of them or a glob}"
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
WRITERS=${WRITERS:-$((GPUS > 0 ? GPUS : 1))}

pids=()
trap 'kill -INT "${pids[@]}" 2>/dev/null' INT TERM
for ((i = 0; i < WRITERS; i++)); do
  CUDA_VISIBLE_DEVICES=$((GPUS > 0 ? i % GPUS : -1)) \
    actcache run host="${HOST:-llama-3.1-8b}" data=parquet data.files="$DATA" store="$STORE" \
    hooks=resid layers="${LAYERS:-[8,16,24]}" tokens="${TOKENS:-1_000_000_000}" \
    context="${CONTEXT:-1024}" progress=false "$@" &
  pids+=($!)
done
status=0
for pid in "${pids[@]}"; do
  wait "$pid" || status=$?
done
exit "$status"
