"""What every decoder promises; and the spatial broadcast decoder against the plain one that convolves every slot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoder_cases import normal, sizes
from hypothesis import given, settings
from slot_oracles import distance, gradients, randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slot_models.decoders import Decoded, Decoder, MixtureDecoder, SpatialBroadcastDecoder
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.transformer_decoder import TransformerDecoder
from slot_models.upsampling_decoder import UpsamplingBroadcastDecoder

# slot_dim, (height, width) of the reconstruction -> a decoder
DECODERS: dict[str, Callable[[int, tuple[int, int]], Decoder]] = {
    "spatial": lambda dim, size: SpatialBroadcastDecoder(dim, size, 4, 2, 3),
    "upsampling": lambda dim, size: UpsamplingBroadcastDecoder(dim, (4 * size[0], 4 * size[1]), 4, (2, 2, 1), 3, 3),
    "mlp": lambda dim, size: MLPPatchDecoder(dim, 3, size, 8),
    "transformer": lambda dim, size: TransformerDecoder(dim, 3, size, 8, 2, 2),
}


each_decoder = pytest.mark.parametrize("kind", DECODERS)


def build(kind: str, slot_dim: int = 5, size: tuple[int, int] = (3, 4)) -> Decoder:
    torch.manual_seed(0)
    decoder = DECODERS[kind](slot_dim, size).double()
    randomise(decoder)
    return decoder


def target_of(decoder: Decoder, batch: int, seed: int = 5) -> Tensor:
    scale = 4 if isinstance(decoder, UpsamplingBroadcastDecoder) else 1
    height, width = decoder.grid  # type: ignore[misc]
    return normal(batch, 3, int(height) * scale, int(width) * scale, seed=seed)


def some_kept(batch: int, num_slots: int, seed: int) -> Tensor:
    """0 or 1, at least one slot of each image kept. [B, K]"""
    keep = (normal(batch, num_slots, seed=seed) > 0).double()
    return torch.where(keep.sum(dim=1, keepdim=True) > 0, keep, torch.ones_like(keep))


def slack(decoder: Decoder, slots: Tensor, keep: Tensor) -> Tensor:
    """How far the published epsilon may pull a mixture to zero: 1e-5 over the kept slots' share. [B, 1, H, W]"""
    if not isinstance(decoder, MixtureDecoder):
        return torch.zeros(len(slots), 1, 1, 1)
    share = (decoder.decode(slots)[1].softmax(dim=1) * keep[:, :, None, None]).sum(dim=1, keepdim=True)
    return 1e-5 / share


@each_decoder
@settings(max_examples=15)
@given(**sizes)
def test_only_the_kept_slots_have_a_part(
    kind: str, batch: int, num_slots: int, slot_dim: int, height: int, width: int, seed: int
) -> None:
    decoder = build(kind, slot_dim, (height, width))
    slots, keep = normal(batch, num_slots, slot_dim, seed=seed), some_kept(batch, num_slots, seed)
    target = target_of(decoder, batch)
    with torch.no_grad():
        decoded: Decoded = decoder(slots, keep, target)
        assert decoded.reconstruction.shape == target.shape
        assert decoded.masks.shape == (batch, num_slots, *target.shape[-2:])
        dropped = keep < 0.5
        assert (decoded.masks[dropped] == 0).all() and (decoded.masks >= 0).all()
        lost = slack(decoder, slots, keep)
        assert ((decoded.masks.sum(dim=1, keepdim=True) - 1).abs() <= lost + 1e-12).all()

        # other content in the dropped slots
        changed = torch.where(dropped[..., None], 3 * normal(*slots.shape, seed=seed + 1), slots)
        again = decoder(changed, keep, target).reconstruction
        lost = lost + slack(decoder, changed, keep)
        if kind == "transformer":
            assert torch.equal(again, decoded.reconstruction)
        assert ((again - decoded.reconstruction).abs() <= lost * decoded.reconstruction.abs() * 1.1).all()

        # the kept slots on their own
        for row in range(batch):
            kept = slots[row, ~dropped[row]][None]
            every = torch.ones(kept.shape[:2], dtype=torch.float64)
            alone = decoder(kept, every, target[row : row + 1]).reconstruction[0]
            bound = 1.1 * (lost[row] + slack(decoder, kept, every)[0]) * alone.abs() + 1e-12
            assert ((alone - decoded.reconstruction[row]).abs() <= bound).all()


@each_decoder
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_without_epsilon_a_dropped_slot_has_exactly_no_effect(kind: str, spread: float) -> None:
    decoder = build(kind, 5, (3, 4))
    if isinstance(decoder, MixtureDecoder):
        decoder.mixture_eps = 0.0
    slots, keep, target = spread * normal(3, 4, 5), some_kept(3, 4, 1), target_of(decoder, 3)
    assert keep.min() == 0
    other = torch.where(keep[..., None] > 0, slots, 50 * spread * normal(3, 4, 5, seed=7))
    with torch.no_grad():
        first, second = decoder(slots, keep, target), decoder(other, keep, target)
        assert torch.equal(second.reconstruction, first.reconstruction) and torch.equal(second.masks, first.masks)
        for row in range(3):
            kept = slots[row, keep[row] > 0][None]
            alone = decoder(kept, torch.ones(kept.shape[:2]).double(), target[row : row + 1])
            assert distance(first.reconstruction[row], alone.reconstruction[0]) <= 1e-10


