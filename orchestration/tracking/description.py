"""What stands at the top of a run's page: what it is, how it ended, its newest pictures, and where the rest is."""

import json
from collections.abc import Mapping
from urllib.parse import urlencode

from orchestration.recipe import Recipe
from orchestration.tracking.tracker import PICTURES, Tracker
from orchestration.wording import counted

NOTE = "mlflow.note.content"
LEGENDS = {
    "scenes": "Held-out scenes: input, what the slots draw together, their masks, and what each slot takes of it.",
    "attention": "What each slot won of the input, by iteration.",
    "counts": "Held-out images by kept slots and objects.",
}


class Description:
    """Keeps it, while the run trains: it is made anew when there are pictures of another kind."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._shown: list[str] | None = None

    def deliver(self, tracker: Tracker) -> None:
        pictured = tracker.pictured()
        if pictured != self._shown:
            describe(tracker, self._recipe)
            self._shown = pictured


def describe(tracker: Tracker, recipe: Recipe, outcome: Mapping[str, str] | None = None) -> None:
    """Writes it, from what MLflow knows of the run.

    Args:
        outcome: rows of a table, once there is one.
    """
    run = tracker.client.get_run(tracker.run_id)
    sets = [entry.dataset for entry in run.inputs.dataset_inputs] if run.inputs is not None else []
    images = {each.name: json.loads(each.profile or "{}").get("images") for each in sets}
    model, train, tags = recipe.model, recipe.train, run.data.tags
    decides = "a gate" if model.gate is not None else "a codebook" if model.codebook is not None else "nobody"
    rows = {
        **(outcome or {}),
        "data": ", ".join(
            f"{counted(count, 'image')} in {name}" for name, count in sorted(images.items(), reverse=True)
        ),
        "model": f"{counted(model.num_slots, 'slot')} ({decides} decides which are kept), images of "
        f"{model.image_size} x {model.image_size}, {tags.get('slotforge.parameters', 'some')} parameters",
        "training": f"{counted(train.steps, 'step')} of {counted(train.batch_size, 'image')}, seed {recipe.seed}",
        "code": tags.get("slotforge.code", ""),
    }
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items() if text)])
    guide = (
        "Held-out metrics are `eval/`, how the slots are used is `slots/`. Artifacts: `events.jsonl` (restarts, "
        "resizes, warnings), `provenance/`, and `recipe.yaml`, with which `slotforge train recipe.yaml --set "
        "name=again` does it again. The pictures are the newest; image charts below Model metrics have those of each "
        "step: enlarge one and move its slider."
    )
    there = tracker.pictured()
    pictures = [
        f"{legend}\n\n![{key}]({_link(tracker.run_id, key)})" for key, legend in LEGENDS.items() if key in there
    ]
    tracker.client.set_tag(tracker.run_id, NOTE, "\n\n".join([table, guide, *pictures]))


def _link(run: str, key: str) -> str:
    """Of an artifact, from a page of the same server."""
    return f"get-artifact?{urlencode({'path': f'{PICTURES}/{key}.png', 'run_uuid': run})}"
