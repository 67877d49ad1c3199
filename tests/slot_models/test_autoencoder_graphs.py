"""The whole model compiles to one graph, is exported for any batch, and stays finite under autocast."""

from typing import Any

import pytest
import torch
from autoencoders import DEMO, FEATURE_DECODERS, SMALL, blocks, build, loss_of, noises, of_features, parts, scene
from slot_oracles import distance
from torch import Tensor

from slot_models.autoencoder import SlotAutoencoder


def traced(kind: str) -> tuple[SlotAutoencoder, list[tuple[Tensor, ...]]]:
    """A model, and inputs of two batch sizes."""
    if kind in FEATURE_DECODERS:
        return of_features(kind, iters=1), [scene(batch) for batch in (2, 5)]
    slots = {"kind": "slots", "hidden_dim": 8, "iters": 1}
    joint = {"kind": "heads", "heads": 2, "dim_head": 4, "competition": "joint", "iters": 1}
    options: dict[str, Any] = {
        "slope": {"attention": slots},
        "difference": {"attention": slots | {"gradient": "bilevel", "iters": 2}, "gate": {"gradient": "difference"}},
        "codebook": {"attention": joint, "codebook": {"size": 4}, "gate": None},
        "upsampling": {"attention": slots, "decoder": {"kind": "upsampling", "channels": 4, "strides": (3, 1)}},
    }[kind]
    model = build(SMALL | options).double()
    return model, [(blocks(n, 9).double(), *(noise.double() for noise in noises(SMALL, n))) for n in (2, 5)]


@pytest.mark.parametrize(  # the slow one has a backward graph too
    ("kind", "backend"),
    [
        pytest.param("difference", "aot_eager", marks=pytest.mark.slow),
        *(("codebook", "eager"), ("mlp", "eager"), ("transformer", "eager")),
    ],
)
def test_the_whole_model_compiles_to_one_graph(kind: str, backend: str) -> None:
    model, (inputs, _) = traced(kind)
    if kind == "mlp":
        inputs = inputs[:1]  # without noise, as at evaluation
    torch.compiler.reset()
    found = []
    for forward in (model, torch.compile(model, fullgraph=True, backend=backend)):
        output = forward(*inputs)
        model.zero_grad()
        loss_of(output, inputs[0], 0.1).backward()
        found.append(
            [part.detach() for part in parts(output)]
            + [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        )
    largest = max(float(part.abs().max()) for part in found[0])
    for plain, compiled in zip(*found, strict=True):
        assert (compiled - plain).abs().max() <= 1e-10 * largest


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["slope", "difference", "codebook", "upsampling", *FEATURE_DECODERS])
@torch.no_grad()
def test_the_whole_model_is_exported_for_any_batch(kind: str, training: bool) -> None:
    """In evaluation it decodes every slot, and the model the kept ones alone: these must be the same."""
    model, (inputs, more) = traced(kind)
    model.train(training)
    batch = torch.export.Dim("batch")
    shapes = {key: {0: batch} for key in ("images", "slot_noise", "gate_noise")}
    exported = torch.export.export(model, inputs, dynamic_shapes=shapes).module()
    mine, theirs = exported(*more), model(*more)
    kept = theirs.keep > 0
    assert not kept.all() or kind == "codebook"
    if not training and theirs.pictures is not None:
        mine, theirs = (output._replace(pictures=output.pictures[kept]) for output in (mine, theirs))
    assert all(distance(*pair) <= 1e-10 for pair in zip(parts(mine), parts(theirs), strict=True))


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("kind", ["demo", *FEATURE_DECODERS])
def test_under_autocast_a_model_stays_finite_and_its_reconstruction_in_fp32(
    kind: str, dtype: torch.dtype, most: float
) -> None:
    if kind == "demo":
        model, arguments = build(DEMO), (blocks(2, 21), *noises(DEMO, 2))
    else:
        model, arguments = of_features(kind).float(), tuple(part.float() for part in scene(2))
    with torch.autocast("cpu", dtype):
        output = model(*arguments, stage="open")
        loss = (output.reconstruction - output.target).square().mean()
    assert output.reconstruction.dtype == output.target.dtype == output.masks.dtype == torch.float32
    loss.backward()
    whole = model(*arguments, stage="open")
    assert distance(output.reconstruction, whole.reconstruction) <= most
    assert (output.masks.sum(dim=1) - 1).abs().max() <= 1e-4
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()
