"""The typed recipe: one YAML per experiment, validated whole before anything starts."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

import yaml
from pydantic import Field, PositiveInt, ValidationError, field_validator, model_validator

from orchestration.credentials import in_url
from orchestration.data_section import DataSection
from orchestration.model_section import ModelSection
from orchestration.recipe_files import RecipeError as RecipeError
from orchestration.recipe_files import find_recipe
from orchestration.section import Section
from orchestration.wording import counted

# What a run may change between submissions without becoming another run: where and how it computes, is shown and is
# promoted, but nothing that its curve depends on. The data's folders may move; their digests are pinned apart.
MUTABLE: dict[str, Any] = {
    "parallel": True,
    "tracking": True,
    "registry": True,
    "data": {"train", "eval", "bad_samples", "cache", "decode_workers", "allow_pipe", "tries", "timeout", "ledger"},
    "train": {"micro_batch", "checkpoint_every", "mtbf_hours", "checkpoints_kept"},
    "evaluate": {"batch_size"},
}

Floor = Literal["ari", "fg_ari", "mbo", "miou", "corloc", "count_correlation", "count_accuracy"]
Compared = Literal["ari", "fg_ari", "mbo", "miou", "corloc", "count_error", "count_accuracy", "reconstruction"]
Fraction = Annotated[float, Field(ge=0, le=1)]


class TrainSection(Section):
    """Optimisation: Adam, and schedules that are functions of the step alone."""

    steps: PositiveInt = 500_000
    batch_size: PositiveInt = Field(64, description="global batch; the number of workers never changes it")
    micro_batch: PositiveInt = Field(64, description="most samples that one worker runs at a time")
    learning_rate: float = Field(4e-4, gt=0)
    warmup_steps: int = Field(10_000, ge=0, description="linear rise of the learning rate")
    half_life: PositiveInt | None = Field(100_000, description="steps in which the learning rate halves")
    decay_steps: int = Field(0, ge=0, description="linear fall to zero over the last steps")
    clip_norm: float | None = Field(None, gt=0, description="largest norm of the global gradient")
    keep_weight: float = Field(0.0, ge=0, description="penalty on the mean of keep, for an adaptive model")
    random_from: int | None = Field(None, ge=0, description="slots are dropped at random from here to gate_from")
    gate_from: int = Field(0, ge=0, description="gate or codebook decide from this step; before, every slot is kept")
    keep_weight_end: float | None = Field(None, ge=0, description="the penalty's weight at the end; null: no change")
    temperature: float = Field(1.0, gt=0, description="of the gate's straight-through gradient")
    temperature_end: float | None = Field(
        None, gt=0, description="the temperature at the end, geometrically from gate_from; null: no change"
    )
    checkpoint_every: PositiveInt | None = Field(
        None, description="steps between checkpoints; null: the time that loses least, from what saving costs"
    )
    mtbf_hours: float = Field(4.0, gt=0, description="mean time between failures of one node, for that time")
    checkpoints_kept: int = Field(3, ge=2, description="newest checkpoints to keep; one more than the newest at least")


class Workers(Section):
    min: PositiveInt = 1
    max: PositiveInt = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max: {self.max} is less than min: {self.min}; raise max or lower min")
        return self


class ParallelSection(Section):
    """Where and how it computes; nothing here changes what is computed."""

    workers: Workers = Workers()
    zero_stage: Literal[0, 1, 2, 3] = Field(2, description="DeepSpeed ZeRO: what is sharded over the workers")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights and gradients stay fp32")
    device: Literal["auto", "cpu", "gpu"] = "auto"
    resize_seconds: float = Field(30.0, gt=0, description="between looks for room for more workers")
    max_failures: int = Field(10, ge=0, description="worker failures without a new step between them")
    price_per_hour: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="of one worker's machine, for estimates of the cost; null: unknown"
    )


class TrackingSection(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking URI; null: $MLFLOW_TRACKING_URI, or sqlite in the state folder")
    experiment: str = "slotforge"
    every: PositiveInt = Field(10, description="steps between points of the training curves")
    pictures_every: PositiveInt | None = Field(
        None, description="steps between pictures, a multiple of evaluate.every; null: at evaluations, 50 at most"
    )

    system_metrics: bool = Field(True, description="CPU, memory, network and GPU of each node, in runs below the run")

    @field_validator("uri")
    @classmethod
    def _no_password(cls, uri: str | None) -> str | None:
        if uri and in_url(uri):
            raise ValueError(
                "it holds a password or a token, which would be logged with the recipe; set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in the environment"
            )
        return uri


class EvaluateSection(Section):
    """Held-out evaluation."""

    every: PositiveInt = Field(1000, description="steps between evaluations while training")
    batch_size: PositiveInt = 64
    background_slots: int = Field(0, ge=0, description="kept slots that hold background, not an object")


class RegistrySection(Section):
    """The registered model and the gate that its alias champion has to pass."""

    model: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]+$", description="name; null: slotforge-<recipe's name>")
    floors: dict[Floor, Fraction] = Field(default_factory=dict, description="least values on the held-out set")
    metric: Compared | None = Field(
        None, description="candidate and champion are compared by it; null: fg_ari, or reconstruction without masks"
    )
    confidence: float = Field(0.95, ge=0.5, lt=1, description="that a candidate loses no more than is tolerated")
    tolerated_loss: float = Field(0.0, ge=0, description="of the metric against the champion; 0: it has to be better")


class Recipe(Section):
    """A whole experiment."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    seed: int = Field(0, ge=0, lt=2**63)
    data: DataSection
    model: ModelSection = ModelSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    tracking: TrackingSection = TrackingSection()
    evaluate: EvaluateSection = EvaluateSection()
    registry: RegistrySection = RegistrySection()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        scenes, model, train = self.data.scenes, self.model, self.train
        if scenes is not None and scenes.image_size != model.image_size:
            size = scenes.image_size
            raise ValueError(
                f"model.image_size: {model.image_size} is not that of data.scenes, {size}; set it to {size}"
            )
        if train.keep_weight > 0 and model.gate is None:
            raise ValueError(
                f"train.keep_weight: {train.keep_weight} has no gate to act on; set model.gate: {{}} or it to 0"
            )
        if train.decay_steps > train.steps:
            raise ValueError(
                f"train.decay_steps: {train.decay_steps} is more than train.steps: {train.steps}; "
                "lower it or train longer"
            )
        if train.random_from is not None and train.random_from > train.gate_from:
            raise ValueError(
                f"train.random_from: {train.random_from} is after train.gate_from: {train.gate_from}; "
                "lower it or set null"
            )
        if train.gate_from >= train.steps and (model.gate is not None or model.codebook is not None):
            raise ValueError(
                f"train.gate_from: {train.gate_from} is not before the end at step {train.steps}; lower it"
            )
        if train.batch_size < self.parallel.workers.min:
            raise ValueError(
                f"parallel.workers.min: {self.parallel.workers.min} is more than train.batch_size: "
                f"{counted(train.batch_size, 'sample')}; lower it or raise the batch"
            )
        pictures, evaluations = self.tracking.pictures_every, self.evaluate.every
        if pictures is not None and pictures % evaluations:
            raise ValueError(
                f"tracking.pictures_every: {pictures} is not a multiple of evaluate.every: {evaluations}, and pictures "
                f"are taken at evaluations; make it {-(-pictures // evaluations) * evaluations}"
            )
        if self.evaluate.background_slots >= model.num_slots:
            raise ValueError(
                f"evaluate.background_slots: {self.evaluate.background_slots} leaves no slot of model.num_slots: "
                f"{model.num_slots} for objects; lower it"
            )
        return self

    @property
    def registered_model(self) -> str:
        return self.registry.model or f"slotforge-{self.name}"

    def without_weights(self) -> Self:
        """The same recipe with nothing to fetch: shapes, sizes and times do not depend on the weights."""
        if not getattr(self.model.encoder, "pretrained", False):
            return self
        encoder = self.model.encoder.model_copy(update={"pretrained": False})
        return self.model_copy(update={"model": self.model.model_copy(update={"encoder": encoder})})

    def identity(self) -> dict[str, Any]:
        """The fields that make a run what it is: everything but how it is computed, shown and promoted."""
        return self.model_dump(mode="json", exclude=MUTABLE)

    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16]

    def yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Recipe:
    """Reads and validates a recipe.

    Args:
        name: a path to a YAML file, or the name of one in a recipes folder (the current one's, then the project's).
        overrides: "section.field=value", the value in YAML.

    Raises:
        RecipeError: no such recipe, or a wrong one.
    """
    path = find_recipe(name)
    try:
        fields = yaml.load(path.read_text(), Loader=_Loader) or {}  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: this is not YAML ({_one_line(str(error))}); correct the file") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path}: the file is a {type(fields).__name__}; write sections such as 'train:' at its top")
    fields.setdefault("name", path.stem)
    for override in overrides:
        _apply(fields, override)
    return parse_recipe(fields)