@each_decoder
@settings(max_examples=10)
@given(**sizes)
def test_the_order_of_slots_is_the_order_of_masks_and_changes_nothing_else(
    kind: str, batch: int, num_slots: int, slot_dim: int, height: int, width: int, seed: int
) -> None:
    decoder = build(kind, slot_dim, (height, width))
    slots, keep = normal(batch, num_slots, slot_dim, seed=seed), some_kept(batch, num_slots, seed)
    target, order = target_of(decoder, batch), torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        first, second = decoder(slots, keep, target), decoder(slots[:, order], keep[:, order], target)
    assert distance(second.reconstruction, first.reconstruction) <= 1e-10
    assert distance(second.masks, first.masks[:, order]) <= 1e-10
    for mine, theirs in ((second.pictures, first.pictures), (second.mask_logits, first.mask_logits)):
        assert (mine is None) == (theirs is None) == (kind == "transformer")
        if mine is not None and theirs is not None:
            assert distance(mine, theirs[:, order]) <= 1e-10


@each_decoder
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    decoder = build(kind, 3, (3, 3))
    slots, target = normal(1, 3, 3).requires_grad_(), target_of(decoder, 1).requires_grad_()
    keep = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)

    def decode(slots: Tensor, keep: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        decoded = decoder(slots, keep, target)
        return tuple(part for part in decoded if part is not None)

    assert torch.autograd.gradcheck(decode, (slots, keep, target), fast_mode=True)
    (slope,) = torch.autograd.grad(decoder(slots, keep, target).reconstruction.square().sum(), keep)
    assert (slope != 0).all()  # the gate learns of dropped slots too


@each_decoder
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    decoder = DECODERS[kind](5, (3, 4))
    slots, keep = normal(2, 4, 5).float(), torch.tensor([[1.0, 0, 1, 1], [0, 0, 1, 1]])
    target = target_of(decoder, 2).float()
    (decoder(slots, keep, target).reconstruction - target).square().mean().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


each_mixture = pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind != "transformer"])


