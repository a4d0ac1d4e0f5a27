"""The sparse step: what a TopK-like training step costs beyond its one matrix product.

gemm.py     h = x W + b by the fastest library for this processor, or in bf16
cpu.py      inner loops in C (sparse.c): selection, dot products and sums of chosen rows
topk.py     the exact k largest of long rows: those, or a tournament of maxima
encode.py   product and selection in pieces that stay in cache, with a sparse backward
batchtopk.py  the same for the k·N largest of a batch; above.py for what is above a threshold
decode.py   sum of the decoder rows that fire, with a sparse backward; prefixes of it
latents.py  what all backwards are made of: dot products and sums over the slots of a latent
rows.py     unit-norm rows and projected gradients in one pass over memory
triton_*.py the same on CUDA

Without a C compiler all of it is torch operations, slower. Everything has a plain twin of a few
lines, named in its docstring, and a test that they are equal.
Architectures use `saetrain.codes`; it decides which of these to call.

Shapes: B tokens, D input width, E output width, F latents, K slots a token, A auxiliary slots.
"""
