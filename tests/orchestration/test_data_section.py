"""What a recipe may say about its data, and what becomes of it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestration.assembly import evaluation_batches, training_stream
from orchestration.prepare import data_folders
from orchestration.recipe import Recipe, RecipeError, parse_recipe
from pipelines import Purpose, WeightedSet
from pipelines.noise import generator
from pipelines.samples import encode
from pipelines.sets import Place, Sets, mixture, place_of
from pipelines.shards import write_index, write_shard
from pipelines.sources import Sources

HELD_OUT = {"eval": "/held-out"}


def recipe_of(**data) -> Recipe:  # type: ignore[no-untyped-def]
    return parse_recipe({"name": "x", "data": HELD_OUT | {"train": "/shards"} | data})


def test_an_address_is_a_set_and_several_have_weights() -> None:
    recipe = recipe_of(train=[{"url": "s3://bucket/a", "weight": 3}, {"url": "/b"}])
    assert recipe.data.train is not None
    assert [(entry.url, entry.weight) for entry in recipe.data.train] == [("s3://bucket/a", 3), ("/b", 1)]
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
    assert recipe_of(train="/a") == recipe_of(train=[{"url": "/a"}])
    # Where the shards lie and how they are fetched is no part of what a run is.
    other = recipe_of(cache={"gigabytes": 1}, decode_workers=3, tries=2, timeout=5)
    assert other.digest() == recipe.digest() and recipe_of(lanes=3).digest() != recipe.digest()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": "pipe:cat /a/{name}"}, ["data.train", "shell", "allow_pipe: true"]),
        ({"train": "https://anna:secret@host/a"}, ["data.train", "https://host", "netrc"]),
        ({"train": "https://host/a?sig=secret"}, ["data.train", "https://host", "netrc"]),
        ({"train": [{"url": "/a", "weight": 0}]}, ["data.train", "weight", "0", "greater than 0"]),
        ({"train": []}, ["data.train", "at least 1"]),
        ({"train": [{"url": "/a", "wieght": 2}]}, ["data.train", "wieght"]),
        ({"eval": [{"url": "/a", "weight": 2}]}, ["data.eval", "2.0", "leave it out"]),
        ({"decode_workers": -1}, ["data.decode_workers", "-1"]),
        ({"tries": 0}, ["data.tries", "0"]),
        ({"timeout": 0}, ["data.timeout", "0"]),
        ({"cache": {"gigabytes": -1}}, ["data.cache.gigabytes", "-1"]),
        ({"augment": {"crop": [0.9, 0.5]}}, ["data.augment", "[0.9, 0.5]", "[smallest, largest]"]),
        ({"augment": {"crop": [0, 0.5]}}, ["data.augment.crop", "0"]),
        ({"augment": {"flip": 0.5}}, ["data.augment.flip", "0.5"]),
    ],
)
def test_a_wrong_field_is_a_sentence(data: dict[str, object], words: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        recipe_of(**data)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("train", "place"),
    [
        ("/a/b", Path("/a/b")),
        ("file:///a/b", Path("/a/b")),
        ("s3://bucket/a", "s3://bucket/a"),
        ("/a/{000..009}.tar", "/a/{000..009}.tar"),
        ([{"url": "/a"}, {"url": "gs://b", "weight": 2}], Sets((WeightedSet("/a"), WeightedSet("gs://b", 2.0)))),
    ],
)
def test_a_place_survives_as_text(train: object, place: Place) -> None:
    found = data_folders(recipe_of(train=train)).train
    assert found == place and place_of(str(found)) == place and type(place_of(str(found))) is type(found)


def test_relative_paths_hold_in_any_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert data_folders(recipe_of(train="shards")).train == tmp_path / "shards"
    assert data_folders(recipe_of(train="{a,b}")).train == f"{tmp_path}/{{a,b}}"


def test_held_out_sets_are_seen_once_each(tmp_path: Path, make_small_sets: Sets) -> None:
    recipe = parse_recipe({"name": "x", "data": {"train": "/a", "eval": [{"url": e.url} for e in make_small_sets]}})
    stream, steps = evaluation_batches(recipe, data_folders(recipe).eval)
    with stream:
        ids = [int(n) for step in range(steps) for m in stream.step(step) for n, w in zip(m.ids, m.weight) if w]  # noqa: B905
    assert sorted(ids) == list(range(9))
    order = mixture(make_small_sets, Sources(), batch_size=6, seed=1, lanes=2, window=1)
    assert order.index.num_samples == 9 and order.counts(60) == (40, 20)


def test_training_is_augmented_and_evaluation_never(tmp_path: Path) -> None:
    number = np.random.default_rng(0)
    samples = [encode(f"a{i}", number.integers(0, 256, (35, 35, 3), dtype=np.uint8)) for i in range(8)]
    write_index(tmp_path, [write_shard(tmp_path, "0.tar", samples)], {})
    model, train = {"image_size": 35}, {"batch_size": 8, "micro_batch": 8}

    def images(augment: object) -> tuple[torch.Tensor, torch.Tensor]:
        where = {"train": str(tmp_path), "eval": str(tmp_path), "augment": augment}
        recipe = parse_recipe({"name": "x", "data": where, "model": model, "train": train})
        with training_stream(recipe, tmp_path, {}) as trained, evaluation_batches(recipe, tmp_path)[0] as held_out:
            return trained.step(0)[0].images, held_out.step(0)[0].images

    plain, flipped, cropped = images(None), images({"flip": True}), images({"crop": [0.5, 0.5]})
    assert torch.equal(plain[1], flipped[1]) and torch.equal(plain[1], cropped[1])
    turned = [bool(torch.equal(a.flip(-1), b)) for a, b in zip(plain[0], flipped[0], strict=True)]
    noise = [generator(0, Purpose.AUGMENTATION, 0, place).random() for place in range(8)]
    assert turned == [value < 0.5 for value in noise] and len(set(turned)) == 2
    assert not any(torch.equal(a, b) for a, b in zip(plain[0], cropped[0], strict=True))
    # What is done to the samples is part of what a run is.
    assert recipe_of(augment={"flip": True}).digest() != recipe_of().digest()


@pytest.fixture
def make_small_sets(tmp_path: Path) -> Sets:
    for name, count in (("a", 5), ("b", 4)):
        samples = [encode(f"{name}{i}", np.full((35, 35, 3), i, np.uint8)) for i in range(count)]
        write_index(tmp_path / name, [write_shard(tmp_path / name, "0.tar", samples)], {})
    return Sets((WeightedSet(str(tmp_path / "a"), 2), WeightedSet(str(tmp_path / "b"), 1)))
