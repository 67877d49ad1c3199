"""The Triton passes against the same passes in plain torch: on a GPU if there is one, else in Triton's interpreter."""

from typing import Any

import pytest
import torch
from slot_oracles import distance, gradient_distance, gradients, published_slot_attention, randomise
from torch import Tensor

from slot_models import MultiHeadSlotAttention, SlotAttention
from slot_models.iterations import blocks, kernels, operators, passes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# images, inputs, channels, groups, rows of a group: sizes that fill no tile, one that fills it, many slots or channels
SIZES = [
    (2, 37, 5, 1, 3),
    (1, 64, 16, 1, 16),
    (3, 9, 24, 2, 4),
    (1, 150, 70, 1, 24),
    (2, 20, 300, 1, 7),
    (1, 1, 1, 1, 1),
]
sizes = pytest.mark.parametrize("sizes", SIZES, ids=str)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def read(batch: int, count: int, width: int, masked: bool) -> tuple[Tensor, Tensor | None]:
    mask = None
    if masked:
        mask = normal(batch, count, seed=7) > -0.5
    return 3 * normal(batch, count, width) + 1, mask


@sizes
@pytest.mark.parametrize("masked", [False, True])
def test_each_kernel_is_its_pass_in_plain_torch(sizes: Any, masked: bool) -> None:
    batch, count, width, groups, rows_of_group = sizes
    inputs, mask = read(batch, count, width, masked)
    norm = torch.ones_like(inputs[0, 0]), torch.zeros_like(inputs[0, 0])
    normed, *statistics = blocks.normalise(inputs, norm, 1e-5, constant=True)
    mean, rstd = kernels.statistics(inputs, 1e-5, mask)
    assert distance(mean, statistics[0]) <= 1e-5
    assert distance(rstd, statistics[1] if mask is None else statistics[1] * mask) <= 1e-5
    rows = normal(batch, 2, groups * rows_of_group, width + 1, seed=3)
    d_sums = normal(batch, 2, groups * rows_of_group, width + 1, seed=4)
    attention, d_logits = [], []
    for row, d_sum in zip(rows.unbind(1), d_sums.unbind(1), strict=True):
        row, d_sum = row.contiguous(), d_sum.contiguous()
        expected, total, won = blocks.pool(normed, row, mask, groups, 1e-3)
        assert distance(kernels.pool(inputs, mean, rstd, row, groups, 1e-3, False), expected) <= 1e-4
        assert distance(expected[..., -1:], total) <= 1e-5
        expected, d_won = blocks.pool_backward(normed, d_sum, None, won, groups)
        assert distance(kernels.pool_backward(inputs, mean, rstd, row, d_sum, groups, False), expected) <= 1e-4
        attention.append(won)
        d_logits.append(d_won)
    d_inputs = kernels.inputs_backward(inputs, mean, rstd, rows, d_sums, groups, 1e-3, False)
    lists = (list(t.unbind(1)) for t in (rows, d_sums))
    expected, *_ = blocks.inputs_backward(inputs, *statistics, mask, norm, *lists, attention, d_logits, 1e-3, True)
    assert distance(d_inputs, expected) <= 1e-4


