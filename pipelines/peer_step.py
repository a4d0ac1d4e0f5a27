"""One training step of another tool, as a side of the benchmark of steps; needs no package of ours.

SAELens and dictionary_learning are driven through their own trainers. sparsify's trainer only runs
inside a language model, so its loop around the step is written out: renormalise, forward, backward,
project, optimizer, schedule, zero. Optimizers, losses and dead-latent handling are their defaults.
"""

import logging
import os
import sys
import types
import warnings

os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # it would be taken on a CPU, too

from pipelines.bench import clock, private_stdout, serve

ANSWERS = private_stdout()

import numpy as np  # noqa: E402
import torch  # noqa: E402

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
STEPS = 100_000  # that schedules are laid out for, where a tool asks; speed is taken at the start


class Saelens:
    """SAETrainer.step, as SAETrainer.fit calls it."""

    def __init__(self, d, n_latents, k, batch, lr, steps):
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=n_latents, k=k))
        own = {} if lr is None else {"lr": lr}
        cfg = SAETrainerConfig(
            total_training_samples=steps * batch, train_batch_size_samples=batch, **own
        )
        cfg.lr_end = cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end  # as its runner does
        self.trainer = SAETrainer(cfg, self.sae, iter(()))

    def step(self, x):
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def reconstruct(self, x):
        return self.sae(x)


class DictionaryLearning:
    """TopKTrainer.update."""

    def __init__(self, d, n_latents, k, batch, lr, steps):
        if "nnsight" not in sys.modules:  # its activation buffer needs it, its trainers do not
            sys.modules["nnsight"] = types.SimpleNamespace(LanguageModel=None)
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.trainer = TopKTrainer(
            steps=steps,
            activation_dim=d,
            dict_size=n_latents,
            k=k,
            layer=0,
            lm_name="none",
            lr=lr,
            warmup_steps=min(1000, steps // 10),
            device="cpu",
            seed=0,
        )
        self.done = 0

    def step(self, x):
        self.trainer.update(self.done, x)
        self.done += 1

    def reconstruct(self, x):
        return self.trainer.ae(x)


class Sparsify:
    """SparseCoder in the loop of sparsify's trainer, with its default optimizer."""

    def __init__(self, d, n_latents, k, batch, lr, steps):
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        self.sae = SparseCoder(d, SparseCoderConfig(num_latents=n_latents, k=k))
        rate = lr or 5e-3 / (n_latents / 2**14) ** 0.5
        self.optimizer = ScheduleFreeWrapper(SignSGD(self.sae.parameters(), lr=rate), momentum=0.95)
        self.optimizer.train()
        self.first = True

    def step(self, x):
        if self.first:
            self.sae.b_dec.data = x.mean(0)
            self.first = False
        self.sae.set_decoder_norm_to_unit_norm()
        out = self.sae(x=x, y=x, dead_mask=None, total_variance=None)
        float(out.fvu.detach())  # it logs every step
        (out.fvu + out.multi_topk_fvu / 8).backward()
        self.sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def reconstruct(self, x):
        self.optimizer.eval()
        out = self.sae(x).sae_out
        self.optimizer.train()
        return out


PEERS = {
    "saelens": Saelens,
    "dictionary_learning": DictionaryLearning,
    "sparsify": Sparsify,
}
STATE = {}


def make(peer, rows, threads, d, n_latents, k, batch, lr=None, steps=STEPS):
    """A trainer at its first step, and the file its batches are cut from, again and again."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    batches = torch.from_numpy(np.load(rows)).split(batch)
    STATE.update(
        tool=PEERS[peer](d=d, n_latents=n_latents, k=k, batch=batch, lr=lr, steps=steps),
        batches=batches,
        done=0,
    )
    return {}


def train(steps):
    """So many steps."""
    tokens = 0
    with clock() as times:
        for _ in range(steps):
            x = STATE["batches"][STATE["done"] % len(STATE["batches"])]
            STATE["tool"].step(x)
            STATE["done"] += 1
            tokens += len(x)
    return times | {"tokens": tokens}


def fve(rows):
    """1 - Σ||x - x̂||² / Σ||x - mean||² on other rows."""
    x = torch.from_numpy(np.load(rows))
    with torch.no_grad():
        error = (x - STATE["tool"].reconstruct(x)).double().square().sum()
    return {"fve": 1 - float(error / (x - x.mean(0)).double().square().sum())}


if __name__ == "__main__":
    serve(ANSWERS, make=make, train=train, fve=fve)
