"""sparsify in its own environment, as a side of the benchmark of sweeps; needs no package of ours.

Its trainer captures while it trains, so eight configurations are eight runs over the same tokens,
each with its own forward passes. Imports, the host and the data set come before the clock.
"""

import logging
import os
import tempfile
import warnings

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would be taken on a CPU, too

from pipelines.bench import clock, private_stdout, serve

ANSWERS = private_stdout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from sparsify import SaeConfig, TrainConfig, Trainer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)


def sweep(host, ids, context, batch_tokens, layer, configs, threads):
    """Train all `configs`, (latents, k) each, with sparsify's defaults; tokens of one of them."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(host)
    contexts = np.load(ids).astype(np.int64).reshape(-1, context)
    data = Dataset.from_dict({"input_ids": contexts}).with_format("torch")
    with tempfile.TemporaryDirectory() as folder, clock() as times:
        for number, (latents, k) in enumerate(configs):
            cfg = TrainConfig(
                SaeConfig(num_latents=latents, k=k),
                batch_size=batch_tokens // context,
                hookpoints=[f"layers.{layer}"],
                log_to_wandb=False,
                save_dir=folder,
                run_name=str(number),
            )
            Trainer(cfg, data, model).fit()
    return times | {"tokens": contexts.size}


if __name__ == "__main__":
    serve(ANSWERS, sweep=sweep)
