"""The recipe's data: scenes to render, or sets of shards."""

from abc import abstractmethod
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, PositiveInt, Tag, field_validator, model_validator

from orchestration.credentials import in_command
from orchestration.section import Section, kind_or


class ScenesSection(Section):
    """What all rendered sets have."""

    kind: str
    train: PositiveInt = Field(60_000, description="training scenes")
    eval: PositiveInt = Field(320, description="held-out scenes")
    per_shard: PositiveInt = Field(1000, description="scenes in a shard")
    seed: int = Field(0, ge=0, description="seed of the scenes")

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Pixels a side."""


Range = tuple[PositiveInt, PositiveInt]


class TetrominoesSection(ScenesSection):
    """Tetrominoes; the defaults are the published set's (35 x 35, three pieces)."""

    kind: Literal["tetrominoes"] = "tetrominoes"
    pieces: Range = Field((3, 3), description="fewest and most pieces in a scene, uniform")
    grid: int = Field(7, ge=4, description="cells a side of the scene")
    cell: PositiveInt = Field(5, description="pixels a side of a cell")

    @property
    def image_size(self) -> int:
        return self.grid * self.cell

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range("pieces", self.pieces)
        return self


class MultiDSpritesSection(ScenesSection):
    """Multi-dSprites, 64 x 64."""

    kind: Literal["multi-dsprites"]
    coloring: Literal["colored_on_grayscale", "colored_on_colored", "binarized"] = "colored_on_grayscale"
    sprites: Range | None = Field(None, description="fewest and most sprites in a scene; null: as published")

    @property
    def image_size(self) -> int:
        return 64

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.sprites is not None:
            _check_range("sprites", self.sprites)
        return self


class ClevrSection(ScenesSection):
    """3D scenes in the manner of CLEVR, cropped as published; drawn by Mitsuba: pip install 'slotforge[scenes]'."""

    kind: Literal["clevr"]
    objects: Range = Field((3, 10), description="fewest and most objects in a scene; CLEVR6 has up to 6")
    size: int = Field(128, ge=16, le=2048, description="pixels a side")

    @property
    def image_size(self) -> int:
        return self.size

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range("objects", self.objects)
        return self


def _check_range(name: str, ends: tuple[int, int]) -> None:
    if ends[0] > ends[1]:
        raise ValueError(f"{name}: {list(ends)} is not a range; write [fewest, most]")


Scenes = Annotated[
    Annotated[TetrominoesSection, Tag("tetrominoes")]
    | Annotated[MultiDSpritesSection, Tag("multi-dsprites")]
    | Annotated[ClevrSection, Tag("clevr")],
    kind_or("tetrominoes"),
]


class SetSection(Section):
    """A set of shards: its folder, or a brace pattern of folders or tars."""

    url: str = Field(min_length=1, description="path, https://, s3://, gs:// or pipe: (with {name} for a file's name)")
    weight: float = Field(1.0, gt=0, description="share of a batch, relative to the other sets")

    @field_validator("url")
    @classmethod
    def _no_secret(cls, url: str) -> str:
        if url.startswith("pipe:"):
            if in_command(url):
                raise ValueError(
                    "the command spells out what looks like a secret, which would be logged with the recipe; set it as "
                    "a variable on every node and write $NAME in the command"
                )
            return url
        parts = urlsplit(url)
        if "://" in url and ("@" in parts.netloc or parts.query):
            raise ValueError(
                f"{parts.scheme}://{parts.hostname} has a user or a query, which would be logged with the recipe; put "
                "credentials into ~/.netrc, AWS_* variables or Google's application default credentials"
            )
        return url


class CacheSection(Section):
    """Shards that are kept on each node's disk, shared by its workers and runs."""

    folder: str | None = Field(None, description="on a local disk; null: slotforge in the user's cache folder")
    gigabytes: float = Field(20.0, ge=0, description="what it may hold; 0: shards are read from afar each time")


Share = Annotated[float, Field(gt=0, le=1)]


class AugmentSection(Section):
    """What is done to every training sample, and never to a held-out one; masks follow."""

    flip: bool = Field(False, description="left to right, for half of the samples")
    crop: tuple[Share, Share] | None = Field(
        None, description="smallest and largest side of a crop, as shares of the image's; resized back; null: none"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.crop is not None and self.crop[0] > self.crop[1]:
            raise ValueError(f"crop: {list(self.crop)} is not a range; write [smallest, largest]")
        return self


def _sets(value: Any) -> Any:
    """A single address is one set."""
    return ({"url": value},) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


Sets = Annotated[tuple[SetSection, ...], BeforeValidator(_sets), Field(min_length=1)]


class DataSection(Section):
    """Where the samples come from: scenes to render, or sets of WebDataset shards with an index."""

    scenes: Scenes | None = Field(None, description="render scenes into shards before training")
    train: Sets | None = Field(None, description="training shards: an address, or a list of {url, weight} to mix")
    eval: Sets | None = Field(None, description="held-out shards: an address, or a list of {url}, each seen once")
    cache: CacheSection = CacheSection()
    decode_workers: int = Field(0, ge=0, description="processes that decode for each worker; 0: a thread of its own")
    allow_pipe: bool = Field(False, description="run the shell commands of pipe: addresses; secrets in them as $NAME")
    tries: PositiveInt = Field(8, description="how often a read is tried before the run stops")
    timeout: float = Field(30.0, gt=0, description="seconds without an answer after which a try is given up")
    lanes: PositiveInt = Field(8, description="streams that a batch is drawn from; rounded down to divide the batch")
    window: PositiveInt = Field(1, description="shards' worth of samples that are shuffled together in a lane")
    augment: AugmentSection | None = Field(None, description="flips and crops of training samples; null: none")
    bad_samples: int | None = Field(None, ge=0, description="corrupt samples that stop a run; null: 1 % of the set")
    ledger: str | None = Field(None, description="folder for a line `step rank place sample replaced` a sample")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        folders = [self.train, self.eval]
        if self.scenes is not None and any(folders):
            raise ValueError("scenes and the folders train/eval are both given; give one of the two")
        if self.scenes is None and not all(folders):
            raise ValueError("neither scenes nor both folders train and eval are given; give one of the two")
        for field, sets in (("train", self.train), ("eval", self.eval)):
            if not self.allow_pipe and any(entry.url.startswith("pipe:") for entry in sets or ()):
                raise ValueError(
                    f"{field}: it runs a command in a shell; set data.allow_pipe: true if you trust the recipe"
                )
        if weighted := next((entry for entry in self.eval or () if entry.weight != 1), None):
            raise ValueError(
                f"eval: the weight {weighted.weight} says nothing, each held-out sample is seen once; leave it out"
            )
        return self
