#!/bin/bash
# As cache_zero3_72b.sh, but the weights are split by torch's fully_shard: no DeepSpeed needed, and
# each process reads only its slice of the weights.
#
#   STORE=stores/qwen72b DATA=/data/fineweb bash pipelines/recipes/cache_fsdp2_72b.sh
#
# Both give the same store and may continue each other's. Tested with tiny hosts on CPUs; nobody has
# run it at this size yet.
set -euo pipefail
: "${STORE:?set STORE to the folder of the store}"
: "${DATA:?set DATA to parquet files, a folder of them or a glob}"

exec torchrun --standalone --nproc_per_node "${GPUS:-8}" -m actcache run \
  host="${HOST:-qwen2.5-vl-72b}" host.sharding=fsdp2 host.batch_tokens=16_384 \
  data=parquet data.files="$DATA" store="$STORE" \
  hooks=mlp layers="${LAYERS:-[32]}" tokens="${TOKENS:-100_000_000}" \
  context="${CONTEXT:-1024}" "$@"
