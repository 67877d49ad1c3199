"""Work on shards, from the command line and before a run: spread over Ray, a shard a task."""
