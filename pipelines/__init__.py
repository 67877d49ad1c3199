"""From raw images to a batch: shards, one data order for any number of workers, and the noise that goes with it.

Every name exported here is plain numpy and imports without torch. What makes torch batches lives in
`pipelines.stream` and is imported from there.
"""

from pipelines.noise import Purpose

__all__ = ["Purpose"]
