"""Held-out evaluation."""

import pytest
import torch
from sklearn.metrics import adjusted_rand_score, jaccard_score

from orchestration.assembly import Data, build_model, evaluation_batches
from orchestration.evaluate import evaluate
from orchestration.recipe import Recipe


def test_evaluation_is_the_mean_over_images_whatever_the_batches_and_ranks(recipe: Recipe, data: Data) -> None:
    """Against scikit-learn, image by image; ranks and batches only change who adds up what."""
    model = build_model(recipe).eval()
    stream, steps = evaluation_batches(recipe, data.eval)
    with stream:
        micros = [micro for step in range(steps) for micro in stream.step(step)]
    indices, overlaps, errors, kept, objects = [], [], [], [], []
    for micro in micros:
        for row in torch.nonzero(micro.weight).flatten():
            with torch.no_grad():
                output = model(micro.images[row : row + 1])
            true, found = micro.masks[row].flatten(), output.masks[0].argmax(dim=0).flatten()
            indices.append(adjusted_rand_score(true[true > 0], found[true > 0]))
            ious = [
                max(jaccard_score(true == label, found == slot) for slot in range(4))
                for label in true[true > 0].unique()
            ]
            overlaps.append(sum(ious) / len(ious))
            errors.append(float((output.reconstruction - micro.images[row]).square().mean()))
            kept.append(int(output.keep.sum()))
            objects.append(int(micro.num_objects[row]))
    assert len(indices) == 30

    sums: list[torch.Tensor] = []
    for rank in range(3):
        stream, steps = evaluation_batches(recipe, data.eval, rank, 3)
        with stream:
            parts = [micro for step in range(steps) for micro in stream.step(step)]
        # keeps what this rank would send, and returns the sum with those before: the last rank sees all of it
        evaluation = evaluate(
            model,
            parts,
            num_slots=4,
            background_slots=0,
            total=lambda values: sums.append(values) or torch.stack(sums).sum(dim=0),  # type: ignore[func-returns-value]
        )
    assert evaluation.images == 30
    assert evaluation.fg_ari == pytest.approx(sum(indices) / 30, abs=1e-9)
    assert evaluation.means["mbo"] == pytest.approx(sum(overlaps) / 30, abs=1e-9)
    assert evaluation.reconstruction == pytest.approx(sum(errors) / 30, rel=1e-5)
    assert evaluation.counts is not None
    differences = [abs(k - n) for k, n in zip(kept, objects, strict=True)]
    assert evaluation.counts.mean_absolute_error == pytest.approx(sum(differences) / 30)
    assert evaluation.metrics()["count_error"] == evaluation.counts.mean_absolute_error