def test_a_pass_in_parts_is_the_whole_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial sums of as many programs as there are tiles, and the same numbers each time."""
    inputs, _ = read(1, 700, 16, False)
    known, rows = kernels.statistics(inputs, 1e-5, None), normal(1, 3, 17, seed=3)
    d_sums, found = normal(1, 3, 17, seed=4), []
    for programs in (1, 2, 1000):
        monkeypatch.setattr(kernels, "_PROGRAMS_PER_PROCESSOR", programs)
        found.append(
            (
                kernels.pool(inputs, *known, rows, 1, 1e-8, False),
                kernels.pool_backward(inputs, *known, rows, d_sums, 1, False),
            )
        )
        again = kernels.pool(inputs, *known, rows, 1, 1e-8, False)
        assert torch.equal(again, found[-1][0])
    for others in found[1:]:
        assert all(distance(a, b) <= 1e-5 for a, b in zip(others, found[0], strict=True))


@pytest.fixture
def in_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "in_triton", lambda inputs: True)


def build(heads: int, joint: bool, **options: Any) -> Any:
    torch.manual_seed(1)
    competition: Any = "joint" if joint else "per_head"
    attention: Any = (
        SlotAttention(4, 6, hidden_dim=7, **options)
        if heads == 1
        else MultiHeadSlotAttention(4, 6, heads, 12, hidden_dim=7, competition=competition, **options)
    )
    randomise(attention)
    return attention.to(DEVICE)


kinds = pytest.mark.parametrize(("heads", "joint"), [(1, False), (2, False), (2, True)])


@pytest.mark.usefixtures("in_triton")
@kinds
@pytest.mark.parametrize("update", ["mean", "sum"])
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_the_module_through_the_kernels_equals_the_equations(heads: int, joint: bool, update: Any, way: str) -> None:
    attention = build(heads, joint, update=update, iters=2, qkv_bias=True)
    inputs, slots = normal(2, 21, 6).requires_grad_(), normal(2, 4, 6, seed=3)
    mask = normal(2, 21, seed=4) > -1
    torch.compiler.reset()
    run = torch.compile(attention, fullgraph=True, backend="aot_eager") if way == "compiled" else attention
    ours = run(inputs, slots=slots, input_mask=mask)
    leaves = {name: w for name, w in attention.named_parameters() if not name.startswith("slots_")} | {"inputs": inputs}
    mine = gradients(ours.square().sum(), leaves)
    oracle = published_slot_attention(
        leaves, inputs, slots, 2, heads=heads, joint=joint, total=update == "sum", input_mask=mask
    )
    assert distance(ours, oracle) <= 1e-4
    assert gradient_distance(mine, gradients(oracle.square().sum(), leaves)) <= 1e-3


@pytest.mark.usefixtures("in_triton")
def test_no_kernel_goes_back_to_inputs_without_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    back = kernels.inputs_backward
    monkeypatch.setattr(kernels, "inputs_backward", lambda *a: (called.append(1), back(*a))[1])
    attention, inputs = build(1, False), normal(2, 21, 6)
    attention(inputs).sum().backward()
    assert not called and attention.norm_inputs.weight.grad.any()
    attention(inputs.requires_grad_()).sum().backward()
    assert called == [1]


@pytest.mark.usefixtures("in_triton")
def test_inputs_in_bfloat16_are_near_float32() -> None:
    attention, slots = build(1, False), normal(2, 4, 6, seed=3)
    inputs = normal(2, 300, 6).bfloat16().requires_grad_()
    same_inputs = inputs.detach().float().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = attention(inputs, slots=slots)
    expected = attention(same_inputs, slots=slots)
    assert found.dtype == torch.float32 and distance(found, expected) <= 2e-2
    (gradient,) = torch.autograd.grad(found.square().sum(), inputs)
    (wanted,) = torch.autograd.grad(expected.square().sum(), same_inputs)
    assert gradient.dtype == torch.bfloat16 and distance(gradient.float(), wanted) <= 5e-2


@pytest.mark.usefixtures("in_triton")
@pytest.mark.parametrize(
    ("width", "slots", "dtype"), [(513, 4, torch.float32), (16, 65, torch.float32), (16, 4, torch.float64)]
)
def test_what_does_not_fit_a_kernel_goes_the_plain_way(width: int, slots: int, dtype: torch.dtype) -> None:
    attention = SlotAttention(slots, 8, input_dim=width, iters=1).to(DEVICE, dtype)
    inputs = normal(1, 5, width).to(dtype)
    assert not passes.fit(inputs, normal(1, slots, 8).to(dtype), attention._rules(slots), attention._weights())
    assert attention(inputs).isfinite().all()


@pytest.mark.usefixtures("in_triton")
def test_export_holds_no_kernel() -> None:
    attention, inputs = build(1, False), normal(2, 9, 6)
    program = torch.export.export(attention, (inputs,))
    assert "slot_models" not in str(program.graph)
    assert distance(program.module()(inputs), attention(inputs)) <= 1e-5


def test_the_operators_say_their_shapes_and_keep_their_inputs() -> None:
    inputs, _ = read(2, 19, 6, False)
    known, rows, d_sums = (
        kernels.statistics(inputs, 1e-5, None),
        normal(2, 2, 4, 7, seed=3),
        normal(2, 2, 4, 7, seed=4),
    )
    first, d_first = rows[:, 0].contiguous(), d_sums[:, 0].contiguous()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.statistics, (inputs, 1e-5, None), test_utils=checks)
    torch.library.opcheck(operators.pool, (inputs, *known, first, 1, 1e-8, False), test_utils=checks)
    torch.library.opcheck(operators.pool_backward, (inputs, *known, first, d_first, 1, False), test_utils=checks)
    torch.library.opcheck(operators.inputs_backward, (inputs, *known, rows, d_sums, 1, 1e-8, False), test_utils=checks)
