"""What a whole run takes, on its page: told once there are steps to tell it from."""

import statistics
from dataclasses import asdict

from orchestration.planning.cost import ModelSize, WorldPlan, world_plans
from orchestration.planning.measure import model_size
from orchestration.recipe import Recipe
from orchestration.tracking.tracker import Tracker
from pipelines import micro_batches

DISK_RATE = 2e8  # bytes a second that a rank writes, as slotforge plan has it
LEAST_POINTS = 3


def estimate(recipe: Recipe, size: ModelSize, step_seconds: float, workers: int) -> WorldPlan:
    """As slotforge plan has it, from the time of a step; activations are left out."""
    count, micro_batch = micro_batches(recipe.train.batch_size, workers, recipe.train.micro_batch)
    (plan,) = world_plans(
        size,
        [workers],
        steps=recipe.train.steps,
        batch_size=recipe.train.batch_size,
        largest=recipe.train.micro_batch,
        checkpoint_every=recipe.train.checkpoint_every,
        activations=(0.0, 0.0),
        sample_seconds=step_seconds / (count * micro_batch),
        mtbf_hours=recipe.train.mtbf_hours,
        disk_rate=DISK_RATE,
        price_per_hour=recipe.parallel.price_per_hour,
    )
    return plan


class Estimate:
    """Sends the estimate once, by the first points of time/step."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._told = recipe, False

    def deliver(self, tracker: Tracker) -> None:
        if self._told or tracker.sent("time/step") < LEAST_POINTS:
            return
        seconds = [value for _, value in tracker.points("time/step")]
        workers = int(tracker.points("train/world_size")[-1][1])
        step = statistics.median(seconds)
        plan = estimate(self._recipe, model_size(self._recipe), step, workers)
        price = self._recipe.parallel.price_per_hour
        told = {"measured_step_seconds": step, "price_per_hour": price, **asdict(plan)}
        del told["activations"]
        tracker.client.log_dict(tracker.run_id, told, "provenance/estimate.json")
        if plan.hours is not None:
            found = {"hours": plan.hours, "worker_hours": plan.hours * workers, "cost": plan.cost}
            tracker.tag(**{f"estimate.{name}": f"{value:.3g}" for name, value in found.items() if value is not None})
        self._told = True
