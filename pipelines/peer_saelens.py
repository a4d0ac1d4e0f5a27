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
    host, model_class, ids, out, hooks, d, tokens, context, batch_tokens, buffer_tokens, dtype,
    threads,
):  # fmt: skip
    """A run of the cache runner for each hook; tokens, times, bytes, a digest of the token ids.

    `ids` is a file with the packed token ids: the runner's own packing of text drops a separator
    where a document ends with a context, so it would cache other tokens.
    """
    torch.set_num_threads(threads)
    if host not in loading.OFFICIAL_MODEL_NAMES:  # HookedTransformer refuses a folder otherwise
        loading.OFFICIAL_MODEL_NAMES.append(host)
    shutil.rmtree(out, ignore_errors=True)
    size = {"float32": 4, "float16": 2}[dtype]
    contexts = np.load(ids)[:tokens].astype(np.int64).reshape(-1, context)
    runners = []
    for number, hook in enumerate(hooks):
        cfg = CacheActivationsRunnerConfig(
            dataset_path=ids,  # a name only
            model_name=host,
            model_class_name=model_class,
            model_batch_size=batch_tokens // context,
            hook_name=hook,
            d_in=d,
            training_tokens=tokens,
            context_size=context,
            new_cached_activations_path=f"{out}/{number}",
            dtype=dtype,
            device="cpu",
            # Whole batches up to this size are held in memory, then saved.
            buffer_size_gb=(buffer_tokens + 0.5) * d * size / 1e9,
            prepend_bos=False,
            shuffle=False,
        )
        dataset = Dataset.from_dict({"input_ids": contexts})
        runners.append(CacheActivationsRunner(cfg, override_dataset=dataset))
    with clock() as times:
        found = [runner.run() for runner in runners]
    ids = [f.with_format("numpy")["token_ids"][:].astype("<i4") for f in found]
    if any((other != ids[0]).any() for other in ids):
        raise RuntimeError("its runs cached different tokens")
    return times | {
        "tokens": int(ids[0].size),
        "bytes": sum(f.stat().st_size for f in Path(out).rglob("*") if f.is_file()),
        "ids": hashlib.sha256(ids[0].tobytes()).hexdigest(),
    }


if __name__ == "__main__":
    serve(ANSWERS, cache=cache)
