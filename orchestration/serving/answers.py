"""From the body of a request to the body of its answer, around a function that finds the objects of one image.

image/png, image/jpeg     one image
application/json          {"inputs": [N, H, W, 3]} of whole numbers, as `mlflow models serve` takes it,
                          or {"images": [base64 of a PNG or JPEG, ...]}
"""

import asyncio
import base64
import binascii
import json
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal

from orchestration.serving.found import Found, png
from orchestration.serving.images import Framed, ImageError, Limits, Pixels, TooLargeError, decoded, framed, from_arrays

JSON = "application/json"
PNG = "image/png"
TAKEN = (PNG, "image/jpeg", JSON)

Form = Literal["facts", "labels", "overlay"]
Masks = Literal["rle", "png", "none"]


@dataclass(frozen=True)
class Work:
    """A request that is let in.

    Fields:
        media: one of TAKEN.
        body: at most `Limits.bytes` of it.
        form: facts in JSON, or a PNG of labels or overlay.
        masks: how facts tell them: run lengths, a label map as base64 of a PNG, or not at all.
    """

    media: str
    body: bytes
    form: Form = "facts"
    masks: Masks = "rle"


@dataclass(frozen=True)
class Answer:
    """What goes back.

    Fields:
        status: of HTTP.
        media: type of the body.
        images: answered for.
    """

    status: int
    media: str
    body: bytes
    images: int = 0


def problem(status: int, sentence: str) -> Answer:
    return Answer(status, JSON, json.dumps({"error": sentence}).encode())


async def answered(
    work: Work,
    *,
    model: str,
    side: int,
    limits: Limits,
    find: Callable[[Pixels], Awaitable[Found]],
    pool: Executor,
) -> Answer:
    """The answer to a request; one that cannot be answered is told why.

    Args:
        model: its name, for the answer.
        side: S, pixels that the model sees a side.
        find: what is in one image, uint8 [S, S, 3].
        pool: where images are decoded and encoded, so that the event loop goes on.
    """
    loop = asyncio.get_running_loop()
    try:
        images = await loop.run_in_executor(pool, _taken, work, side, limits)
    except TooLargeError as error:
        return problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, str(error))
    except ImageError as error:
        return problem(HTTPStatus.BAD_REQUEST, str(error))
    found = await asyncio.gather(*(find(image.pixels) for image in images))
    return await loop.run_in_executor(pool, _told, work, model, images, found)


def _taken(work: Work, side: int, limits: Limits) -> list[Framed]:
    if work.media != JSON:
        return [framed(decoded(work.body, limits.pixels), side)]
    try:
        fields = json.loads(work.body)
    except (ValueError, RecursionError) as error:
        raise ImageError(f"the body is not JSON ({error})") from None
    if not isinstance(fields, dict) or len(fields.keys() & {"inputs", "images"}) != 1:
        raise ImageError('give {"inputs": [N, H, W, 3]} or {"images": [base64, ...]}')
    (name,) = fields.keys() & {"inputs", "images"}
    values = fields[name]
    count = len(values) if isinstance(values, list) else 0
    if count == 0:
        raise ImageError(f"{name}: no image in it")
    if count > limits.images:
        raise TooLargeError(f"{name}: {count} images are over the limit of {limits.images}; send fewer at a time")
    if work.form != "facts" and count > 1:
        raise ImageError(f"{name}: {count} images; a picture is of one image")
    return _from_lists(values, side, limits) if name == "inputs" else _from_base64(values, side, limits)


def _from_lists(values: Any, side: int, limits: Limits) -> list[Framed]:
    try:
        images = from_arrays(values)
    except ImageError as error:
        raise ImageError(f"inputs: {error}") from None
    if (pixels := images[..., 0].size) > limits.pixels:
        raise TooLargeError(f"inputs: {pixels} pixels are over the limit of {limits.pixels}; send fewer at a time")
    return [framed(image, side) for image in images]


def _from_base64(values: list[Any], side: int, limits: Limits) -> list[Framed]:
    images, left = [], limits.pixels
    for number, value in enumerate(values):
        try:
            data = base64.b64decode(value, validate=True) if isinstance(value, str) else b""
            image = decoded(data, left)
        except TooLargeError as error:
            raise TooLargeError(f"images[{number}]: {error}") from None
        except (ImageError, binascii.Error) as error:
            raise ImageError(f"images[{number}]: {error}; give a PNG or JPEG in base64") from None
        left -= image[..., 0].size
        images.append(framed(image, side))  # at once: the next one may be large too
    return images


def _told(work: Work, model: str, images: list[Framed], found: list[Found]) -> Answer:
    if work.form != "facts":
        picture = found[0].labels() if work.form == "labels" else found[0].overlay()
        return Answer(HTTPStatus.OK, PNG, png(picture), 1)
    told = []
    for image, objects in zip(images, found, strict=True):
        facts: dict[str, Any] = {"box": image.box, **objects.facts()}
        if work.masks == "rle":
            facts["masks"] = objects.run_lengths()
        elif work.masks == "png":
            facts["labels"] = base64.b64encode(png(objects.labels())).decode()
        told.append(facts)
    return Answer(HTTPStatus.OK, JSON, json.dumps({"model": model, "images": told}).encode(), len(told))
