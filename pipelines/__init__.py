"""From raw images to a batch: shards, one data order for any number of workers, and the noise that goes with it.

Every name exported here imports without torch. What makes torch batches is imported from where it lives:
`pipelines.stream` (Stream, MicroBatch) and `pipelines.transforms`.
"""

from pipelines.errors import DataError
from pipelines.index import Index, Shard, index_from_counts
from pipelines.noise import Purpose
from pipelines.plan import Plan, micro_batches
from pipelines.shards import index_folder, read_index, verify, write_index, write_shard

__all__ = [
    "DataError",
    "Index",
    "Plan",
    "Purpose",
    "Shard",
    "index_folder",
    "index_from_counts",
    "micro_batches",
    "read_index",
    "verify",
    "write_index",
    "write_shard",
]
