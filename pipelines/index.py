"""What a set of shards contains: the little that the plan needs to know, and nothing else. No I/O."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar of a set.

    Fields:
        name: plain file name inside the set's folder.
        bytes: size of the tar.
        sha256: hexadecimal checksum of the tar.
        samples: number of samples in it, at least 1.

    Raises:
        ValueError: the name is not a plain file name, or there are no samples.
    """

    name: str
    bytes: int
    sha256: str
    samples: int

    def __post_init__(self) -> None:
        # An index may come from elsewhere: its names must not lead out of the folder it lies in.
        if not self.name or self.name in (".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"shard name: {self.name!r} is not a plain file name; keep shards beside their index")
        if self.samples < 1:
            raise ValueError(f"shard {self.name}: {self.samples} samples; leave empty shards out of the set")
        if self.bytes < 0:
            raise ValueError(f"shard {self.name}: {self.bytes} bytes; write the index anew")


@dataclass(frozen=True)
class Index:
    """A set of shards, in order. Sample `offsets[s] + r` of the set is row r of shard s.

    Fields:
        shards: at least one, with distinct names.
        size: (height, width) of every image; None for imaginary shards.
        about: how the set was made, for people and for comparing with a recipe; not part of the digest.
        folders: address of each shard's folder, where several sets are joined; not part of the digest.

    Raises:
        ValueError: no shards, or two of one name in one folder.
    """

    shards: tuple[Shard, ...]
    size: tuple[int, int] | None = None
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)
    folders: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if not self.shards:
            raise ValueError("shards: the set is empty; render or ingest at least one shard")
        if self.folders and len(self.folders) != len(self.shards):
            raise ValueError(f"folders: {len(self.folders)} for {len(self.shards)} shards; name one for each")
        names = list(zip(self.folders, (shard.name for shard in self.shards), strict=False))
        names = names or [("", shard.name) for shard in self.shards]
        if len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0][0][1]
            raise ValueError(f"shards: {twice!r} is listed twice; every shard needs a name of its own")

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 [S + 1]: number of the first sample of each shard, and the number of samples at the end."""
        return np.concatenate([[0], np.cumsum([shard.samples for shard in self.shards])]).astype(np.int64)

    @property
    def num_samples(self) -> int:
        """Samples in the set."""
        return int(self.offsets[-1])

    @cached_property
    def digest(self) -> str:
        """sha256 over the shard entries: equal digests mean equal bytes in equal order."""
        entries = json.dumps([asdict(shard) for shard in self.shards], separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(entries.encode()).hexdigest()

    @classmethod
    def joined(cls, sets: "Sequence[tuple[str, Index]]") -> "Index":
        """One set of several, end to end, each given with the address of its folder.

        Raises:
            ValueError: no sets, the image sizes differ, or a shard comes twice.
        """
        sizes = {index.size for _, index in sets}
        if len(sizes) > 1:
            found = ", ".join(f"{folder} {index.size}" for folder, index in sets)
            raise ValueError(f"the sets' image sizes differ ({found}); ingest them at one size")
        masks = all(index.about.get("masks") for _, index in sets)
        return cls(
            shards=tuple(shard for _, index in sets for shard in index.shards),
            size=next(iter(sizes), None),
            about={"masks": masks, "sets": [dict(index.about) for _, index in sets]},
            folders=tuple(home for folder, index in sets for home in (index.folders or (folder,) * len(index.shards))),
        )

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample of the set."""
        shard = int(np.searchsorted(self.offsets, sample, side="right")) - 1
        return shard, sample - int(self.offsets[shard])


def index_from_counts(counts: Iterable[int]) -> Index:
    """An index of imaginary shards with the given numbers of samples, for tests and for planning.

    Raises:
        ValueError: no counts, or one below 1.
    """
    return Index(tuple(Shard(f"imaginary-{i:06d}.tar", 0, "", int(count)) for i, count in enumerate(counts)))
