"""SAELens' loader of cached activations, in its own environment, as a side of bench_stream."""

import logging
import warnings

from pipelines.bench import clock, private_stdout, serve

ANSWERS = private_stdout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Array2D, Dataset, Features, Sequence, Value  # noqa: E402
from sae_lens.training.activations_store import ActivationsStore  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
HOOK = "hook"
STORES = {}


def write(rows, out, context):
    """Rows (n, d) as the data set that its cache runner saves: contexts of float32, token ids."""
    x = np.load(rows, mmap_mode="r")
    d = x.shape[1]
    features = Features(
        {HOOK: Array2D((context, d), "float32"), "token_ids": Sequence(Value("int32"), context)}
    )

    def contexts():
        for first in range(0, len(x) // context * context, context):
            part = x[first : first + context].astype(np.float32)
            yield {HOOK: part, "token_ids": np.ones(context, np.int32)}

    made = Dataset.from_generator(contexts, features=features, cache_dir=f"{out}.tmp")
    made.save_to_disk(out)
    return {"rows": len(made) * context}


def read(out, rows, batch, threads):
    """Batches, from where the last turn stopped."""
    torch.set_num_threads(threads)
    store = STORES.get(out) or STORES.setdefault(out, open_store(out, batch))
    done = 0
    with clock() as times:
        while done < rows:
            done += len(next(store))
    return times | {"tokens": done}


def open_store(out, batch):
    """Its defaults where it has any: half of a buffer of 20 model batches is kept for mixing."""
    found = Dataset.load_from_disk(out)
    context, d = np.asarray(found[0][HOOK]).shape
    return ActivationsStore(
        model=None,
        dataset=None,
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=context,
        d_in=d,
        n_batches_in_buffer=20 * 16,
        total_training_tokens=1 << 30,
        store_batch_size_prompts=16,
        train_batch_size_tokens=batch,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=out,
    )


if __name__ == "__main__":
    serve(ANSWERS, write=write, read=read)
