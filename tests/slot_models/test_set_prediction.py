"""Set prediction: targets and loss against loops and exhaustive matching, the model against its parts."""

import sys
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from slot_models.attention import SlotAttention
from slot_models.average_precision import average_precision
from slot_models.matching import match
from slot_models.set_prediction import SetClassifier, SetPredictor, build_set_predictor, clevr_targets, set_loss

CLASSES = {"size": 2, "material": 2, "shape": 3, "colour": 8}
SEEDS = st.integers(0, 2**32)


def random_sets(seed: int, batch: int, rows: int, numbers: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Predictions and targets, far enough apart to meet both parts of the Huber error."""
    random = np.random.default_rng(seed)
    return tuple(torch.from_numpy(random.normal(scale=spread, size=(batch, rows, numbers))) for _ in range(2))  # type: ignore[return-value]


def huber(x: float, y: float) -> float:
    difference = abs(x - y)
    return difference**2 / 2 if difference <= 1 else difference - 0.5


def cost_by_hand(predictions: Tensor, targets: Tensor) -> np.ndarray:
    """[K, P], [K, P] -> [K, K]"""
    return np.array(
        [
            [np.mean([huber(x, y) for x, y in zip(p, t, strict=True)]) for t in targets.tolist()]
            for p in predictions.tolist()
        ]
    )


@given(seed=SEEDS, batch=st.integers(0, 4), rows=st.integers(1, 6), columns=st.integers(1, 6))
@settings(max_examples=50, deadline=None)
def test_a_matching_is_one_to_one_and_the_best_of_all(seed: int, batch: int, rows: int, columns: int) -> None:
    cost = torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, (batch, rows, columns)).astype(float))
    row, column = match(cost)
    assert row.shape == column.shape == (batch, min(rows, columns)) and row.dtype == column.dtype == torch.int64
    for one, i, j in zip(cost.numpy(), row.numpy(), column.numpy(), strict=True):
        assert len(set(i)) == len(set(j)) == min(rows, columns) and list(i) == sorted(i)
        wide = one if rows <= columns else one.T
        every = (
            sum(wide[n, m] for n, m in enumerate(choice)) for choice in permutations(range(wide.shape[1]), len(wide))
        )
        assert one[i, j].sum() == min(every)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_cost_that_is_no_number_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^cost: it holds NaN or infinity"):
        match(torch.tensor([[[0.0, bad], [1.0, 2.0]]]))
    with pytest.raises(ValueError, match=r"^cost: shape \(2, 2\) is not \[B, N, M\]"):
        match(torch.zeros(2, 2))


@given(seed=SEEDS, batch=st.integers(1, 3), rows=st.integers(1, 5), numbers=st.integers(1, 19))
@settings(max_examples=40, deadline=None)
def test_the_loss_is_the_least_huber_error_over_all_permutations(
    seed: int, batch: int, rows: int, numbers: int
) -> None:
    predictions, targets = random_sets(seed, batch, rows, numbers)
    loss = set_loss(predictions, targets)
    assert loss.shape == (batch,) and loss.dtype == torch.float64
    for value, p, t in zip(loss.tolist(), predictions, targets, strict=True):
        cost = cost_by_hand(p, t)
        every = [sum(cost[k, n] for k, n in enumerate(order)) for order in permutations(range(rows))]
        assert value == pytest.approx(min(every), rel=1e-12, abs=1e-12)


def test_the_loss_of_ten_rows_is_scipys_assignment_of_torchs_huber_error() -> None:
    predictions, targets = random_sets(0, 6, 10, 19)
    for value, p, t in zip(set_loss(predictions, targets), predictions, targets, strict=True):
        cost = torch.stack(
            [torch.stack([nn.functional.huber_loss(p[k], t[n], delta=1.0) for n in range(10)]) for k in range(10)]
        )
        rows, columns = linear_sum_assignment(cost.numpy())
        assert float(value) == pytest.approx(float(cost[rows, columns].sum()), rel=1e-12)


@given(seed=SEEDS, rows=st.integers(1, 6), order=st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_sets_have_no_order_and_images_do_not_meet(seed: int, rows: int, order: Any) -> None:
    predictions, targets = random_sets(seed, 4, rows, 7)
    loss = set_loss(predictions, targets)
    shuffled, other = (torch.tensor(order.sample(range(rows), rows)) for _ in range(2))
    images = torch.tensor(order.sample(range(4), 4))
    torch.testing.assert_close(set_loss(predictions[:, shuffled], targets[:, other]), loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(set_loss(predictions[images], targets[images]), loss[images], rtol=1e-12, atol=1e-12)
    alone = torch.cat([set_loss(predictions[i : i + 1], targets[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(alone, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(set_loss(targets[:, shuffled], targets), torch.zeros(4).double(), rtol=0, atol=0)


def test_the_gradient_is_that_of_the_matched_pairs() -> None:
    predictions, targets = random_sets(1, 2, 4, 5)
    predictions.requires_grad_()
    targets.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: set_loss(x, targets.detach()), predictions)
    assert torch.autograd.gradcheck(lambda y: set_loss(predictions.detach(), y), targets)

    (gradient,) = torch.autograd.grad(set_loss(predictions, targets).sum(), predictions)
    for image in range(2):
        cost = cost_by_hand(predictions[image], targets[image])
        best = min(permutations(range(4)), key=lambda order: sum(cost[k, n] for k, n in enumerate(order)))
        difference = predictions[image] - targets[image, list(best)]
        # the derivative of a Huber error is the difference, cut off at delta; the mean divides it by 5
        torch.testing.assert_close(gradient[image], difference.detach().clamp(-1, 1) / 5, rtol=1e-12, atol=1e-12)


def test_a_weighted_sum_of_losses_gives_each_image_its_weight() -> None:
    """The training loop takes sum(weight * loss), with weight 0 for padding."""
    predictions, targets = random_sets(2, 3, 4, 5)
    predictions.requires_grad_()
    (gradient,) = torch.autograd.grad(
        (torch.tensor([0.5, 0.0, 2.0]) * set_loss(predictions, targets)).sum(), predictions
    )
    (plain,) = torch.autograd.grad(set_loss(predictions, targets).sum(), predictions)
    torch.testing.assert_close(gradient, plain * torch.tensor([0.5, 0.0, 2.0])[:, None, None], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_in_full_precision(dtype: torch.dtype) -> None:
    predictions, targets = (values.to(dtype) for values in random_sets(3, 3, 6, 19))
    loss = set_loss(predictions, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), set_loss(predictions.double(), targets.double()), rtol=1e-6, atol=0)


SETS = torch.zeros(2, 3, 19)


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        (SETS[0], SETS, r"^predictions: shape \(3, 19\) is not \[B, K, P\]"),
        (SETS[:, :0], SETS, r"^predictions: shape \(2, 0, 19\) has no slots"),
        (SETS[..., :0], SETS, r"^predictions: shape \(2, 3, 0\) has no slots or no numbers"),
        (SETS, SETS[:, :2], r"^targets: shape \(2, 2, 19\) is not \[2, 3, 19\]"),
        (SETS, SETS[:1], r"^targets: shape \(1, 3, 19\) is not"),
        (SETS, SETS[..., :18], r"^targets: shape \(2, 3, 18\) is not"),
        (SETS * torch.nan, SETS, r"^predictions: it holds NaN"),
        (SETS, SETS + torch.inf, r"^targets: it holds NaN or infinity"),
    ],
)
def test_what_is_wrong_with_the_sets_is_named(predictions: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_loss(predictions, targets)


def test_the_loss_without_scipy_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r'pip install "slotforge\[models\]"'):
        set_loss(SETS, SETS)


def random_factors(seed: int, batch: int, entries: int) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    factors = {"coordinates": random.uniform(-3, 3, (batch, entries, 3))}
    factors |= {name: random.integers(0, classes, (batch, entries)) for name, classes in CLASSES.items()}
    return {name: torch.from_numpy(values) for name, values in factors.items()}


@given(seed=SEEDS, batch=st.integers(1, 3), entries=st.integers(0, 12), rows=st.integers(1, 12))
@settings(max_examples=50, deadline=None)
def test_targets_are_rows_of_coordinates_and_one_hot_factors(seed: int, batch: int, entries: int, rows: int) -> None:
    factors = random_factors(seed, batch, entries)
    real = np.random.default_rng(seed + 1).random((batch, entries)) < 0.5
    for image in real:  # at most ``rows`` objects
        image[np.flatnonzero(image)[rows:]] = False
    absent = torch.from_numpy(~real)
    factors["coordinates"][absent] = torch.nan  # what is no object may hold anything
    factors["shape"][absent] = 255
    targets = clevr_targets(**factors, real=torch.from_numpy(real), rows=rows)
    assert targets.shape == (batch, rows, 19) and targets.dtype == torch.float64
    for image in range(batch):
        expected = np.zeros((rows, 19))
        for row, entry in zip(expected, np.flatnonzero(real[image]), strict=False):
            row[0:3] = (factors["coordinates"][image, entry].numpy() + 3) / 6
            row[3 + factors["size"][image, entry]] = 1
            row[5 + factors["material"][image, entry]] = 1
            row[7 + factors["shape"][image, entry]] = 1
            row[10 + factors["colour"][image, entry]] = 1
            row[18] = 1
        np.testing.assert_allclose(targets[image], expected, rtol=0, atol=1e-15)


def test_every_entry_is_real_by_default_and_float32_stays() -> None:
    factors = random_factors(0, 2, 4)
    factors["coordinates"] = factors["coordinates"].float()
    targets = clevr_targets(**factors)
    assert targets.shape == (2, 10, 19) and targets.dtype == torch.float32
    assert targets[..., 18].tolist() == [[1.0] * 4 + [0.0] * 6] * 2
    assert targets.sum(dim=2)[:, 4:].abs().sum() == 0


def changed(**changes: Tensor) -> dict[str, Any]:
    return random_factors(0, 2, 4) | changes


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (changed(coordinates=torch.zeros(2, 4, 2)), r"^coordinates: shape \(2, 4, 2\) is not \[B, N, 3\]"),
        (changed(size=torch.zeros(2, 3).long()), r"^size: shape \(2, 3\) is not \[2, 4\]"),
        (changed(material=torch.zeros(2, 4)), r"^material: dtype torch.float32"),
        (changed(shape=torch.full((2, 4), 3)), r"^shape: 3 is not in 0..2"),
        (changed(colour=torch.full((2, 4), -1)), r"^colour: -1 is not in 0..7"),
        (changed(coordinates=torch.full((2, 4, 3), torch.nan)), r"^coordinates: those of an object are NaN"),
        (changed(real=torch.ones(2, 3).bool()), r"^real: shape \(2, 3\) is not \[2, 4\]"),
        (changed(real=torch.ones(2, 4)), r"^real: dtype torch.float32 is not torch.bool"),
        (changed() | {"rows": 3}, r"^real: an image has 4 objects, more than rows: 3"),
        (changed() | {"rows": 0}, r"^rows: 0 is not positive"),
    ],
)
def test_what_is_wrong_with_the_factors_is_named(factors: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clevr_targets(**factors)


def test_the_classifier_is_a_layer_of_relu_and_one_of_sigmoid() -> None:
    torch.manual_seed(0)
    classifier = SetClassifier().double()
    first, _, second = classifier.mlp
    assert [tuple(p.shape) for p in classifier.parameters()] == [(64, 64), (64,), (19, 64), (19,)]
    slots = torch.randn(2, 10, 64, dtype=torch.float64)
    hidden = (slots @ first.weight.T + first.bias).clamp(min=0)
    expected = 1 / (1 + (-(hidden @ second.weight.T + second.bias)).exp())
    torch.testing.assert_close(classifier(slots), expected, rtol=1e-12, atol=1e-12)
    assert classifier.bfloat16()(slots.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"^slots: shape \(2, 10, 32\) is not \[B, K, 64\]"):
        classifier(slots[..., :32])
    with pytest.raises(ValueError, match=r"^hidden: 0 is not positive"):
        SetClassifier(hidden=0)


def test_the_default_predictor_has_the_published_sizes() -> None:
    predictor = build_set_predictor()
    assert predictor.encoder(torch.zeros(1, 3, 128, 128)).shape == (1, 32 * 32, 64)
    assert predictor.slot_attention.num_slots == 10 and predictor.slot_attention.iters == 3
    count = sum(parameter.numel() for parameter in predictor.parameters())
    convolutions = (3 * 25 * 64 + 64) + 3 * (64 * 25 * 64 + 64)
    encoder = convolutions + (4 * 64 + 64) + 2 * 64 + 2 * (64 * 64 + 64)
    gru = 2 * (3 * 64 * 64 + 3 * 64)
    attention = 2 * 64 + 3 * 64 * 64 + 3 * 2 * 64 + gru + (64 * 128 + 128) + (128 * 64 + 64)
    assert count == encoder + attention + (64 * 64 + 64) + (64 * 19 + 19)


def small_predictor() -> SetPredictor:
    torch.manual_seed(0)
    encoder = {"encoder_channels": 16, "encoder_kernel": 3, "encoder_strides": (1, 2)}
    return build_set_predictor(8, 4, slot_dim=16, hidden_dim=16, classifier_hidden=16, **encoder)


def test_a_predictor_is_its_three_parts() -> None:
    predictor = small_predictor()
    images, noise = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 4, 16)
    slots = predictor.slot_attention(predictor.encoder(images), noise=noise)
    predictions = predictor(images, noise)
    assert predictions.shape == (3, 4, 19)
    assert torch.equal(predictions, predictor.classifier(slots))
    assert not torch.equal(predictions, predictor(images))
    assert torch.equal(predictor(images), predictor(images))  # no noise: a fixed draw
    torch.testing.assert_close(predictor(images[1:2]), predictor(images)[1:2])
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(predictor(images, noise[:, order]), predictions[:, order])

    parts = SetPredictor(nn.Flatten(2), SlotAttention(2, 4, input_dim=6), SetClassifier(4, 6, 7))
    assert parts(torch.rand(5, 3, 2, 3)).shape == (5, 2, 7)  # the encoder and the rest are the caller's


@pytest.mark.parametrize("name", ["images", "slot_noise"])
def test_what_a_predictor_is_given_and_is_not_finite_is_named(name: str) -> None:
    given = {"images": torch.zeros(2, 3, 8, 8), "slot_noise": torch.zeros(2, 4, 16)}
    given[name][1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=f"^{name}: it holds NaN or infinity"):
        small_predictor()(**given)


def test_a_predictor_learns_a_few_sets_by_heart() -> None:
    """Gradients reach every parameter, and what the loss asks for is what the average precision counts."""
    predictor = small_predictor()
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    targets = clevr_targets(**random_factors(5, 3, 2), rows=4).float()
    optimizer = torch.optim.Adam(predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = set_loss(predictor(images), targets).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(bool(parameter.grad.abs().sum() > 0) for parameter in predictor.parameters())
    assert losses[-1] < losses[0] / 100
    assert average_precision(predictor(images), targets, [float("inf")]).tolist() == [1.0]
