"""The error that stops a run because of its data."""


class DataError(Exception):
    """Data is missing or damaged beyond what may be filled in; the message names the file or shard and the cure."""
