"""Files by address: local paths, http(s)://, s3://, gs:// and, where allowed, the output of a command."""

from pipelines.sources.addresses import join, local_path, shown
from pipelines.sources.backends import AbsentError, ChangedError, Version
from pipelines.sources.reading import Sources

__all__ = ["AbsentError", "ChangedError", "Sources", "Version", "join", "local_path", "shown"]
