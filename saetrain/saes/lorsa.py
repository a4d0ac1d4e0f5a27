"""Lorsa, low-rank sparse attention: an attention layer as many heads of rank 1, few of which act on
a token (He et al. 2025, arXiv 2504.20938). It reads the layer's input and predicts its output
(`sae.hook_out`), so a latent says what was moved from where: a value direction w_V on the row that
is read, an output direction w_O on the row that reads, and an attention pattern between the two,
shared by `heads_per_qk` heads.

q, k = x' W_Q + b_Q, x' W_K + b_K  (rotary where rotary_base is given),  v_i = x' · w_V,i
A_ts = softmax over s ≤ t of q_t · k_s / √d_qk,  h_i(t) = Σ_s A_ts v_i(s) + b_V,i
f = act(h),  ŷ' = f W_dec + b_dec,  loss = reconstruction(y' - ŷ') + penalty(f) + auxk

Rows of W_dec are w_O. Parts are those of all architectures: the activation sees h_i ||w_O,i||, as
in the paper, whose choice is topk. Input and output have units of their own (`saetrain.linked`).
Contexts are read whole; rows that are not there (padding, held-out documents) are not attended to,
and only rows that count enter the losses. `init_subspace=r` starts the output directions inside the
r leading directions of the first batch's outputs, which is where attention writes; elsewhere they
would be dead (Wang et al. 2025, arXiv 2508.16929). Cost of a step on S contexts of T rows with G
patterns: 12 S T D (F + 2 G d_qk) operations and the G S T² entries of the patterns.

Shapes: S contexts, T rows, N rows that count, D and E widths of input and output, F heads
(latents), G = F / heads_per_qk patterns, Q = d_qk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from saetrain import init
from saetrain.artefact import ArtefactError, Description, Inference, register_kind
from saetrain.attention import QK, attend, pattern
from saetrain.codes import Codes, decode_codes
from saetrain.dictionary import DictionaryConfig, Picked, Weights
from saetrain.errors import ConfigError
from saetrain.fold import describe, fold_linked
from saetrain.linked import Linked, LinkedConfig
from saetrain.progress import Progress
from saetrain.saes.base import HookSpace, Losses, register
from saetrain.units import DOCUMENT, MASK, PRESENT


@dataclass(frozen=True, kw_only=True)
class LorsaConfig(LinkedConfig):
    heads_per_qk: int = 64  # heads that share one attention pattern
    d_qk: int = 64  # width of queries and keys
    rotary_base: float | None = 10_000.0  # None: attention does not see positions
    init_subspace: int | None = None  # leading directions of the outputs; None: all of them

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads_per_qk", "d_qk", "init_subspace"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"sae.{name}: expected at least 1, got {value}")
        if self.rotary_base is not None and (self.d_qk % 2 or not self.rotary_base > 1):
            raise ConfigError(
                f"sae.rotary_base={self.rotary_base} with sae.d_qk={self.d_qk}: rotary positions "
                "need a base above 1 and an even d_qk. sae.rotary_base=null goes without"
            )
        if self.resample_every is not None:
            raise ConfigError(
                f"sae.resample_every={self.resample_every} with sae.name=lorsa: what a dead head "
                "should attend to cannot be read from one row. Set it to null; sae.auxk_alpha "
                "revives dead heads"
            )
        if self.n_latents is not None:
            self.patterns(self.n_latents)

    def hooks(self, hook: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """ConfigError unless `hook_out` is another hook."""
        if self.hook_out in (None, hook):
            raise ConfigError(
                f"sae.hook_out={self.hook_out or 'null'}: sae.name=lorsa reads what an attention "
                f"layer reads (hook={hook}) and predicts what it adds. Name that hook, such as "
                "sae.hook_out=attn.2"
            )
        return (hook,), (str(self.hook_out),)

    def patterns(self, n_latents: int) -> int:
        """G. ConfigError if the heads cannot be shared out."""
        if n_latents % self.heads_per_qk:
            raise ConfigError(
                f"sae.heads_per_qk={self.heads_per_qk} does not divide sae.n_latents={n_latents}: "
                "each attention pattern serves equally many heads"
            )
        return n_latents // self.heads_per_qk


@register("lorsa", LorsaConfig)
class Lorsa(Linked):
    """Sparse heads of rank 1 that replace an attention layer; reads whole contexts."""

    unit = "sequence"
    cfg: LorsaConfig
    W_Q: Tensor  # (G, D, Q), as W_K; b_Q, b_K (G, Q)
    b_Q: Tensor
    W_K: Tensor
    b_K: Tensor

    def _words(self) -> tuple[str, str]:
        return "hook", "sae.hook_out"

    def _check_hooks(self, cfg: DictionaryConfig, spaces: Mapping[str, HookSpace]) -> None:
        if len(spaces) != 2:
            raise ConfigError(
                f"sae.name=lorsa reads one hook and predicts one (sae.hook_out), got {len(spaces)}:"
                f" {', '.join(spaces)}"
            )
        super()._check_hooks(cfg, spaces)

    def _make_units(self, spaces: Mapping[str, HookSpace]) -> None:
        """Also queries and keys: scores vary by about 1 at the start."""
        super()._make_units(spaces)
        self._mean_output = self.standard_outputs(spaces[self.hooks_out[0]].mean)
        groups, width = self.cfg.patterns(self.n_latents), self.cfg.d_qk
        for name in "QK":
            start = torch.randn(groups, self.d_in, width) / self.in_variance.sqrt()
            self.register_parameter(f"W_{name}", nn.Parameter(start))
            self.register_parameter(f"b_{name}", nn.Parameter(torch.zeros(groups, width)))

    def _make_weights(self, mean_D: Tensor) -> None:
        cfg, (rows, norm) = self.cfg, self._start_norms()
        self.W_dec = nn.Parameter(init.random_rows(self.n_latents, self.d_out, rows))
        W_V = init.transposed(self.W_dec)
        if cfg.init_encoder == "random":
            W_V = init.transposed(init.random_rows(self.n_latents, self.d_in, rows))
        elif self.d_in != self.d_out:
            raise ConfigError(
                f"sae.init_encoder=tied needs equal widths, and {self.hooks_in[0]} has "
                f"{self.d_in}, {self.hooks_out[0]} {self.d_out}. Set sae.init_encoder=random"
            )
        self.W_V = nn.Parameter(W_V * (norm / rows))
        self.b_V = nn.Parameter(-(self.in_origin @ self.W_V.detach()))
        zero = cfg.init_bias == "zero"
        self.b_dec = nn.Parameter(self._mean_output * 0 if zero else self._mean_output.clone())

    # -- the maths ----------------------------------------------------------------------------

    def weights(self) -> Weights:
        """Effective values and outputs, W_V and b_V in the encoder's place: rows of length 1."""
        if self.cfg.decoder_norm == "unit":
            return Weights(self.W_V, self.b_V, self.W_dec, self.b_dec)
        norm_F = self.W_dec.norm(dim=1)
        return Weights(
            self.W_V * norm_F, self.b_V * norm_F, self.W_dec / norm_F[:, None], self.b_dec
        )

    def standard_outputs(self, y: Tensor) -> Tensor:
        """y' of the output hook, in float32."""
        return (y.to(self.out_scale.dtype) - self.out_center) * self.out_scale

    def pre_activations(
        self,
        x: Tensor,
        w: Weights,
        present: Tensor | None = None,
        document: Tensor | None = None,
    ) -> Tensor:
        """(..., T, F): what each head brings to each row of standardised contexts x (..., T, D)."""
        qk = QK(self.W_Q, self.b_Q, self.W_K, self.b_K, self.cfg.rotary_base)
        return attend(x, qk, w.W_enc, present, document) + w.b_enc

    def encode(
        self, x: Tensor, present: Tensor | None = None, document: Tensor | None = None
    ) -> Codes:
        """Latents (..., T, F) of raw contexts x (..., T, D).

        `present` (..., T) bool: rows that may be attended to, None: all. `document` (..., T): rows
        attend within their own; None: within the context. ValueError for a single row.
        """
        x = self.standardise(x)
        return self.activation.infer(self.pre_activations(x, self.weights(), present, document))

    def counted_heads(self, acts: Mapping[str, Tensor], w: Weights) -> Tensor:
        """(N, F): heads on the rows that count."""
        check_contexts(acts, self.hooks_in[0])
        x = self.inputs(acts)
        return self.pre_activations(x, w, acts[PRESENT], acts.get(DOCUMENT))[acts[MASK]]

    def counted_outputs(self, acts: Mapping[str, Tensor]) -> Tensor:
        """(N, E): standardised outputs of the rows that count."""
        return self.standard_outputs(acts[self.hooks_out[0]][acts[MASK]])

    def losses(self, acts: Mapping[str, Tensor], progress: Progress) -> Losses:
        """`reconstruction`, the penalty by its name, `auxk` unless off; extras: `fvu`.

        `acts` holds contexts and their masks, see `saetrain.units`. Codes are of rows that count.
        """
        w = self.weights()
        h_NF = self.counted_heads(acts, w)
        picked = Picked(self.activation.select(h_NF), h_NF, *self.pick_dead(h_NF))
        e_NE = self.counted_outputs(acts) - (decode_codes(picked.codes, w.W_dec) + w.b_dec)
        penalty, extras = self.sparsity(picked.codes, picked.pre, progress)
        terms = {"reconstruction": self.reconstruction(e_NE), **penalty}
        terms |= self.revival(e_NE, picked, w)
        return Losses(terms, picked.codes, {**self._fvus(e_NE), **extras})

    # -- around the step --------------------------------------------------------------------------

    @torch.no_grad()
    def init_from_data(self, acts: Mapping[str, Tensor]) -> None:
        """What the first batch decides: median and subspace of the outputs, searched norm."""
        check_contexts(acts, self.hooks_in[0])
        y_NE = self.counted_outputs(acts)
        if self.cfg.init_bias == "geometric_median":
            self.b_dec.copy_(init.geometric_median(y_NE))
        if self.cfg.init_subspace is not None:
            self._enter_subspace(y_NE, self.cfg.init_subspace)
        if self.cfg.init_norm == "search":
            self._search_norm_on(acts)

    def _enter_subspace(self, y_NE: Tensor, rank: int) -> None:
        """Project W_dec onto the `rank` leading directions of y about its mean; lengths stay."""
        if rank > min(y_NE.shape):
            raise ConfigError(
                f"sae.init_subspace={rank}: a first batch of {len(y_NE)} rows of width "
                f"{self.d_out} has at most {min(y_NE.shape)} directions"
            )
        basis_RE = torch.linalg.svd(y_NE - y_NE.mean(0), full_matrices=False).Vh[:rank]
        rows_FE = self.W_dec @ basis_RE.T @ basis_RE
        lengths_F1 = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.copy_(nnf.normalize(rows_FE, dim=1) * lengths_F1)
        if self.cfg.init_encoder == "tied":
            lengths_F = self.W_V.norm(dim=0)
            self.W_V.copy_(nnf.normalize(self.W_dec, dim=1).T * lengths_F)

    def _search_norm_on(self, acts: Mapping[str, Tensor]) -> None:
        """Set the start length of values, and of free output rows, that predicts best."""
        columns, rows = self.W_V / self.W_V.norm(dim=0), self.W_dec / self.W_dec[0].norm()
        y_NE, free = self.counted_outputs(acts), self.cfg.decoder_norm == "free"

        def error(norm: float) -> float:
            self.W_V.copy_(columns * norm)
            self.W_dec.copy_(rows * norm if free else rows)
            w = self.weights()
            codes = self.activation.select(self.counted_heads(acts, w))
            e_NE = y_NE - (decode_codes(codes, w.W_dec) + w.b_dec)
            return float(e_NE.square().sum(-1).mean())

        error(min(init.NORMS, key=error))  # the last call leaves the best one set

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Mapping[str, Tensor]]) -> None:
        """Fix batchtopk's threshold on held-out rows; nothing for the others."""
        calibrator = self.activation.calibrator()
        if calibrator is None:
            return
        w = self.weights()
        for acts in batches:
            if not calibrator.update(self.counted_heads(acts, w)):
                break
        calibrator.finish()

    def to_inference(self) -> InferenceLorsa:
        """Folded weights in raw units of both hooks."""
        form, cfg = self.activation.form(), self.cfg
        tensors = fold_linked(self, self.weights())
        tensors |= {"W_V": tensors.pop("W_enc"), "b_V": tensors.pop("b_enc")}
        for name in "QK":
            W_GDQ, b_GQ = getattr(self, f"W_{name}").double(), getattr(self, f"b_{name}").double()
            W_GDQ = W_GDQ * self.in_scale.double()[:, None]
            shift_GQ = torch.einsum("d,gdq->gq", self.in_center.double(), W_GDQ)
            tensors |= {f"W_{name}": W_GDQ.float(), f"b_{name}": (b_GQ - shift_GQ).float()}
        if form.threshold is not None:
            tensors["threshold"] = form.threshold
        options = {n: getattr(cfg, n) for n in ("heads_per_qk", "d_qk", "rotary_base")}
        description = describe(self, "lorsa", form, options=options)
        return InferenceLorsa(description, {n: t.detach().clone() for n, t in tensors.items()})


