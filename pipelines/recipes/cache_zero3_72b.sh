#!/bin/bash
# Qwen2.5-VL-72B's language side on 8 GPUs of 80 GB, its weights split by ZeRO stage 3:
#
#   STORE=stores/qwen72b DATA=/data/fineweb bash pipelines/recipes/cache_zero3_72b.sh
#
# Needs pip install 'actcache-saetrain[zero3]'. Blocks above the deepest of LAYERS are not loaded.
# Each pass moves all loaded weights to every GPU, so host.batch_tokens should be as large as memory
# allows. Tested with tiny hosts on CPUs; nobody has run it at this size yet.
set -euo pipefail
: "${STORE:?set STORE to the folder of the store}"
: "${DATA:?set DATA to parquet files, a folder of them or a glob}"
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

exec accelerate launch --config_file "$HERE/accelerate/zero3.yaml" \
  --num_processes "${GPUS:-8}" --main_process_port "${PORT:-29500}" -m actcache run \
  host="${HOST:-qwen2.5-vl-72b}" host.sharding=zero3 host.batch_tokens=16_384 \
  data=parquet data.files="$DATA" store="$STORE" \
  hooks=mlp layers="${LAYERS:-[32]}" tokens="${TOKENS:-100_000_000}" \
  context="${CONTEXT:-1024}" "$@"
