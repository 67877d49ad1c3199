"""The errors that stop a run because of its data."""


class DataError(Exception):
    """Data is missing or damaged beyond what may be filled in; the message names the file or shard and the cure."""


class TransientError(DataError):
    """The storage did not answer, or not as it should, in every try: nothing is known about the data.

    The message names the file, the tries and the seconds. The run stops and can go on from its last checkpoint.
    """


class ContentError(Exception):
    """A shard can never be used, whoever reads it; the message says why. Its samples are filled in."""
