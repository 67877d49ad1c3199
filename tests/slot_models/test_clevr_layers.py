"""The GPU benchmark of CLEVR's autoencoder, in small: its layers are all of the step, and their forms do the same."""

import pytest
import torch
from slot_oracles import distance
from torch import Tensor

from benchmarks.clevr_layers import SMALL, Form, as_convolution, clevr, layers, sub_pixels, transposed
from benchmarks.gpu_autoencoder import gigaflops, layer_step, report, training_step
from slot_models.same_padding import TurnedConvTranspose2d


def test_the_layers_arithmetic_adds_up_to_the_steps() -> None:
    model = clevr(SMALL)
    parts = [gigaflops(layer_step(layer, next(iter(layer.forms.values())))) for layer in layers(model, SMALL)]
    assert sum(parts) == pytest.approx(gigaflops(training_step(model, SMALL, model)), rel=1e-12)


@pytest.mark.parametrize("name", [layer.name for layer in layers(clevr(SMALL), SMALL)])
def test_the_forms_of_a_layer_do_the_same(name: str) -> None:
    (layer,) = (layer for layer in layers(clevr(SMALL), SMALL) if layer.name == name)
    inputs = layer.inputs()
    results = [form(*inputs, *layer.weights).float() for form in layer.forms.values()]
    assert all(distance(result, results[0]) <= 2e-2 for result in results)  # in half precision


@pytest.mark.parametrize(("kernel", "stride"), [(5, 2), (3, 2), (2, 2), (5, 3), (3, 3), (7, 4), (5, 1), (3, 1)])
def test_a_transposed_convolution_is_one_to_sub_pixels(kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    layer = TurnedConvTranspose2d(3, 2, kernel, stride).double()
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    forms = [transposed(layer), sub_pixels(layer), *([as_convolution] if stride == 1 else [])]

    def results(form: Form) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (image, layer.weight, layer.bias)]
        result = form(*leaves)
        return [result, *torch.autograd.grad(result.sin().sum(), leaves)]

    expected = results(forms[0])
    assert distance(layer(image), expected[0]) <= 1e-12
    for form in forms[1:]:
        assert all(distance(mine, theirs) <= 1e-12 for mine, theirs in zip(results(form), expected, strict=True))


def test_the_report_in_small_has_a_row_for_every_layer() -> None:
    text = report(SMALL)
    assert all(f"| {layer.name} |" in text for layer in layers(clevr(SMALL), SMALL))
    assert "| eager |" in text and "nan" not in text
