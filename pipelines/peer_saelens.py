"""SAELens in its own environment, for the benchmarks; imports nothing of ours.

Reads one JSON question a line and answers with one JSON line; whatever libraries print goes to
stderr. Only the work that is compared is timed: imports, loading the model and opening the data
set come before the clock.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import torch  # noqa: E402
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def cache(host, data, out, hook, d, tokens, context, batch_tokens, buffer_tokens, dtype, threads):
    """One run of the cache runner on local text; tokens, seconds, bytes and a digest of the ids."""
    torch.set_num_threads(threads)
    shutil.rmtree(out, ignore_errors=True)
    size = {"float32": 4, "float16": 2}[dtype]
    cfg = CacheActivationsRunnerConfig(
        dataset_path=data,
        model_name=host,
        model_class_name="AutoModelForCausalLM",
        model_batch_size=batch_tokens // context,
        hook_name=hook,
        d_in=d,
        training_tokens=tokens,
        context_size=context,
        new_cached_activations_path=out,
        dtype=dtype,
        device="cpu",
        # Whole batches up to this size are held in memory, then saved.
        buffer_size_gb=(buffer_tokens + 0.5) * d * size / 1e9,
        prepend_bos=False,
        shuffle=False,
    )
    runner = CacheActivationsRunner(cfg)
    started = time.perf_counter()
    found = runner.run()
    seconds = time.perf_counter() - started
    ids = found.with_format("numpy")["token_ids"][:].astype("<i4")
    return {
        "tokens": int(ids.size),
        "seconds": seconds,
        "bytes": sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file()),
        "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        question = json.loads(line)
        answer = {"cache": cache}[question.pop("do")](**question)
        print(json.dumps(answer), file=ANSWERS, flush=True)
