"""The published Tetrominoes model, the demo recipe's and models of features: from image to reconstruction."""

from typing import Any

import pytest
import torch
from autoencoders import DEMO, SMALL, blocks, build, loss_of, noises, parts
from slot_oracles import distance
from torch import Tensor

from slot_models.adaptive import Stage
from slot_models.build import build_autoencoder

PUBLISHED = {"image_size": 35, "num_slots": 4}
CODEBOOK = PUBLISHED | {"attention": {"kind": "heads", "gradient": "bilevel"}, "codebook": {"size": 9}}
MODELS = {"tetrominoes": PUBLISHED, "with a gate": PUBLISHED | {"gate": {}}, "demo": DEMO, "codebook": CODEBOOK}


each_model = pytest.mark.parametrize("sizes", list(MODELS.values()), ids=list(MODELS))


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
