"""Converters: from data as people have it to shards."""

from pipelines.ingest.folder import Ingested, ingest_folder

__all__ = ["Ingested", "ingest_folder"]
