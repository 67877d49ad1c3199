"""Converters: from data as people have it to shards. `job` says how; each format has a file of its own."""

from pipelines.ingest.coco import Coco
from pipelines.ingest.folder import Folder
from pipelines.ingest.formats import FORMATS, open_source
from pipelines.ingest.hdf5 import Hdf5
from pipelines.ingest.job import Ingest, Ingested, Piece, Written, ingest
from pipelines.ingest.movi import Movi, tfrecord_files
from pipelines.ingest.multi_object import MULTI_OBJECT, MultiObject
from pipelines.ingest.picture import CROPS, BadRecord, Framing
from pipelines.ingest.records import Examples
from pipelines.ingest.webdataset import WebDataset

__all__ = [
    "CROPS",
    "FORMATS",
    "MULTI_OBJECT",
    "BadRecord",
    "Coco",
    "Examples",
    "Folder",
    "Framing",
    "Hdf5",
    "Ingest",
    "Ingested",
    "Movi",
    "MultiObject",
    "Piece",
    "WebDataset",
    "Written",
    "ingest",
    "open_source",
    "tfrecord_files",
]
