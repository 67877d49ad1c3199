"""The iterations of slot attention, and the order of work that makes them cheap.

The maths are those of Locatello et al. 2020; `plain` says them. For an image with N inputs of width C, K slots, H heads
of width d each and T iterations, in multiplications an input, forward and backward:

    keys and values of the inputs, as published      6 C H d  +  6 T K H d
    neither: ``logits = x (W_k^T q)``,               6 T H K C to 9 T H K C
             ``updates = W_v (attention^T x)``

so the second wins unless heads are many and narrow (`weights.absorbing`). It also leaves less behind:
a usual training step keeps the normed inputs, keys, values and T attentions, and reads or writes about 6 T tensors of
the inputs' size; here one pass over the inputs is read an iteration, forward (logits, softmax over the slots, weighted
sums: 2 H K C) and backward (the same again, and the queries' gradient: 3). The gradient of the inputs is linear in the
rows of the slots, so it is made once, of all iterations, in a last pass back (2 + 2 for each iteration).

In Triton a pass norms what it reads, LayerNorm's affine part goes into the matrices (`folding`), and rows of the slots
are all that is kept. In plain torch the normed inputs and the attention are kept too, in float32 1 + T H K / C of the
inputs: a processor reads them faster than it makes them again, and 6 T of the 9 T are left.

    plain       the definition: compile, export, higher derivatives, and whatever does not fit the rest
    derivative  the iterations as one function, with a derivative written by hand; weights' gradients in the end
    halves      an iteration before and after its pass; rows: its layers
    folding     keys and values as the matrices that rows are multiplied with
    passes      the passes over the inputs: blocks in plain torch, kernels in Triton (operators, for a compiler)
"""
