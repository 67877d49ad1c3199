"""The published Tetrominoes model, the demo recipe's and models of features: from image to reconstruction."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from einops import einsum
from slot_oracles import distance, randomise
from torch import Tensor, nn
from torch.nn import functional

from slot_models.adaptive import SlotGate, Stage
from slot_models.attention import SlotAttention
from slot_models.autoencoder import SlotAutoencoder, SlotOutput
from slot_models.build import build_autoencoder
from slot_models.decoders import Decoded
from slot_models.encoders import FeatureEncoder
from slot_models.patch_decoders import MLPPatchDecoder
from slot_models.transformer_decoder import TransformerDecoder

DEMO = yaml.safe_load((Path(__file__).parents[2] / "recipes" / "demo.yaml").read_text())["model"]
for part, kind in (("encoder", "conv"), ("attention", "slots"), ("decoder", "broadcast")):
    DEMO[part]["kind"] = kind
PUBLISHED = {"image_size": 35, "num_slots": 4}
CODEBOOK = PUBLISHED | {"attention": {"kind": "heads", "gradient": "bilevel"}, "codebook": {"size": 9}}
MODELS = {"tetrominoes": PUBLISHED, "with a gate": PUBLISHED | {"gate": {}}, "demo": DEMO, "codebook": CODEBOOK}
SMALL = {
    "image_size": 9,
    "num_slots": 5,
    "slot_dim": 8,
    "encoder": {"kind": "conv", "strides": (3, 1), "padding": "centred"},
    "attention": {"kind": "slots", "hidden_dim": 8},
    "gate": {},
}
each_model = pytest.mark.parametrize("sizes", list(MODELS.values()), ids=list(MODELS))


def build(sizes: dict[str, Any], seed: int = 0) -> SlotAutoencoder:
    torch.manual_seed(seed)
    return build_autoencoder(**sizes)


def blocks(count: int, size: int) -> Tensor:
    """Images with two coloured blocks on grey, in [-1, 1]: float32 [count, 3, size, size]."""
    generator = torch.Generator().manual_seed(1)
    images = torch.full((count, 3, size, size), -0.5)
    for image in images:
        for _ in range(2):
            top, left = torch.randint(0, size - size // 3, (2,), generator=generator).tolist()
            colour = torch.randint(0, 2, (3, 1, 1), generator=generator) * 2.0 - 1
            image[:, top : top + size // 3, left : left + size // 3] = colour
    return images


def noises(sizes: dict[str, Any], batch: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randn(batch, sizes["num_slots"], sizes.get("slot_dim", 64), generator=generator)
    uniform = torch.rand(batch, sizes["num_slots"], 2, generator=generator).clamp(1e-6, 1 - 1e-6)
    return slots, -(-uniform.log()).log()


def parts(output: SlotOutput) -> list[Tensor]:
    """What it says of each image."""
    return [part for part in output._replace(code_tally=None) if part is not None]


def loss_of(output: SlotOutput, images: Tensor, keep_weight: float) -> Tensor:
    assert images.shape[2:] != output.target.shape[2:] or output.target is images
    error = (output.reconstruction - output.target).square().mean()
    return error + keep_weight * output.keep.mean() + output.auxiliary.mean()


@each_model
@pytest.mark.parametrize("stage", ["open", "random", "deciding"])
@pytest.mark.parametrize("keep_weight", [0.0, 0.1])
def test_every_parameter_gets_a_gradient(sizes: dict[str, Any], stage: Stage, keep_weight: float) -> None:
    model, images = build(sizes), blocks(2, sizes["image_size"])
    output = model(images, *noises(sizes, 2), stage=stage)
    assert stage != "open" or (output.keep == 1).all()
    loss_of(output, images, keep_weight).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.startswith("gate.") and stage != "deciding":
            assert (parameter.grad == 0).all(), name
        elif name != "slot_attention.norm_slots.bias":  # shared by all slots, so their softmax does not see it
            assert parameter.grad.abs().max() > 0, name


@each_model
def test_the_result_of_an_image_does_not_depend_on_its_batch(sizes: dict[str, Any]) -> None:
    model, images = build(sizes).double(), blocks(3, sizes["image_size"]).double()
    slot_noise, gate_noise = noises(sizes, 3)
    with torch.no_grad():
        for arguments in ((), (slot_noise, gate_noise)):
            together = model(images, *arguments)
            for row in (0, 2):
                alone = model(images[row : row + 1], *(noise[row : row + 1] for noise in arguments))
                for part, of_batch in zip(parts(alone), parts(together), strict=True):
                    assert distance(part[0], of_batch[row]) <= 1e-10


@each_model
def test_without_noise_a_result_is_a_function_of_image_and_weights(sizes: dict[str, Any]) -> None:
    model, images = build(sizes), blocks(2, sizes["image_size"])
    copy = build(sizes, seed=9)
    copy.load_state_dict(model.state_dict())
    with torch.no_grad():
        for training in (True, False):
            state, first = torch.get_rng_state(), model.train(training)(images)
            assert torch.equal(torch.get_rng_state(), state)
            assert all(
                torch.equal(a, b) for a, b in zip(parts(copy.train(training)(images)), parts(first), strict=True)
            )


@each_model
def test_an_output_has_the_documented_shapes_and_values(sizes: dict[str, Any]) -> None:
    batch, num_slots, size = 2, sizes["num_slots"], sizes["image_size"]
    output = build(sizes)(blocks(batch, size), *noises(sizes, batch))
    assert {name: None if part is None else tuple(part.shape) for name, part in output._asdict().items()} == {
        "slots": (batch, num_slots, sizes.get("slot_dim", 64)),
        "keep": (batch, num_slots),
        "keep_probability": (batch, num_slots),
        "masks": (batch, num_slots, size, size),
        "pictures": (batch, num_slots, 3, size, size),
        "reconstruction": (batch, 3, size, size),
        "target": (batch, 3, size, size),
        "auxiliary": (batch,),
        "code_tally": (9, 65) if "codebook" in sizes else None,
        "attention": None,
    }
    assert (output.auxiliary == 0).all()
    assert set(output.keep.unique().tolist()) <= {0.0, 1.0} and (output.keep.sum(dim=1) >= 1).all()
    assert ((output.keep_probability >= 0) & (output.keep_probability <= 1)).all()
    assert (output.masks >= 0).all() and (output.masks.sum(dim=1) <= 1 + 1e-6).all()
    if "gate" not in sizes and "codebook" not in sizes:
        assert (output.keep == 1).all() and (output.keep_probability == 1).all()
        assert (output.masks.sum(dim=1) - 1).abs().max() <= 2e-5


def half_dropped(seed: int, **options: Any) -> tuple[SlotAutoencoder, tuple[Tensor, Tensor, Tensor]]:
    """A model in float64, and images and noises with which its gate keeps some slots and drops others."""
    model = build(SMALL | options, seed).double()
    randomise(model, seed)
    slot_noise, gate_noise = noises(SMALL, 6, seed)
    arguments = (blocks(6, 9).double(), slot_noise.double(), gate_noise.double())
    keep = model(*arguments).keep
    assert 0 < keep.mean() < 1
    return model, arguments


@pytest.mark.parametrize("seed", range(3))
def test_a_reconstruction_mixes_the_pictures_of_the_kept_slots_alone(seed: int) -> None:
    model, arguments = half_dropped(seed)
    output = model(*arguments)
    _, mask_logits = model.decoder.decode(output.slots)
    for image in range(6):
        kept = output.keep[image] > 0.5
        weights = mask_logits[image, kept].softmax(dim=0)
        share = mask_logits[image].softmax(dim=0)[kept].sum(dim=0)
        expected = einsum(weights, output.pictures[image, kept], "k h w, k c h w -> c h w") * share / (share + 1e-5)
        assert distance(output.reconstruction[image], expected) <= 1e-10
        assert (output.masks[image, ~kept] == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_what_a_dropped_slot_paints_has_no_effect_on_the_reconstruction(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, arguments = half_dropped(seed)
    before = model(*arguments)
    dropped = before.keep < 0.5

    decode = model.decoder.decode

    def repaint(slots: Tensor) -> tuple[Tensor, Tensor]:
        pictures, mask_logits = decode(slots)
        return pictures + 1e3 * dropped[:, :, None, None, None], mask_logits

    monkeypatch.setattr(model.decoder, "decode", repaint)
    after = model(*arguments)
    assert not torch.equal(after.pictures, before.pictures)
    assert torch.equal(after.reconstruction, before.reconstruction)


def error_of(images: Tensor, pictures: Tensor, mask_logits: Tensor, keep: Tensor) -> Tensor:
    """Of the paper's mixture: mean squared error over an image's values. [B]"""
    alpha = mask_logits.softmax(dim=1) * keep[:, :, None, None]
    mixed = einsum(alpha, pictures, "b k h w, b k c h w -> b c h w") / (alpha.sum(dim=1)[:, None] + 1e-5)
    return (mixed - images).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep_weight", [0.0, 0.3])
def test_the_gate_learns_from_the_slope_of_the_error_or_from_the_difference_a_decision_makes(
    seed: int, keep_weight: float
) -> None:
    found = {}
    for gate_gradient in ("slope", "difference"):
        model, (images, slot_noise, gate_noise) = half_dropped(seed, gate={"gradient": gate_gradient})
        output = model(images, slot_noise, gate_noise, temperature=0.7)
        bias = model.gate.logits.bias
        (found[gate_gradient],) = torch.autograd.grad(6 * loss_of(output, images, keep_weight), bias)

        # The straight-through gradient, with what stands for d error / d keep worked out apart.
        keep = model.gate(output.slots.detach(), gate_noise, 0.7).keep
        error = partial(error_of, images, *(part.detach() for part in model.decoder.decode(output.slots)))
        if gate_gradient == "slope":
            effect = torch.autograd.functional.jacobian(lambda kept, error=error: error(kept).sum(), keep.detach())
        else:
            columns = [[keep.detach().index_fill(1, torch.tensor(k), value) for value in (1, 0)] for k in range(5)]
            effect = torch.stack([error(kept) - error(dropped) for kept, dropped in columns], dim=1)
        (expected,) = torch.autograd.grad(((effect + keep_weight / 5) * keep).sum(), bias)
        assert distance(found[gate_gradient], expected) <= 1e-8
    assert distance(found["slope"], found["difference"]) > 0.01


def test_noise_reaches_the_slots_and_the_gate_and_the_gates_gradient_reaches_the_slots() -> None:
    model, (images, slot_noise, gate_noise) = half_dropped(0)
    output = model(images, slot_noise, gate_noise)
    slots = model.slot_attention(model.encoder(images), noise=slot_noise)
    decided = model.gate(slots, gate_noise)
    assert torch.equal(output.slots, slots) and torch.equal(output.keep, decided.keep)
    assert torch.equal(output.keep_probability, decided.probability)
    ways = [torch.autograd.grad(keep.sum(), model.encoder.mlp[2].weight)[0] for keep in (output.keep, decided.keep)]
    assert distance(*ways) <= 1e-10 and ways[1].abs().max() > 0


def test_the_temperature_reaches_the_gate_and_changes_no_value() -> None:
    model, arguments = half_dropped(0)
    found = []
    for temperature in (0.5, 1.0):
        output = model(*arguments, temperature=temperature)
        (gradient,) = torch.autograd.grad(output.keep.sum(), model.gate.logits.bias, retain_graph=True)
        found.append((output.reconstruction, gradient))
    assert torch.equal(found[0][0], found[1][0]) and distance(found[0][1], found[1][1]) > 0.01


def test_the_published_tetrominoes_model_has_the_parameters_of_its_tables() -> None:
    def conv(kernel: int, inputs: int, outputs: int) -> int:
        return kernel**2 * inputs * outputs + outputs

    def dense(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    def norm(width: int) -> int:
        return 2 * width

    position = {32: dense(4, 32), 64: dense(4, 64)}
    encoder = conv(5, 3, 32) + 3 * conv(5, 32, 32) + position[32] + norm(32) + 2 * dense(32, 32)
    initial, projections = 2 * 64, 64 * 64 + 2 * 32 * 64  # mu, log_sigma; q, k, v
    gru = 2 * 3 * (64 * 64 + 64)  # kernel and recurrent kernel, each with a bias, of three gates
    mlp = norm(64) + dense(64, 128) + dense(128, 64)
    attention = initial + norm(32) + norm(64) + projections + gru + mlp
    decoder = position[64] + conv(5, 64, 32) + 2 * conv(5, 32, 32) + conv(3, 32, 4)
    gate = norm(64) + dense(64, 4 * 64) + dense(4 * 64, 2)
    assert (encoder, attention, decoder, gate) == (81_664, 50_176, 103_972, 17_282)

    def count(model: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    published, gated = build(PUBLISHED), build(PUBLISHED | {"gate": {}})
    assert (count(published.encoder), count(published.slot_attention), count(published.decoder)) == (
        encoder,
        attention,
        decoder,
    )
    assert count(published) == encoder + attention + decoder == 235_812
    assert count(gated) == count(published) + gate


def test_a_model_that_diverges_shows_in_its_loss() -> None:
    model, images = build(SMALL), blocks(2, 9)
    with torch.no_grad():
        model.encoder.mlp[2].bias[0] = torch.inf
    assert not loss_of(model(images, *noises(SMALL, 2)), images, 0.0).isfinite()


@pytest.mark.parametrize("name", ["images", "slot_noise", "gate_noise", "input_noise"])
def test_what_is_given_and_is_not_finite_is_named(name: str) -> None:
    model = build(SMALL | ({"gate": None, "codebook": {"size": 4}} if name == "input_noise" else {}))
    given: dict[str, Tensor] = {"images": blocks(2, 9)} | dict(
        zip(("slot_noise", "gate_noise"), noises(SMALL, 2), strict=True)
    )
    given["input_noise"] = torch.zeros(2, 2, 3, 9, 32)
    given[name][1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match=f"^{name}: it holds NaN or infinity"):
        model(**given)


def test_a_gate_gradient_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"^gate_gradient: 'steep' is none of slope, difference"):
        build(SMALL | {"gate": {"gradient": "steep"}})


@each_model
def test_a_few_optimiser_steps_reduce_the_loss(sizes: dict[str, Any]) -> None:
    model, images = build(sizes), blocks(2, sizes["image_size"])
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-4)
    losses = []
    for step in range(12):
        loss = loss_of(model(images, *noises(sizes, 2, step)), images, 0.0)
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert min(losses[-3:]) < 0.75 * losses[0], losses


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("decoder.patch", {"decoder": {"kind": "broadcast", "patch": 2}}),
        ("strides", {"encoder": {"kind": "conv", "strides": (2,)}}),
        ("kernel", {"encoder": {"kind": "conv", "kernel": 4}}),
        ("kernel", {"decoder": {"kind": "broadcast", "kernel": 11}}),
        ("output_kernel", {"decoder": {"kind": "broadcast", "output_kernel": 11}}),
        ("mixture_eps", {"decoder": {"kind": "broadcast", "mixture_eps": -1.0}}),
        ("num_slots", {"num_slots": 0}),
        ("iters", {"attention": {"kind": "slots", "iters": 0}}),
        ("encoder.kind", {"encoder": {"kind": "cnn"}}),
        ("attention.kind", {"attention": {"iters": 2}}),
        ("decoder", {"decoder": {"kind": "mlp"}}),
        ("codebook", {"codebook": {}}),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_named(name: str, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        build(SMALL | sizes)


class Patches(nn.Module):
    """Stands for a vision transformer: each 3 x 3 pixels of an image of 9 x 12 to six features."""

    dim, grid = 6, (3, 4)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, self.dim, 3, 3).requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.embed(images).flatten(2).transpose(1, 2)  # [B, N, F]


FEATURE_DECODERS = {
    "mlp": lambda: MLPPatchDecoder(8, 6, Patches.grid, 16),
    "transformer": lambda: TransformerDecoder(8, 6, Patches.grid, 32, 1, 2),
}


def of_features(kind: str, iters: int = 3, **options: Any) -> SlotAutoencoder:
    torch.manual_seed(0)
    attention = SlotAttention(4, 8, iters, hidden_dim=8, input_dim=10)
    decoder = FEATURE_DECODERS[kind]()
    model = SlotAutoencoder(FeatureEncoder(6, 10), attention, SlotGate(8), decoder, backbone=Patches(), **options)
    return model.double()


def scene(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    slot_noise, gate_noise = noises({"num_slots": 4, "slot_dim": 8}, batch)
    images = torch.randn(batch, 3, 9, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return images, slot_noise.double(), gate_noise.double()


@pytest.mark.parametrize("kind", FEATURE_DECODERS)
def test_with_a_backbone_its_features_are_encoded_and_reconstructed(kind: str) -> None:
    model, (images, slot_noise, gate_noise) = of_features(kind), scene(3)
    output = model(images, slot_noise, gate_noise)
    features = functional.conv2d(images, model.backbone.embed.weight, model.backbone.embed.bias, stride=3)
    assert torch.equal(output.target, features) and not output.target.requires_grad
    assert output.reconstruction.shape == (3, 6, 3, 4) and output.masks.shape == (3, 4, 3, 4)
    assert (output.pictures is None) == (kind == "transformer")

    inputs = model.encoder(features.flatten(2).transpose(1, 2))
    slots = model.slot_attention(inputs, noise=slot_noise)
    keep = model.gate(slots, gate_noise).keep
    assert 0 < keep.mean() < 1
    decoded: Decoded = model.decoder(slots, keep, features)
    assert torch.equal(output.slots, slots) and torch.equal(output.keep, keep)
    assert torch.equal(output.reconstruction, decoded.reconstruction) and torch.equal(output.masks, decoded.masks)


@pytest.mark.parametrize("kind", FEATURE_DECODERS)
@pytest.mark.parametrize("gate_gradient", ["slope", "difference"])
def test_every_parameter_but_the_backbones_learns_from_features(kind: str, gate_gradient: Any) -> None:
    if (kind, gate_gradient) == ("transformer", "difference"):
        with pytest.raises(ValueError, match=r"^gate_gradient: 'difference' needs .* TransformerDecoder draws none"):
            of_features(kind, gate_gradient=gate_gradient)
        return
    model, arguments = of_features(kind, gate_gradient=gate_gradient), scene(3)
    loss_of(model(*arguments), arguments[0], 0.1).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        elif name != "slot_attention.norm_slots.bias":  # shared by all slots, so their softmax does not see it
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_difference_of_a_decision_is_measured_in_the_features() -> None:
    model, (images, slot_noise, gate_noise) = of_features("mlp", gate_gradient="difference"), scene(3)
    output = model(images, slot_noise, gate_noise)
    (found,) = torch.autograd.grad(output.auxiliary.sum(), model.gate.logits.bias)
    pictures, mask_logits = (part.detach() for part in model.decoder.decode(output.slots))
    keep = model.gate(output.slots.detach(), gate_noise).keep
    columns = [[keep.detach().index_fill(1, torch.tensor(k), value) for value in (1, 0)] for k in range(4)]
    effect = torch.stack(
        [
            error_of(output.target, pictures, mask_logits, kept)
            - error_of(output.target, pictures, mask_logits, dropped)
            for kept, dropped in columns
        ],
        dim=1,
    )
    (expected,) = torch.autograd.grad((effect * keep).sum(), model.gate.logits.bias)
    assert distance(found, expected) <= 1e-8 and expected.abs().max() > 0


def test_masks_of_patches_are_resized_to_the_image() -> None:
    model, arguments = of_features("mlp"), scene(2)
    with torch.no_grad():
        output = model(*arguments)
    assert output.masks_at(3, 4) is output.masks
    large = output.masks_at(9, 12)
    assert large.shape == (2, 4, 9, 12) and distance(large.sum(dim=1), torch.ones(2, 9, 12)) <= 1e-4
    # the centre pixel of a patch has the patch's value; half way between two centres would be their mean
    assert distance(large[:, :, 1::3, 1::3], output.masks) <= 1e-12
    thirds = (2 * output.masks[..., :-1] + output.masks[..., 1:]) / 3
    assert distance(large[:, :, 1::3, 2:-1:3], thirds) <= 1e-12


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


@pytest.mark.parametrize(  # one with a backward graph too, which takes as long again
    ("kind", "backend"),
    [("difference", "aot_eager"), ("codebook", "eager"), ("mlp", "eager"), ("transformer", "eager")],
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


@pytest.mark.parametrize("name", ["demo", "codebook", "with a gate"])
@torch.no_grad()
def test_the_traced_attention_ends_with_the_slots_own_and_changes_nothing(name: str) -> None:
    model = build_autoencoder(**MODELS[name]).eval()
    images = blocks(2, MODELS[name]["image_size"])
    plain, traced_output = model(images), model(images, trace=True)
    assert plain.attention is None and traced_output.attention is not None
    assert torch.equal(plain.reconstruction, traced_output.reconstruction)
    attention = model.slot_attention if name != "codebook" else model.slot_attention.slot_attention
    seen = traced_output.attention.flatten(3)  # [B, T, K, N]
    whole = attention(model.encoder(images), return_attention=True).attention
    assert seen.shape == (2, attention.iters, attention.num_slots, whole.shape[-1])
    assert (seen[:, -1] - whole).abs().max() <= 1e-5
    assert (seen.sum(dim=2) - 1).abs().max() <= 1e-5
    assert distance(seen[:, 0], seen[:, -1]) > 1e-3, "an iteration changes it"
