"""SAELens and sparsify train SAEs on given rows, in their own environment: for compare_saes.

Each with its own trainer (sparsify's, which is tied to a host, is its loop around SparseCoder) and
its own defaults, but for width, batch, rows, and the learning rate that the question names.
"""

import logging
import warnings
from itertools import count

from pipelines.bench import private_stdout, serve

ANSWERS = private_stdout()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from sae_lens import saes as lens  # noqa: E402
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from sparsify import SparseCoder, SparseCoderConfig  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
CONFIGS = {
    "vanilla": (lens.StandardTrainingSAEConfig, lens.StandardTrainingSAE, "l1_coefficient"),
    "gated": (lens.GatedTrainingSAEConfig, lens.GatedTrainingSAE, "l1_coefficient"),
    "jumprelu": (lens.JumpReLUTrainingSAEConfig, lens.JumpReLUTrainingSAE, "l0_coefficient"),
    "topk": (lens.TopKTrainingSAEConfig, lens.TopKTrainingSAE, "k"),
    "batchtopk": (lens.BatchTopKTrainingSAEConfig, lens.BatchTopKTrainingSAE, "k"),
    "matryoshka": (
        lens.MatryoshkaBatchTopKTrainingSAEConfig,
        lens.MatryoshkaBatchTopKTrainingSAE,
        "k",
    ),
}


def saelens(arch, train, held_out, batch, n_latents, number, lr, widths, threads):
    """One SAE; `number` is k or the coefficient of the penalty."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(train))
    config, kind, name = CONFIGS[arch]
    fields = {"d_in": rows.shape[1], "d_sae": n_latents, name: number}
    if arch == "matryoshka":
        fields["matryoshka_widths"] = widths
    sae = kind(config(**fields, dtype="float32", device="cpu"))
    steps = len(rows) // batch
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr,
            dead_feature_window=max(1, steps // 10),
            feature_sampling_window=max(2, steps // 5),
        ),
        sae,
        (rows[i % steps * batch : (i % steps + 1) * batch] for i in count()),
    )
    trainer.fit()
    sae.eval()
    return score(lambda x: code_and_rows(sae, x), np.load(held_out), batch)


def code_and_rows(sae, x):
    """(codes, reconstruction) of a training SAE; batchtopk picks over the batch it is given."""
    codes = sae.encode(x)
    return codes, sae.decode(codes)


def sparsify(train, held_out, batch, n_latents, k, lr, alpha, threads):
    """TopK with the loop of its trainer: signum made schedule-free, unit decoder rows, AuxK."""
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    rows = torch.from_numpy(np.load(train))
    sae = SparseCoder(rows.shape[1], SparseCoderConfig(num_latents=n_latents, k=k))
    sae.b_dec.data = rows[:batch].mean(0)
    lr = lr or 5e-3 / (n_latents / 2**14) ** 0.5  # its default
    optimizer = ScheduleFreeWrapper(SignSGD(list(sae.parameters()), lr=lr), momentum=0.95)
    optimizer.train()
    since = torch.zeros(n_latents, dtype=torch.long)
    steps = len(rows) // batch
    for step in range(steps):
        x = rows[step * batch : (step + 1) * batch]
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x, dead_mask=since > steps // 10 * batch if alpha else None)
        (out.fvu + alpha * out.auxk_loss).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        since += batch
        since[out.latent_indices.unique()] = 0
    optimizer.eval()
    sae.set_decoder_norm_to_unit_norm()

    def both(x):
        found = sae.encode(x)
        codes = torch.zeros(len(x), n_latents).scatter_(1, found.top_indices, found.top_acts)
        return codes, sae.decode(found.top_acts, found.top_indices)

    return score(both, np.load(held_out), batch)


@torch.no_grad()
def score(both, rows, batch):
    """FVE = 1 - sum |x - x̂|² / sum |x - mean|² and mean L0 over all held-out rows."""
    lost = fired = 0.0
    alive = None
    for first in range(0, len(rows), batch):
        x = torch.from_numpy(rows[first : first + batch])
        codes, back = both(x)
        lost += float((x - back).double().square().sum())
        fired += float((codes > 0).sum())
        some = (codes > 0).any(0)
        alive = some if alive is None else alive | some
    total = float(np.square(rows - rows.mean(0, dtype=np.float64)).sum())
    return {
        "fve": 1 - lost / total,
        "l0": fired / len(rows),
        "dead": 1 - float(alive.float().mean()),
    }


if __name__ == "__main__":
    serve(ANSWERS, saelens=saelens, sparsify=sparsify)
