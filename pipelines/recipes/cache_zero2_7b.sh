#!/bin/bash
# Qwen2.5-VL-7B's language side on the GPUs of one machine, through accelerate and ZeRO stage 2:
#
#   STORE=stores/qwen7b DATA=/data/fineweb bash pipelines/recipes/cache_zero2_7b.sh
#
# For caching, stage 2 is plain replicas: there is nothing for it to split (accelerate/zero2.yaml).
# A 7B host takes 15 GB per GPU in bfloat16.
set -euo pipefail
: "${STORE:?set STORE to the folder of the store}"
: "${DATA:?set DATA to parquet files, a folder of them or a glob}"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

exec accelerate launch --config_file "$HERE/accelerate/zero2.yaml" \
  --num_processes "${GPUS:-8}" --main_process_port "${PORT:-29500}" -m actcache run \
  host="${HOST:-qwen2.5-vl-7b}" data=parquet data.files="$DATA" store="$STORE" \
  hooks=mlp layers="${LAYERS:-[24]}" tokens="${TOKENS:-100_000_000}" \
  context="${CONTEXT:-1024}" "$@"