@register_kind("lorsa")
class InferenceLorsa(Inference):
    """A Lorsa. Latent i moves x · W_V[:, i] to W_dec[i], by the pattern i // heads_per_qk."""

    unit = "sequence"
    W_Q: Tensor  # (G, D, Q)
    b_Q: Tensor  # (G, Q)
    W_K: Tensor  # (G, D, Q)
    b_K: Tensor  # (G, Q)
    W_V: Tensor  # (D, F)
    b_V: Tensor  # (F,)
    W_dec: Tensor  # (F, E)
    b_dec: Tensor  # (E,)

    @classmethod
    def check(cls, description: Description) -> None:
        options = description.options
        names = {"heads_per_qk", "d_qk", "rotary_base"}
        if set(options) != names:
            raise ArtefactError(f"options: expected {sorted(names)}, got {sorted(options)}")
        heads, width, base = (options[n] for n in ("heads_per_qk", "d_qk", "rotary_base"))
        whole = all(type(n) is int and n > 0 for n in (heads, width))
        if not whole or description.n_latents % heads:
            raise ArtefactError(
                f"options.heads_per_qk={heads}, d_qk={width}: expected whole numbers above 0, the "
                f"first a divisor of n_latents={description.n_latents}"
            )
        if base is not None and (type(base) not in (int, float) or not base > 1 or width % 2):
            raise ArtefactError(
                f"options.rotary_base={base}: expected null or a number above 1, and an even d_qk"
            )

    @classmethod
    def shapes(cls, description: Description) -> dict[str, tuple[int, ...]]:
        d, n_latents, width = description.d_in, description.n_latents, description.options["d_qk"]
        groups = n_latents // description.options["heads_per_qk"]
        shapes: dict[str, tuple[int, ...]] = {}
        for name in "QK":
            shapes |= {f"W_{name}": (groups, d, width), f"b_{name}": (groups, width)}
        shapes |= {"W_V": (d, n_latents), "b_V": (n_latents,)}
        shapes |= {"W_dec": (n_latents, description.d_out), "b_dec": (description.d_out,)}
        jump = description.activation == "jumprelu"
        return shapes | ({"threshold": (n_latents,)} if jump else {})

    @property
    def qk(self) -> QK:
        """What makes the attention patterns."""
        base = self.describe().options["rotary_base"]
        return QK(self.W_Q, self.b_Q, self.W_K, self.b_K, base)

    def encode(
        self, x: Tensor, present: Tensor | None = None, document: Tensor | None = None
    ) -> Codes:
        """Latents (..., T, F) of raw contexts x (..., T, D); arguments as in `Lorsa.encode`."""
        h = attend(x.to(self.W_V.dtype), self.qk, self.W_V, present, document)
        return self.form()(h + self.b_V)

    def decode(self, codes: Codes) -> Tensor:
        """Predicted outputs (..., E) in raw units, in the weights' dtype."""
        return decode_codes(codes, self.W_dec) + self.b_dec

    def patterns(
        self, x: Tensor, present: Tensor | None = None, document: Tensor | None = None
    ) -> Tensor:
        """Attention (..., G, T, T) of every pattern: row t reads from row s with weight [t, s]."""
        return pattern(x.to(self.W_V.dtype), self.qk, present, document)


def check_contexts(acts: Mapping[str, Tensor], hook: str) -> None:
    """ConfigError unless `acts` are whole contexts with their masks."""
    if MASK in acts and PRESENT in acts and acts[hook].dim() == 3:
        return
    raise ConfigError(
        f"sae.name=lorsa attends over whole contexts (S, T, d) with their masks, and got rows of "
        f"shape {tuple(acts[hook].shape)}: a stream of single rows mixes contexts. Give "
        "saetrain.stream.SequenceStream, which sorts permuted stores, too"
    )
