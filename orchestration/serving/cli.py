"""slotforge predict, slotforge serve."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestration.command_line import console, fail, say
from orchestration.recipe_files import RecipeError
from orchestration.terminal import new_progress
from orchestration.wording import counted

if TYPE_CHECKING:
    from orchestration.serving.finder import ModelName
    from orchestration.serving.parts import Work
    from orchestration.serving.sources import Source

INTERRUPTED = 130

Model = Annotated[str, typer.Option(help="models:/name@champion, or models:/name/version")]
WeightsOnly = Annotated[
    bool,
    typer.Option(
        "--weights-only", help="run nothing that is packed with the model; --model may then be its folder, too"
    ),
]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow's URI; by default $MLFLOW_TRACKING_URI, or one in the state folder")
]


def predict(
    images: Annotated[
        list[str], typer.Argument(help="PNG or JPEG files; or one folder or address of images or shards")
    ],
    model: Model,
    tracking_uri: TrackingUri = None,
    weights_only: WeightsOnly = False,
    out: Annotated[Path, typer.Option(help="folder for what is found")] = Path("predictions"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="models side by side, for a set; by default a core each")
    ] = None,
) -> None:
    """Find the objects in images with a registered model.

    Of files: an overlay, the slots side by side, and a JSON for each. Of a folder of images or a set of shards (local,
    https://, s3://, gs://): label maps and overlays in tars, and a line of JSON for each image, computed in parallel
    with Ray. A killed command leaves whole parts; saying the same again goes on from them.

    An image that cannot be used is named and left out; the exit code is then 1.
    """
    from mlflow.exceptions import MlflowException

    from orchestration.clusters.connection import NoRayError
    from orchestration.serving.images import ImageError
    from orchestration.serving.parts import PartsError
    from pipelines import DataError

    files = [Path(image) for image in images if "://" not in image and not Path(image).is_dir()]
    try:
        if len(files) == len(images) and not any("{" in image for image in images):
            failed = _files(files, _named(model, tracking_uri, weights_only), out)
        elif len(images) == 1:
            failed = _set(images[0], _named(model, tracking_uri, weights_only), out, workers)
        else:
            fail("give image files, or one folder or set of shards at a time", 2)
    except (ImageError, PartsError, DataError, NoRayError, ValueError, MlflowException) as error:
        fail(str(error), 1)
    except KeyboardInterrupt:
        fail("interrupted; what is whole stays, say the same again", INTERRUPTED)
    if failed:
        fail(f"{counted(failed, 'image')} could not be predicted", 1)


def serve(
    model: Model,
    tracking_uri: TrackingUri = None,
    weights_only: WeightsOnly = False,
    host: Annotated[str, typer.Option(help="address to listen on; beyond this machine it takes a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any free one")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="demand the token in this file: Authorization: Bearer TOKEN")
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="copies of the model")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="images that a copy sees at once")] = 16,
    waiting: Annotated[int, typer.Option(min=1, help="requests at a time; more get 503")] = 64,
    max_bytes: Annotated[int, typer.Option(min=1, help="of a request")] = 16 * 2**20,
    max_pixels: Annotated[int, typer.Option(min=1, help="of a request's images together")] = 2**25,
    max_images: Annotated[int, typer.Option(min=1, help="in a request")] = 64,
) -> None:
    """Answer requests over HTTP with a registered model, in batches, on replicas that Ray Serve keeps alive.

    POST /predict takes a PNG, a JPEG, or JSON; /predict/labels.png and /predict/overlay.png answer with a picture.
    GET / tells the limits, /healthz and /metrics how the service is. docs/serving.md has it all.
    """
    try:
        from orchestration.serving.service import ServeError, Settings, read_token, run
    except ModuleNotFoundError as error:
        fail(f"{error.name} is not there; pip install 'slotforge[serve]'", 2)
    from mlflow.exceptions import MlflowException

    from orchestration.clusters.connection import NoRayError
    from orchestration.serving.app import Terms
    from orchestration.serving.images import Limits

    def started(address: str, version: str) -> None:
        say(f"{version} answers at {address}/predict; Ctrl-C stops it")

    try:
        token = None if token_file is None else read_token(token_file)
        terms = Terms(Limits(max_bytes, max_pixels, max_images), waiting, token=token)
        say("starting Ray and the model")
        run(Settings(_named(model, tracking_uri, weights_only), host, port, replicas, batch, terms), started)
    except ServeError as error:
        fail(str(error), 2)
    except (NoRayError, ValueError, MlflowException) as error:
        fail(str(error), 1)
    say("stopped")


def _files(paths: list[Path], model: "ModelName", out: Path) -> int:
    """Predicts files; how many failed."""
    from orchestration.serving.finder import Finder
    from orchestration.serving.predict import predict as predict_files

    model = model.pinned()
    finder = Finder.of(model)
    failed, clock = 0, time.perf_counter()
    with new_progress(console) as progress:
        bar = progress.add_task("predicting", total=len(paths))
        for found in predict_files(paths, finder, model.uri, out):
            progress.advance(bar)
            if found.reason is not None:
                failed += 1
                _warn(f"{found.image}: {found.reason}")
            else:
                say(f"{found.image}: {counted(found.objects, 'object')}; {', '.join(map(str, found.written))}")
    seconds = time.perf_counter() - clock
    done = len(paths) - failed
    say(f"{counted(done, 'image')} in {seconds:.1f} s ({done / seconds:.1f}/s), {failed} failed")
    return failed


def _set(place: str, model: "ModelName", out: Path, workers: int | None) -> int:
    """Predicts a set; how many images failed."""
    from orchestration.serving.parts import claim, left_of
    from orchestration.serving.sources import source_of

    source, model = source_of(place), model.pinned()
    claim(out, source, model.uri)
    work = left_of(source, out)
    failed, clock = len(work.failed), time.perf_counter()
    for reason in work.failed:
        _warn(reason)
    if work.missing:
        failed += _missing(source, work, model, out, workers)
    seconds = time.perf_counter() - clock
    rate = f"{counted(work.images, 'image')} in {seconds:.1f} s ({work.images / seconds:.1f}/s)"
    say(f"{rate}, {work.there} there before, {failed} failed: {out}")
    return failed


def _missing(source: "Source", work: "Work", model: "ModelName", out: Path, workers: int | None) -> int:
    """Predicts the parts that are not there, on Ray; how many images failed."""
    from orchestration.clusters.connection import ray_cluster
    from orchestration.serving.finder import Finder
    from orchestration.serving.predict_sets import predict_parts

    failed, side = 0, Finder.of(model).side
    with new_progress(console) as progress:
        bar = progress.add_task("starting Ray", total=work.there + work.images, completed=work.there)
        with ray_cluster((workers or 1) + 1):  # room to read beside the models
            import ray

            workers = workers or int(ray.cluster_resources().get("CPU", 1))  # type: ignore[no-untyped-call]
            progress.update(bar, description="predicting")
            for step in predict_parts(source, work, model=model, side=side, out=out, workers=workers):
                progress.advance(bar, step.images)
                failed += step.failed
                for reason in step.reasons:
                    _warn(reason)
    return failed


def _warn(line: str) -> None:
    Console(stderr=True, soft_wrap=True).print(line, style="yellow", highlight=False, markup=False)


def _named(model: str, tracking: str | None, weights_only: bool) -> "ModelName":
    from orchestration.serving.finder import ModelName
    from orchestration.tracking import store_uri

    try:
        return ModelName(model, store_uri(tracking), weights_only)
    except RecipeError as error:
        fail(str(error), 2)
