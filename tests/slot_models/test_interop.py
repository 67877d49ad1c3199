"""Modules of the packages slot-attention and slot-attention-pytorch against ours with the same weights."""

import copy
import subprocess
import sys
from typing import Any

import pytest
import slot_attention as package
import torch
from slot_attention_pytorch.slot_attention_module import SlotAttentionModule
from slot_oracles import distance, gradient_distance, gradients, randomise
from torch import Tensor, nn

from slot_models import SlotAttention
from slot_models.interop import from_package

SIZES = [  # batch, inputs, slots, dim, iterations
    (1, 6, 2, 4, 1),
    (3, 17, 5, 32, 3),
    (2, 4, 9, 64, 4),
]
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
attentions = pytest.mark.parametrize("name", ["SlotAttention", "MultiHeadSlotAttention"])


def normal(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def theirs_of(name: str, num_slots: int, dim: int, iters: int) -> Any:
    torch.manual_seed(0)
    if name == "SlotAttention":
        module = package.SlotAttention(num_slots, dim, iters, hidden_dim=2 * dim)
    else:
        module = package.MultiHeadSlotAttention(num_slots, dim, heads=3, dim_head=5, iters=iters, hidden_dim=2 * dim)
    module = module.double()
    randomise(module)
    return module


def with_global_noise(module: Any, inputs: Tensor, **options: Any) -> Any:
    """Calls a module that draws its slots from torch's global generator."""
    torch.manual_seed(5)
    return module(inputs, **options)


def global_noise(batch: int, num_slots: int, dim: int, dtype: torch.dtype = torch.float64) -> Tensor:
    torch.manual_seed(5)
    return torch.randn(batch, num_slots, dim, dtype=dtype)


def converted_gradients(theirs: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Gradients of their parameters, under our names: they travel as the weights of a copy."""
    leaves = dict(theirs.named_parameters())
    holder = copy.deepcopy(theirs)
    with torch.no_grad():
        for (_, weight), gradient in zip(
            holder.named_parameters(), torch.autograd.grad(loss, [*leaves.values()]), strict=True
        ):
            weight.copy_(gradient)
    return {name: weight.detach() for name, weight in from_package(holder).named_parameters()}


@sizes
@attentions
def test_outputs_and_all_gradients_equal_the_package(name: str, size: tuple[int, ...]) -> None:
    batch, count, num_slots, dim, iters = size
    theirs, inputs = theirs_of(name, num_slots, dim, iters), normal(batch, count, dim).requires_grad_()
    ours = from_package(theirs)
    for called_with in (None, num_slots + 2):
        expected = with_global_noise(theirs, inputs, num_slots=called_with)
        actual = ours(inputs, called_with, noise=global_noise(batch, called_with or num_slots, dim))
        assert distance(actual, expected) <= 1e-10
        direction = normal(*actual.shape, seed=4)
        mine = gradients((actual * direction).sum(), dict(ours.named_parameters()) | {"inputs": inputs})
        loss = (expected * direction).sum()
        (by_inputs,) = torch.autograd.grad(loss, inputs, retain_graph=True)
        assert gradient_distance(mine, converted_gradients(theirs, loss) | {"inputs": by_inputs}) <= 1e-10


@sizes
def test_outputs_and_all_gradients_equal_the_package_slot_attention_pytorch(size: tuple[int, ...]) -> None:
    batch, count, num_slots, dim, iters = size
    torch.manual_seed(0)
    theirs = SlotAttentionModule(num_slots, dim + 3, dim, iters, mlp_size=2 * dim).double()
    randomise(theirs)
    ours = SlotAttention(num_slots, dim, iters, hidden_dim=2 * dim, input_dim=dim + 3, norm_eps=1e-3).double()
    names = {
        "slots_mu": "slots_mu",
        "slots_log_sigma": "slots_log_sigma",
        "to_q.weight": "to_query",
        "to_k.weight": "to_key",
        "to_v.weight": "to_value",
        "gru.weight_ih": "gru.weight_ih",
        "gru.weight_hh": "gru.weight_hh",
        "gru.bias_ih": "gru.bias_ih",
        "gru.bias_hh": "gru.bias_hh",
        "mlp.0.weight": "mlp.1.weight",
        "mlp.0.bias": "mlp.1.bias",
        "mlp.2.weight": "mlp.3.weight",
        "mlp.2.bias": "mlp.3.bias",
        "norm_input.weight": "norm_inputs.weight",
        "norm_input.bias": "norm_inputs.bias",
        "norm_slots.weight": "norm_slots.weight",
        "norm_slots.bias": "norm_slots.bias",
        "norm_pre_ff.weight": "mlp.0.weight",
        "norm_pre_ff.bias": "mlp.0.bias",
    }
    mine, their_leaves = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert names.keys() == their_leaves.keys() and set(names.values()) == mine.keys()
    with torch.no_grad():
        for name, weight in their_leaves.items():
            mine[names[name]].copy_(weight.view_as(mine[names[name]]))

    inputs = normal(batch, count, dim + 3).requires_grad_()
    torch.manual_seed(5)  # they draw with torch.normal(mean, std)
    noise = torch.normal(torch.zeros(batch, num_slots, dim).double(), torch.ones(batch, num_slots, dim).double())
    expected, actual = with_global_noise(theirs, inputs), ours(inputs, noise=noise)
    assert distance(actual, expected) <= 1e-10
    direction = normal(*actual.shape, seed=4)
    wanted = gradients((expected * direction).sum(), their_leaves | {"inputs": inputs})
    renamed = {names.get(name, name): g for name, g in wanted.items()}
    found = gradients((actual * direction).sum(), mine | {"inputs": inputs})
    for name in ("slots_mu", "slots_log_sigma"):  # torch.normal passes no gradient on: theirs never learns them
        assert renamed.pop(name).count_nonzero() == 0 and found.pop(name).count_nonzero() > 0
    assert gradient_distance(found, {name: g.view_as(found[name]) for name, g in renamed.items()}) <= 1e-10


@attentions
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_an_adaptive_wrapper_decides_and_learns_as_the_packages(name: str, temperature: float) -> None:
    theirs = package.AdaptiveSlotWrapper(theirs_of(name, 5, 8, 2), temperature=temperature).double()
    ours, inputs = from_package(theirs), normal(40, 9, 8).requires_grad_()
    slots, keep = with_global_noise(theirs, inputs)
    torch.manual_seed(5)
    noise = torch.randn(40, 5, 8, dtype=torch.float64)
    uniform = torch.rand(40, 5, 2, dtype=torch.float64)
    my_slots, my_keep = ours(inputs, noise=noise, gate_noise=-(-uniform.log()).log())
    assert distance(my_slots, slots) <= 1e-10
    assert torch.equal(my_keep.detach().round(), keep.detach().round()) and 20 < keep.sum() < 180
    direction = normal(40, 5, seed=4)
    mine = gradients((my_keep * direction).sum(), dict(ours.named_parameters()))
    assert gradient_distance(mine, converted_gradients(theirs, (keep * direction).sum())) <= 1e-9


@attentions
def test_an_ortho_wrapper_has_the_packages_loss(name: str) -> None:
    theirs = package.OrthoSlotWrapper(theirs_of(name, 5, 8, 2))
    ours, inputs = from_package(theirs), normal(3, 9, 8)
    slots, loss = with_global_noise(theirs, inputs)
    my_slots, my_loss = ours(inputs, noise=global_noise(3, 5, 8))
    assert distance(my_slots, slots) <= 1e-10
    assert my_loss.shape == (3,) and distance(my_loss.mean(), loss) <= 1e-10
    wanted = converted_gradients(theirs, loss)
    assert gradient_distance(gradients(my_loss.mean(), dict(ours.named_parameters())), wanted) <= 1e-9


def meta_of(codebook_size: int, spread: float) -> Any:
    theirs = package.MetaSlotAttention(theirs_of("SlotAttention", 7, 8, 2).float(), codebook_size=codebook_size)
    book = theirs.vq._codebook
    book.threshold_ema_dead_code = 0
    book.initted.fill_(True)
    book.embed.copy_(spread * normal(1, codebook_size, 8, dtype=torch.float32))
    book.cluster_size.copy_(2 + torch.arange(codebook_size) / 7)
    book.embed_avg.copy_(book.embed * book.cluster_size[..., None])
    return theirs


@pytest.mark.parametrize(("codebook_size", "spread"), [(1, 1.0), (4, 3.0), (64, 3.0)])
def test_a_meta_slot_attention_merges_learns_and_moves_its_codebook_as_the_packages(
    codebook_size: int, spread: float
) -> None:
    """In float32: the package merges in float32 whatever the slots are. Its commitment is that of the codes before the
    step, and its codebook after the step is ours after the loop has applied the tally."""
    theirs = meta_of(codebook_size, spread)
    ours, inputs = from_package(theirs), normal(6, 9, 8, dtype=torch.float32)
    assert ours.training
    slots, mask, loss = with_global_noise(theirs, inputs)
    found = ours(inputs, noise=global_noise(6, 7, 8, torch.float32))
    assert torch.equal(found.keep, mask)
    assert codebook_size == 64 or not mask.all()
    assert distance(found.slots, slots) <= 1e-5
    assert distance(found.commitment.mean(), loss) <= 1e-5
    wanted = converted_gradients(theirs.slot_attention, loss + (slots**2).sum())
    leaves = dict(ours.slot_attention.named_parameters())
    mine = gradients(found.commitment.mean() + found.slots.square().sum(), leaves)
    assert gradient_distance(mine, wanted) <= 1e-3

    book = theirs.vq._codebook
    ours.codebook.update(found.counts, found.sums)
    assert distance(ours.codebook.counts, book.cluster_size[0]) <= 1e-6
    assert distance(ours.codebook.codes, book.embed[0]) <= 1e-4  # they smooth the counts by 1e-5


@attentions
def test_what_is_converted_keeps_its_dtype_and_mode(name: str) -> None:
    for module in (theirs_of(name, 3, 4, 1).eval(), theirs_of(name, 3, 4, 1).float()):
        ours = from_package(module)
        assert ours.training == module.training
        assert {weight.dtype for weight in ours.parameters()} == {next(module.parameters()).dtype}
    assert ours.num_slots == 3 and ours.dim == 4


def test_a_class_without_a_counterpart_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"^module: there is no counterpart of a SlotAttentionExperimental; take one of"
    ):
        from_package(package.SlotAttentionExperimental(3, 4))


def test_a_codebook_that_ours_cannot_be_is_refused() -> None:
    theirs = package.MetaSlotAttention(package.SlotAttention(3, 8), codebook_size=4, codebook_dim=2)
    with pytest.raises(ValueError, match=r"^module: its codebook has heads, a projection or cosine similarity"):
        from_package(theirs)


def test_the_package_is_not_imported() -> None:
    code = "import sys, slot_models.interop; sys.exit('slot_attention' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
