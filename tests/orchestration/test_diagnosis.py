"""What is told of a run that has diverged."""

import json
import os
import subprocess
import sys
import tarfile

import pytest
import torch
from pyarrow.fs import FileSystem, copy_files

from orchestration.assembly import Data, build_model, training_order, training_stream
from orchestration.curves import Curves
from orchestration.diagnosis import diagnose
from orchestration.engine import PlainEngine
from orchestration.recipe import Recipe
from orchestration.schedule import Schedule
from orchestration.worker import DivergedError, StepReport, train
from pipelines import Sources
from pipelines.sets import place_of


def test_a_diagnosis_names_the_step_its_samples_and_what_is_not_finite(recipe: Recipe, data: Data) -> None:
    model = build_model(recipe)
    engine = PlainEngine(model)
    curves = Curves(engine, 1, recipe.model.num_slots)

    def spoil(report: StepReport) -> None:
        if report.done == 4:  # the fifth step computes with it
            with torch.no_grad():
                next(iter(model.parameters())).view(-1)[:3] = torch.nan

    with training_stream(recipe, data.train, model.noise_shapes()) as stream:
        train(engine, stream, Schedule(recipe.train), hooks=[curves.record, spoil])
    with pytest.raises(DivergedError) as caught:
        curves.take()

    order = training_order(recipe, data.train)
    facts = json.loads(json.dumps(diagnose(caught.value, model, order, data.train, Sources()), allow_nan=False))
    assert facts["step"] == 5
    assert facts["losses"]["5"] == "nan"
    assert all(isinstance(facts["losses"][step], float) for step in "1234")
    assert [sample["sample"] for sample in facts["samples"]] == order.batch(4).tolist()
    for sample in facts["samples"]:
        with tarfile.open(f"{data.train}/{sample['shard']}") as tar:
            keys = list(dict.fromkeys(name.partition(".")[0] for name in tar.getnames()))
        assert sample["key"] == keys[sample["row"]]
    name, parameter = next(iter(model.named_parameters()))
    assert facts["weights"][name] == {"norm": "nan", "not_finite": parameter.numel(), "of": parameter.numel()}


def test_norms_of_weights_that_are_still_numbers_are_numbers(recipe: Recipe, data: Data) -> None:
    """Their squares need not be: a learning rate of 1e30 leaves such weights after one step."""
    model = build_model(recipe)
    name, parameter = next(iter(model.named_parameters()))
    with torch.no_grad():
        parameter.fill_(-2e30)
    facts = diagnose(
        DivergedError("loss/total: nan", 1), model, training_order(recipe, data.train), data.train, Sources()
    )
    found = facts["weights"][name]
    assert found["not_finite"] == 0
    assert found["norm"] == pytest.approx(2e30 * parameter.numel() ** 0.5)


def test_keys_of_shards_from_afar_are_read_where_they_lie(
    recipe: Recipe, data: Data, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, _ = FileSystem.from_uri(s3)
    copy_files(str(data.train), s3.removeprefix("s3://"), destination_filesystem=remote)
    model, order, sources = build_model(recipe), training_order(recipe, data.train), Sources(tries=1, timeout=5)
    error = DivergedError("loss/total: nan", 3)
    here = diagnose(error, model, order, data.train, sources)["samples"]
    assert diagnose(error, model, order, place_of(s3), sources)["samples"] == here
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens
    silent = diagnose(error, model, order, place_of(s3), Sources(tries=1, timeout=1))["samples"]
    assert len({sample.pop("key") for sample in silent}) == 1, "storage that does not answer was asked again"
    assert silent == [{name: value for name, value in sample.items() if name != "key"} for sample in here]


SQUEEZED = """
import json, resource, sys, torch
from torch import nn

torch.set_num_threads(1)
layers = nn.Sequential(nn.Conv2d(3, 32, 5), nn.ReLU(), nn.ConvTranspose2d(32, 32, 3), nn.Flatten(2), nn.Linear(169, 8))

def step(images):
    layers(torch.zeros(images, 3, 15, 15)).square().mean().backward()

step(64)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + int(sys.argv[1]), resource.RLIM_INFINITY))
try:
    step(65)
except (RuntimeError, MemoryError) as error:
    said = type(error).__name__, str(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps(said))
"""


def test_memory_that_runs_out_is_told_from_other_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_V2_ENABLED", "1")
    from orchestration.rank import _is_out_of_memory

    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # each tensor's memory is asked for anew
    squeezed = [sys.executable, "-c", SQUEEZED]
    processes = [
        subprocess.Popen([*squeezed, str(room)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        for room in (2_000_000, 3_000_000, 4_000_000)
    ]
    told = [process.communicate()[0] for process in processes]  # nothing where torch itself crashed
    kinds = {"RuntimeError": RuntimeError, "MemoryError": MemoryError}
    said = [kinds[kind](text) for kind, text in (json.loads(words) for words in told if words)]
    assert said, "there was room for everything"
    for error in said:
        assert _is_out_of_memory(error), error

    with pytest.raises(RuntimeError) as other:
        torch.zeros(2) @ torch.zeros(3)
    assert not _is_out_of_memory(other.value)
    assert not _is_out_of_memory(RuntimeError("could not create a primitive descriptor for the matmul primitive."))