@each_mixture
def test_in_evaluation_dropped_slots_are_not_decoded_and_the_rest_is_as_if_they_were(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder, slots, keep = build(kind), normal(3, 4, 5), some_kept(3, 4, 1)
    kept = keep > 0
    assert 0 < kept.sum() < 12
    assert isinstance(decoder, MixtureDecoder)
    decode, seen = decoder.decode, []

    def watched(given: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(given.flatten(0, 1))
        return decode(given)

    monkeypatch.setattr(decoder, "decode", watched)
    with torch.no_grad():
        published = decoder(slots, keep)
        lost = slack(decoder, slots, keep)
        decoder.mixture_eps = 0.0
        exact = decoder(slots, keep)
        decoder.mixture_eps, seen[:] = 1e-5, []
        evaluated = decoder.eval()(slots, keep)
        assert len(seen) == 1 and torch.equal(seen[0], slots[kept])
        every = decoder(slots, torch.ones_like(keep))
    for part in ("reconstruction", "masks"):
        assert distance(getattr(evaluated, part), getattr(exact, part)) <= 1e-12
    assert ((evaluated.masks - published.masks).abs() <= 1.1 * lost).all()
    assert distance(evaluated.pictures[kept], exact.pictures[kept]) <= 1e-12
    assert torch.equal(every.pictures, exact.pictures)

    differentiable = decoder(slots, keep.requires_grad_())  # with the slope of keeping a dropped slot
    assert distance(differentiable.reconstruction, evaluated.reconstruction) <= 1e-12
    (slope,) = torch.autograd.grad(differentiable.reconstruction.square().sum(), keep)
    assert (slope[~kept] != 0).all()


@each_mixture
def test_an_image_may_keep_nothing_in_evaluation(kind: str) -> None:
    decoder = build(kind).eval()
    with torch.no_grad():
        for keep in (torch.zeros(2, 3), torch.tensor([[0.0, 0, 0], [1, 0, 0]])):
            decoded = decoder(normal(2, 3, 5), keep.double())
            assert all((part[keep.sum(dim=1) == 0] == 0).all() for part in decoded[:2])
            assert all(part.isfinite().all() for part in decoded)


@each_mixture
def test_recomputing_changes_neither_values_nor_gradients_and_holds_one_slots_activations(kind: str) -> None:
    decoder = build(kind)
    assert isinstance(decoder, MixtureDecoder)
    leaves = dict(decoder.named_parameters()) | {"slots": normal(2, 4, 5).requires_grad_()}
    keep, target = some_kept(2, 4, 1), target_of(decoder, 2)

    def step() -> tuple[list[Tensor], int]:
        held: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda kept: held.append(kept.numel()) or kept, lambda kept: kept
        ):
            decoded = decoder(leaves["slots"], keep, target)
        loss = (decoded.reconstruction - target).square().sum()
        return [decoded.reconstruction, *gradients(loss, leaves).values()], sum(held)

    (plain_values, plain_held), decoder.recompute = step(), True
    values, held = step()
    assert len(values) == 1 + len(leaves) and held < plain_held
    assert all(distance(mine, theirs) <= 1e-12 for mine, theirs in zip(values, plain_values, strict=True))


@each_decoder
def test_a_graph_is_exported_for_any_batch(kind: str) -> None:
    decoder = build(kind)
    arguments = (normal(2, 3, 5), some_kept(2, 3, 0), target_of(decoder, 2))
    batch = torch.export.Dim("batch")
    shapes = {"slots": {0: batch}, "keep": {0: batch}, "target": {0: batch}}
    exported = torch.export.export(decoder, arguments, dynamic_shapes=shapes).module()
    more = (normal(5, 3, 5), some_kept(5, 3, 0), target_of(decoder, 5))
    for mine, theirs in zip(exported(*more), decoder(*more), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or distance(mine, theirs) <= 1e-12


WIDE: dict[str, Callable[[], Decoder]] = {
    "spatial": lambda: SpatialBroadcastDecoder(64, 12),
    "upsampling": lambda: UpsamplingBroadcastDecoder(64, 16, strides=(2, 2, 1)),
    "mlp": lambda: MLPPatchDecoder(64, 48, 6, 512),
    "transformer": lambda: TransformerDecoder(64, 48, 6, 96),
}


class RoundedOnce(TorchDispatchMode):
    """Products of bfloat16 tensors are summed in float64 and rounded once, the best that the format allows.

    What a processor's own sums add to that is torch's: without instructions for bfloat16 its transposed convolution
    rounds between the taps.
    """

    products = frozenset(getattr(torch.ops.aten, name) for name in ("convolution", "mm", "addmm", "bmm", "baddbmm"))

    def __init__(self) -> None:
        super().__init__()
        self.rounded = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket not in self.products or args[0].dtype != torch.bfloat16:
            return operation(*args, **(kwargs or {}))
        self.rounded += 1
        exact = [part.double() if isinstance(part, Tensor) else part for part in args]
        return operation(*exact, **(kwargs or {})).bfloat16()


@each_decoder
def test_in_bf16_mixture_and_softmax_stay_in_fp32(kind: str) -> None:
    torch.manual_seed(0)
    decoder = WIDE[kind]()
    slots, keep = normal(2, 5, 64).float(), some_kept(2, 5, 0).float()
    target = normal(2, 48, 6, 6).float() if kind == "transformer" else None
    with torch.no_grad():
        whole = decoder(slots, keep, target)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = decoder(slots, keep, target)
            with RoundedOnce() as layers:
                best = decoder(slots, keep, target)
    assert all(part is None or (part.dtype == torch.float32 and part.isfinite().all()) for part in rounded)
    assert (rounded.masks.sum(dim=1) - 1).abs().max() <= 1e-4  # half precision is off by 4e-3
    assert layers.rounded >= 3
    assert 0 < distance(best.reconstruction, whole.reconstruction) <= 1e-2
    assert 0 < distance(best.masks, whole.masks) <= 1e-2
    assert distance(rounded.reconstruction, best.reconstruction) <= 1e-2  # what this processor's sums add
    assert distance(rounded.masks, best.masks) <= 1e-2
    if rounded.pictures is not None and rounded.mask_logits is not None:
        # the published mixture of what the layers drew, in float64
        shares = rounded.mask_logits.double().softmax(dim=1) * keep[:, :, None, None]
        shares = shares / (shares.sum(dim=1, keepdim=True) + 1e-5)
        assert distance(rounded.masks.double(), shares) <= 1e-6
        mixed = (shares[:, :, None] * rounded.pictures.double()).sum(dim=1)
        assert distance(rounded.reconstruction.double(), mixed) <= 1e-6


@each_decoder
@pytest.mark.parametrize(
    ("name", "slots", "keep"),
    [
        ("slots", (2, 3, 4), (2, 3)),
        ("slots", (3, 5), (3,)),
        ("slots", (2, 0, 5), (2, 0)),
        ("keep", (2, 3, 5), (2, 4)),
        ("keep", (2, 3, 5), (3, 3)),
    ],
)
def test_what_does_not_fit_is_named(kind: str, name: str, slots: tuple[int, ...], keep: tuple[int, ...]) -> None:
    decoder = DECODERS[kind](5, (3, 4))
    with pytest.raises(ValueError, match=rf"^{name}: shape \("):
        decoder(torch.zeros(slots), torch.zeros(keep), target_of(decoder, 2).float())
