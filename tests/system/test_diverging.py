"""A run whose loss is no number any more stops with a sentence and a diagnosis, and is not tried again."""

import json
import re
from pathlib import Path

import pytest
from runs import RECIPE, Run

pytestmark = pytest.mark.slow


def test_a_run_that_diverges_stops_with_its_step_its_samples_and_norms(home: Path) -> None:
    run = Run(home, "diverging", ("train.learning_rate=1e30", "train.warmup_steps=0", "train.checkpoint_every=5"))
    code, output = run.finish(run.start())
    assert code == 1, output
    said = re.search(r"^slotforge: (DivergedError: .*)$", output, re.MULTILINE)
    assert said, output
    assert "loss/total: nan at step" in said[1] and "lower train.learning_rate" in said[1]
    assert "Traceback" not in output and "going on from the last checkpoint" not in output, output

    facts = json.loads((run.folder / "diagnosis.json").read_text())
    assert str(run.folder / "diagnosis.json") in output
    step = facts["step"]
    assert 1 <= step <= 5 and f"at step {step};" in said[1]
    assert facts["losses"][str(step)] == "nan"
    assert all(isinstance(facts["losses"][str(before)], float) for before in range(1, step))
    keys = [sample["key"] for sample in facts["samples"]]
    assert len(keys) == len(set(keys)) == RECIPE["train"]["batch_size"]
    assert not any("read" in key for key in keys), "a reason stands for a key"
    assert any(norms["not_finite"] or norms["norm"] > 1e20 for norms in facts["weights"].values())

    assert run.newest_step() == 0, "a state that had diverged was saved"
    assert run.client.get_run(run.run_id).info.status == "FAILED"
