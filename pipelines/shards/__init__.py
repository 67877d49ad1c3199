"""A set of shards: a folder of plain WebDataset tars.

000000.tar                  members as in `pipelines.samples`; equal samples give equal bytes
000000.tar.offsets.json     where each sample begins, so that a reader can start in the middle
index.json                  per shard: name, bytes, checksum, samples; written last
"""

from pipelines.shards.checks import expected_kinds, unlisted, verify, verify_shard
from pipelines.shards.files import INDEX, Sidecar, parse_index, parse_sidecar, read_index, read_sidecar
from pipelines.shards.scan import kinds, natural, parse_sample, read_sample, scan, scan_samples, tar_names
from pipelines.shards.writing import INDEXED, index_folder, index_shard, kept_shard, write_index, write_shard

__all__ = [
    "INDEX",
    "INDEXED",
    "Sidecar",
    "expected_kinds",
    "index_folder",
    "index_shard",
    "kept_shard",
    "kinds",
    "natural",
    "parse_index",
    "parse_sample",
    "parse_sidecar",
    "read_index",
    "read_sample",
    "read_sidecar",
    "scan",
    "scan_samples",
    "tar_names",
    "unlisted",
    "verify",
    "verify_shard",
    "write_index",
    "write_shard",
]