def parse_recipe(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from plain fields, as YAML or JSON gives them.

    Raises:
        RecipeError: one sentence for each wrong field.
    """
    try:
        # By way of JSON: strict types, and yet a list is good for a tuple.
        return Recipe.model_validate_json(json.dumps(fields))
    except ValidationError as error:
        raise RecipeError("\n".join(_sentence(problem) for problem in error.errors())) from error
    except TypeError as error:
        raise RecipeError(f"recipe: a value is not plain YAML ({error}); use numbers, strings and lists") from error


def state_home() -> Path:
    """The folder of data, runs and the default MLflow store: $SLOTFORGE_HOME, or .slotforge in the home folder."""
    return Path(os.environ.get("SLOTFORGE_HOME") or Path.home() / ".slotforge").expanduser().absolute()


class _Loader(yaml.SafeLoader):
    """YAML 1.2 floats: 1e-3 is a number here, as people write it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _apply(fields: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise RecipeError(f"--set {override}: this is not section.field=value; write e.g. --set train.batch_size=256")
    *parents, leaf = path.split(".")
    for parent in parents:
        inner = fields.setdefault(parent, {})
        if inner is None:
            inner = fields[parent] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"--set {override}: {parent} is {inner!r}, not a section; name a field that exists")
        fields = inner
    try:
        fields[leaf] = yaml.load(text, Loader=_Loader)  # noqa: S506 a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: the value {text!r} is not YAML; put it in quotes") from error


def _sentence(problem: Any) -> str:
    parts, known = _place(problem["loc"])
    path = ".".join(parts)
    message, value = _one_line(str(problem["msg"])), problem["input"]
    if problem["type"] == "extra_forbidden":
        known = _place(problem["loc"][:-1])[1]
        close = difflib.get_close_matches(parts[-1], known, n=1)
        cure = f"did you mean {close[0]!r}?" if close else f"take one of {', '.join(known)}"
        return f"{path}: there is no such field (its value is {value!r}); {cure}"
    if problem["type"] == "missing":
        return f"{path}: the field is missing; add it"
    if problem["type"] == "union_tag_invalid":
        return f"{path}.kind: {problem['ctx']['tag']!r} is not valid; take one of {problem['ctx']['expected_tags']}"
    if problem["type"] == "value_error":  # ours: already with value and cure
        sentence = message.removeprefix("Value error, ")
        names_a_field = sentence.partition(":")[0] in known
        return f"{path}.{sentence}" if path and names_a_field else f"{path or 'recipe'}: {sentence}"
    expected = message.removeprefix("Input should be ")
    return f"{path}: {value!r} is not valid; it should be {expected}"


def _place(location: tuple[Any, ...]) -> tuple[list[str], list[str]]:
    """The names on the way to a field, without the kinds that pydantic puts between them; and the fields there."""
    names: list[str] = []
    sections: list[type[Section]] = [Recipe]
    for part in location:
        if len(sections) > 1:  # a part of one of several kinds
            sections = [section for section in sections if part in get_args(section.model_fields["kind"].annotation)]
            continue
        names.append(str(part))
        known = sections[0].model_fields if sections else {}
        sections = _sections(known[part].annotation) if part in known else []
    return names, list(sections[0].model_fields) if len(sections) == 1 else []


def _sections(annotation: Any) -> list[type[Section]]:
    """The sections that a field may hold."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return [section for choice in inner for section in _sections(choice)]


def _one_line(text: str) -> str:
    return " ".join(text.split())
