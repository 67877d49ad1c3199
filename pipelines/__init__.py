"""From raw images to a batch: shards, one data order for any number of workers, and the noise that goes with it.

Every name exported here imports without torch. What makes torch batches is imported from where it lives:
`pipelines.stream` (Stream, MicroBatch) and `pipelines.transforms`.
"""

from pipelines.cache import Cache
from pipelines.errors import DataError, TransientError
from pipelines.index import Index, Shard, index_from_counts
from pipelines.mixture import Mixture
from pipelines.noise import Purpose
from pipelines.plan import Plan, micro_batches
from pipelines.sets import WeightedSet, read_index
from pipelines.shards import index_folder, verify, write_index, write_shard
from pipelines.sources import Sources

__all__ = [
    "Cache",
    "DataError",
    "Index",
    "Mixture",
    "Plan",
    "Purpose",
    "Shard",
    "Sources",
    "TransientError",
    "WeightedSet",
    "index_folder",
    "index_from_counts",
    "micro_batches",
    "read_index",
    "verify",
    "write_index",
    "write_shard",
]
