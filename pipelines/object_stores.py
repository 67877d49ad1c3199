"""Arrow's file systems for S3 and Google Cloud Storage; credentials come from the environment, never from an address.

s3      AWS_* variables; AWS_ENDPOINT_URL for other servers
gs      application default credentials; STORAGE_EMULATOR_HOST for an emulator
"""

import os
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

SCHEMES = ("s3", "gs")


def object_store(scheme: str, bucket: str, *, timeout: float, attempts: int = 1) -> "FileSystem":
    """The store that holds a bucket.

    Args:
        scheme: of SCHEMES.
        timeout: seconds for a connection and for an answer.
        attempts: how often S3 is asked before it is an error; Google's client goes on for ``timeout``.
    """
    from pyarrow import fs

    if scheme == "gs":
        host = os.environ.get("STORAGE_EMULATOR_HOST")
        limit = timedelta(seconds=timeout)
        if host:
            parts = urlsplit(host if "://" in host else f"http://{host}")
            return fs.GcsFileSystem(
                anonymous=True, endpoint_override=parts.netloc, scheme=parts.scheme, retry_time_limit=limit
            )
        return fs.GcsFileSystem(retry_time_limit=limit)
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and not os.environ.get("AWS_ENDPOINT_URL"):
        region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(
        region=region,
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL"),
        request_timeout=timeout,
        connect_timeout=timeout,
        allow_delayed_open=True,  # what is small goes in one request
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
