"""Every format by name, for whoever chooses one at run time."""

from pathlib import Path

from pipelines.ingest.coco import Coco
from pipelines.ingest.folder import Folder
from pipelines.ingest.hdf5 import Hdf5
from pipelines.ingest.movi import Movi, tfrecord_files
from pipelines.ingest.multi_object import MULTI_OBJECT
from pipelines.ingest.records import Examples
from pipelines.ingest.source import Source
from pipelines.ingest.webdataset import WebDataset

FORMATS = ("images", "coco", "hdf5", "movi", "webdataset", *MULTI_OBJECT)


def open_source(format: str, path: Path | str, *, images: Path | None = None, masks: Path | None = None) -> Source:
    """A source of a format.

    Args:
        format: one of FORMATS.
        path: a folder (images, webdataset, movi), a file, or how the names of TFRecord files begin.
        images: folder of COCO's images.
        masks: folder of masks for a folder of images.

    Raises:
        ValueError: the format is not known, or does not go with `images` or `masks`.
        DataError: TFRecord files are missing.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format: {format!r} is not known; use one of {', '.join(FORMATS)}")
    if images is not None and format != "coco":
        raise ValueError(f"images: the format {format} has no folder of images beside it; leave it out")
    if masks is not None and format != "images":
        raise ValueError(f"masks: the format {format} has its masks inside; leave it out")
    if format in MULTI_OBJECT:
        return Examples(tfrecord_files(path), MULTI_OBJECT[format])
    if format == "movi":
        return Examples(tfrecord_files(path), Movi())
    if format == "coco":
        return Coco(path, images)
    if format == "hdf5":
        return Hdf5(path)
    return WebDataset(path) if format == "webdataset" else Folder(path, masks)
