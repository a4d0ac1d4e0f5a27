"""SAELens in its own environment, as a side of the benchmarks; needs no package of ours.

Only the work that is compared is timed: imports, loading the model and opening the data set come
before the clock.
"""

import hashlib
import logging
import shutil
import warnings
from pathlib import Path

from pipelines.bench import clock, private_stdout, serve

ANSWERS = private_stdout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig  # noqa: E402
from transformer_lens import loading_from_pretrained as loading  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def cache(
    host,
    model_class,
    ids,
    out,
    hook,
    d,
    tokens,
    context,
    batch_tokens,
    buffer_tokens,
    dtype,
    threads,
):
    """One run of the cache runner; tokens, times, bytes and a digest of the token ids.

    `ids` is a file with the packed token ids: the runner's own packing of text drops a separator
    where a document ends with a context, so it would cache other tokens.
    """
    torch.set_num_threads(threads)
    if host not in loading.OFFICIAL_MODEL_NAMES:  # HookedTransformer refuses a folder otherwise
        loading.OFFICIAL_MODEL_NAMES.append(host)
    shutil.rmtree(out, ignore_errors=True)
    size = {"float32": 4, "float16": 2}[dtype]
    cfg = CacheActivationsRunnerConfig(
        dataset_path=ids,  # a name only
        model_name=host,
        model_class_name=model_class,
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
    contexts = np.load(ids).astype(np.int64).reshape(-1, context)
    dataset = Dataset.from_dict({"input_ids": contexts})
    runner = CacheActivationsRunner(cfg, override_dataset=dataset)
    with clock() as times:
        found = runner.run()
    ids = found.with_format("numpy")["token_ids"][:].astype("<i4")
    return times | {
        "tokens": int(ids.size),
        "bytes": sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file()),
        "ids": hashlib.sha256(ids.tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    serve(ANSWERS, cache=cache)
