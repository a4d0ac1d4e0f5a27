#!/bin/bash
# Fill one store with one process per GPU of this machine (one process where there is none):
#
#   STORE=stores/l31-8b DATA=/data/fineweb bash pipelines/recipes/cache_one_box.sh
#
# Each process holds the whole host. WRITERS=2 sets their number. Ctrl-C stops all of them, an error
# on one ends all; the same command continues.
set -euo pipefail
: "${STORE:?set STORE to the folder of the store}"
: "${DATA:?set DATA to parquet files, a folder of them or a glob}"
GPUS=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)

exec torchrun --standalone --nproc_per_node "${WRITERS:-$((GPUS > 0 ? GPUS : 1))}" -m actcache run \
  host="${HOST:-llama-3.1-8b}" data=parquet data.files="$DATA" store="$STORE" \
  hooks=resid layers="${LAYERS:-[8,16,24]}" tokens="${TOKENS:-1_000_000_000}" \
  context="${CONTEXT:-1024}" "$@"
