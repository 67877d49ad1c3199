"""Check every checksum, count and member of a set."""

import tarfile
from collections import Counter
from pathlib import Path

from pipelines.errors import DataError
from pipelines.index import Index, Shard
from pipelines.samples import BadSample, decode
from pipelines.shards.files import read_index, read_sidecar, sidecar_path
from pipelines.shards.scan import Group, groups_of, kinds, members_of, row_sums, sha256_of


def verify(folder: Path | str) -> list[str]:
    """Check every checksum, count and member of a set, reading all of it.

    Returns:
        One sentence per problem, each naming the file; empty when the set is good.
    """
    try:
        index = read_index(folder)
    except DataError as error:
        return [str(error)]
    expected = expected_kinds(folder, index)
    problems = [problem for shard in index.shards for problem in verify_shard(folder, shard, index.size, expected)]
    return problems + unlisted(folder, index)


def verify_shard(
    folder: Path | str, shard: Shard, size: tuple[int, int] | None, expected: frozenset[str] | None = None
) -> list[str]:
    """Check one shard of a set: the part of `verify` that can be spread over workers.

    Args:
        shard: its entry in the index.
        size: of every image.
        expected: which of image, masks and json every sample must have; None leaves it open.

    Returns:
        One sentence per problem.
    """
    folder = Path(folder)
    path = folder / shard.name
    try:
        if path.stat().st_size != shard.bytes:
            return [f"{path}: {path.stat().st_size} bytes, the index says {shard.bytes}; copy or make it again"]
        if sha256_of(path) != shard.sha256:
            return [f"{path}: its checksum is not the one in the index; copy or make it again"]
    except FileNotFoundError:
        return [f"{path}: missing; copy or make it again"]
    except OSError as error:
        return [f"{path}: cannot be read ({error})"]
    problems = []
    try:
        with tarfile.open(path, "r:") as tar:
            groups, end = groups_of(tar)
            if len(groups) != shard.samples:
                problems.append(f"{path}: {len(groups)} samples, the index says {shard.samples}")
            counts = Counter(group.key for group in groups)
            problems += [f"{path}: key {key!r} comes {count} times" for key, count in counts.items() if count > 1]
            for group in groups:
                problems += [f"{path}: {group.key}: {problem}" for problem in _check(tar, group, size, expected)]
    except (tarfile.TarError, ValueError) as error:
        return [f"{path}: not a WebDataset tar ({error})"]
    try:
        sidecar = read_sidecar(folder, shard.name)
        offsets = (*(group.offset for group in groups), end)
        sums = sidecar.crc32 and row_sums(path, offsets)
        if (sidecar.shard, sidecar.offsets, sidecar.crc32) != (shard, offsets, sums):
            problems.append(f"{sidecar_path(folder, shard.name)}: does not match its shard; index the folder again")
    except DataError as error:
        problems.append(str(error))
    return problems


def unlisted(folder: Path | str, index: Index) -> list[str]:
    """A sentence for each tar of the folder that its index does not know."""
    listed = {shard.name for shard in index.shards}
    tars = (path for path in sorted(Path(folder).glob("*.tar")) if path.name not in listed)
    return [f"{path}: not in the index; remove it or index the folder again" for path in tars]


def expected_kinds(folder: Path | str, index: Index) -> frozenset[str] | None:
    """Which of image, masks and json the samples of a set have, judged by its first; None where that is unreadable.

    An index that says whether every sample has masks is believed; without the promise, some may have them.
    """
    try:
        with tarfile.open(Path(folder) / index.shards[0].name, "r:") as tar:
            first = kinds(groups_of(tar)[0][0].entries)
    except (OSError, tarfile.TarError, ValueError, IndexError):
        return None
    masks = index.about.get("masks")
    return first | {"masks"} if masks else first - {"masks"} if masks is False else first


def _check(
    tar: tarfile.TarFile, group: Group, size: tuple[int, int] | None, expected: frozenset[str] | None
) -> list[str]:
    found = kinds(group.entries)
    try:
        decode(members_of(tar, group), with_masks="masks" in found, size=size)
    except BadSample as error:
        return [str(error)]
    if missing := sorted((expected or frozenset()) - found):
        return [f"no {' and no '.join(missing)}, which other samples of the set have; make the shard again"]
    if "json" in found and expected is not None and "json" not in expected:
        return ["it has json, which other samples of the set do not have; make the shard again"]
    return []
