"""The commands of ``refinenet-fast``. Each reads its options, calls the package, and shows what came."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_origin

import torch
import typer
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from refinenet_fast.training.distributed import Told
from refinenet_fast.training.files import BadInput, read_json, write_json
from refinenet_fast.training.settings import TrainSettings, option_types

app = typer.Typer(
    help="Train, score and use RefineNet. Start with: refinenet-fast sample-data samples",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(stderr=True, soft_wrap=True, highlight=False)
SKIPPED = 3  # exit code where some files could not be used and the others could


def run() -> None:
    """Run the command line. What the user can mend is one line on stderr and exit code 1."""
    Image.MAX_IMAGE_PIXELS = None  # the files are the user's own: a large one is no attack
    try:
        app()
    except BadInput as error:
        if not isinstance(error, Told):  # the first rank says it
            print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


@contextmanager
def _bars() -> Iterator[Callable[[str, Iterable[Any], int], Iterator[Any]]]:
    """Progress bars on a terminal, nothing elsewhere: a function of what it is, the items and how many there are."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not _shows_bars()) as bars:

        def follow(what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
            task = bars.add_task(what, total=total)
            for item in items:
                yield item
                bars.advance(task)
            bars.remove_task(task)

        yield follow


def _shows_bars() -> bool:
    return console.is_terminal and os.environ.get("RANK", "0") == "0"


# -- train --------------------------------------------------------------------------------------------------------


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for each field of TrainSettings, of its name, type, default and meaning."""
    parameters = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind != p.VAR_KEYWORD]
    for field in dataclasses.fields(TrainSettings):
        kind, meaning = option_types()[field.name]
        if field.name == "data":
            continue
        # The help has room for names, on a narrow terminal too, if what is off unless asked for has no second one,
        # and the kinds of two values a short one.
        names = [f"--{field.name.replace('_', '-')}"] if kind is bool and not field.default else []
        metavar = "<pair>" if get_origin(kind) is tuple else None
        annotation = Annotated[kind, typer.Option(*names, metavar=metavar, help=meaning)]  # type: ignore[valid-type]
        parameters.append(
            inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


@app.command()
@_with_settings
def train(
    context: typer.Context,
    data: Annotated[Path | None, typer.Argument(help="Folder of the data set; may be left out with --resume.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Folder for the run: checkpoints, log, pictures, the trained network.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --out.")] = False,
    **options: Any,
) -> None:
    """Train a network on images/<split>/* and masks/<split>/*.png, or on VOC, SBD or Cityscapes.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m refinenet_fast train ...
    """
    from refinenet_fast.training.loop import train as run_training

    if resume and (out / "settings.json").exists():
        before = TrainSettings.from_json(read_json(out / "settings.json"))
        given = {name: value for name, value in options.items() if _was_given(context, name)}
        if data is not None:
            given["data"] = data
        settings = dataclasses.replace(before, **given)
    elif data is None:
        no_run = f", and {out} holds no run" if resume else ""
        raise BadInput(f"data: expected the folder of a data set, got none{no_run}")
    else:
        settings = TrainSettings(data, **options)
    with _bars() as bars:
        run_training(settings, out, resume=resume, overwrite=overwrite, say=_say, progress=bars)


def _was_given(context: typer.Context, name: str) -> bool:
    return context.get_parameter_source(name).name != "DEFAULT"


def _say(line: str) -> None:
    console.print(line, markup=False)


# -- evaluate and predict -----------------------------------------------------------------------------------------

Model = Annotated[Path, typer.Option(help="A model file, or the folder of a run.")]
NumClasses = Annotated[int | None, typer.Option(help="Classes that the network must have.")]
Scales = Annotated[str, typer.Option(help="Sizes at which images are seen, such as 0.75,1,1.25; the mean is taken.")]
Flip = Annotated[bool, typer.Option("--flip", help="Also mirrored; the mean is taken.")]
Tile = Annotated[int, typer.Option(help="Side of the tiles that larger images are cut into; 0: never cut.")]
Overlap = Annotated[int, typer.Option(help="Pixels that neighbouring tiles have in common.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]


def _segmenter(
    model: Path, num_classes: int | None, scales: str, flip: bool, tile: int, overlap: int, place: torch.device
) -> Any:
    from refinenet_fast.training.model_file import load_model
    from refinenet_fast.training.prediction import Segmenter

    try:
        factors = [float(part) for part in scales.split(",")]
    except ValueError:
        raise BadInput(f"scales: expected numbers such as 0.75,1,1.25, got {scales!r}") from None
    network, description = load_model(model, num_classes)
    return Segmenter(network.to(place), description, factors, flip, tile, overlap)


@app.command()
def evaluate(
    data: Annotated[Path, typer.Argument(help="Folder of the data set.")],
    model: Model,
    layout: Annotated[str, typer.Option(help="What is in it: folder, voc, sbd, cityscapes.")] = "folder",
    split: Annotated[str, typer.Option(help="The split that is scored.")] = "val",
    out: Annotated[Path | None, typer.Option(help="Folder for scores.json and confusion.png.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace those that are there.")] = False,
    ignore_value: Annotated[int, typer.Option(help="Value of a mask's pixels that are not labelled.")] = 255,
    num_classes: NumClasses = None,
    scales: Scales = "1",
    flip: Flip = False,
    tile: Tile = 0,
    overlap: Overlap = 256,
    device: Device = "auto",
    workers: Annotated[int, typer.Option(help="Processes that load data.")] = 1,
) -> None:
    """Score a trained network: mean IoU, accuracies, the IoU of each class; as JSON on stdout or in --out."""
    from refinenet_fast.training import evaluation, metrics, pictures
    from refinenet_fast.training.data import open_split
    from refinenet_fast.training.distributed import ranks

    results = [] if out is None else [out / "scores.json", out / "confusion.png"]
    for path in results:
        if path.exists() and not overwrite:
            raise BadInput(f"{path}: there already; --overwrite replaces it")
    if workers < 0:
        raise BadInput(f"workers: expected 0 or more, got {workers}")
    with ranks(device) as group:
        segment = _segmenter(model, num_classes, scales, flip, tile, overlap, group.device)
        names = segment.description.class_names
        files = dataclasses.replace(open_split(data, layout, split), num_classes=len(names), ignore_value=ignore_value)
        with _bars() as bars:
            matrix = evaluation.evaluate(
                segment,
                files,
                ignore_value,
                workers=workers,
                rank=group.rank,
                world=group.world,
                progress=lambda items, total: bars("score", items, total),
            )
        matrix = group.sum(matrix.to(group.device)).cpu()
        if not group.first:
            return
    found = metrics.scores(matrix, names) | {"images": len(files), "model": str(model), "data": str(data)}
    if out is None:
        typer.echo(json.dumps(found, indent=2))
        return
    write_json(results[0], found | {"confusion": matrix.tolist()})
    pictures.save_confusion(results[1], matrix, names)
    _show_scores(found)


def _show_scores(found: dict[str, Any]) -> None:
    table = Table("class", "IoU")
    for name, iou in found["iou"].items():
        table.add_row(name, "-" if iou is None else f"{100 * iou:.1f}")
    console.print(table)
    for name in ("miou", "pixel_accuracy", "mean_accuracy"):
        _say(f"{name.replace('_', ' ')}: " + ("-" if found[name] is None else f"{100 * found[name]:.2f} %"))


@app.command()
def predict(
    inputs: Annotated[
        list[str], typer.Argument(help="Image files, folders of them, videos, or patterns such as 'photos/*.jpg'.")
    ],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder for classes/, colour/ and overlay/.")],
    outputs: Annotated[str, typer.Option(help="Which of them.")] = "classes,colour,overlay",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there.")] = False,
    num_classes: NumClasses = None,
    scales: Scales = "1",
    flip: Flip = False,
    tile: Tile = 1024,
    overlap: Overlap = 256,
    device: Device = "auto",
) -> None:
    """Turn photos and videos into masks: PNGs of class indices, of colours, and of the colours over the photo.

    Of a video, the last two are videos, and the first are the PNGs of its frames (needs refinenet_fast[video]).
    A file that cannot be read is reported and skipped; the exit code is then 3.
    """
    from refinenet_fast.training.distributed import ranks
    from refinenet_fast.training.prediction import find_inputs, predict_files

    files = find_inputs(inputs)
    with ranks(device) as group:
        segment = _segmenter(model, num_classes, scales, flip, tile, overlap, group.device)
        skipped = []
        with _bars() as bars:
            results = predict_files(segment, files, out, outputs.split(","), overwrite)
            for file, problem in bars("predict", results, len(files)):
                if problem is not None:
                    print(f"skipped: {problem}", file=sys.stderr)
                    skipped.append(file)
    _say(f"{len(files) - len(skipped)} of {len(files)} files: {out}")
    if skipped:
        raise typer.Exit(SKIPPED)


# -- export -------------------------------------------------------------------------------------------------------


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The file.")],
    format: Annotated[str, typer.Option(help="onnx, or torch: what torch.export.load reads.")] = "onnx",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that is there.")] = False,
    num_classes: NumClasses = None,
) -> None:
    """Write a trained network for other programs: any batch, any size from 33 pixels on, normalisation inside.

    It takes "images", float32 (N, 3, H, W), RGB from 0 to 1, and gives "logits", (N, classes, H, W).
    """
    from refinenet_fast.exporting import FORMATS
    from refinenet_fast.exporting import export as write
    from refinenet_fast.training.model_file import load_model

    if format not in FORMATS:
        raise BadInput(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if out.exists() and not overwrite:
        raise BadInput(f"{out}: there already; --overwrite replaces it")
    network, description = load_model(model, num_classes)
    about = {"class_names": description.class_names, "image_scale": description.scale}
    try:
        write(network, out, format, mean=description.mean, std=description.std, metadata=about)
    except ImportError as error:
        raise BadInput(str(error)) from error
    except OSError as error:
        raise BadInput(f"{out}: cannot be written: {error.strerror or error}") from error
    if description.scale != 1:
        _say(f"it was trained on images scaled by {description.scale:g}: scale them before it sees them")
    _say(f"written: {out}")


# -- the rest -----------------------------------------------------------------------------------------------------


@app.command()
def sample_data(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    train: Annotated[int, typer.Option(help="Images to train on.", min=1)] = 32,
    val: Annotated[int, typer.Option(help="Images to validate on.", min=1)] = 8,
    height: Annotated[int, typer.Option(min=1)] = 96,
    width: Annotated[int, typer.Option(min=1)] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write a small generated data set, to try everything out on."""
    from refinenet_fast.training.samples import write_samples

    write_samples(folder, train, val, (height, width), seed)
    _say(f"{train} + {val} images and masks: {folder}")


@app.command()
def tune(
    model: Annotated[
        Path | None, typer.Option(help="A model file or a run's folder; without: a fresh network.")
    ] = None,
    trunk: Annotated[str, typer.Option(help="Of a fresh network.")] = "resnet101",
    num_classes: Annotated[int, typer.Option(help="Of a fresh network.", min=1)] = 21,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    height: Annotated[int, typer.Option(min=1)] = 512,
    width: Annotated[int, typer.Option(min=1)] = 512,
    train: Annotated[bool, typer.Option("--train", help="Also what training runs.")] = False,
    device: Device = "auto",
) -> None:
    """Measure what runs each convolution fastest on this machine; later runs read the table this writes."""
    from refinenet_fast.model import RefineNet
    from refinenet_fast.training.distributed import ranks
    from refinenet_fast.training.model_file import load_model
    from refinenet_fast.tuning import tune as measure

    with ranks(device) as group:
        try:
            network = load_model(model)[0] if model else RefineNet(num_classes, trunk)
        except (ValueError, ImportError) as error:
            raise BadInput(str(error)) from error
        network = network.train(train).to(group.device)
        images = torch.randn(batch, 3, height, width, device=group.device)
        try:
            written = measure(network, images, progress=_say)
        except OSError as error:
            raise BadInput(f"the table cannot be written: {error}") from error
    _say(f"written: {written}" if written else "nothing to choose from on this machine's backend")


@app.command()
def doctor() -> None:
    """Say what is installed, what was built, which backends run here, and what is missing and why."""
    import importlib.metadata

    from refinenet_fast._native import build_info
    from refinenet_fast.backends import list_backends
    from refinenet_fast.backends.table import user_folder

    table = Table("package", "version")
    core, extras = ("refinenet_fast", "torch", "triton", "timm"), ("torchvision", "safetensors", "pillow", "scipy")
    for name in (*core, *extras, "av", "tensorboard", "onnx", "onnxscript"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    stdout = Console(soft_wrap=True)
    stdout.print(table)
    table = Table("backend", "runs here", "note")
    for info in list_backends():
        table.add_row(info.name, "yes" if info.available else "no", info.reason or "")
    stdout.print(table)
    gpus = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    stdout.print(
        f"GPUs: {', '.join(gpus) or 'none'}; CPU: {os.cpu_count()} cores; tables: {user_folder()}", markup=False
    )
    try:
        stdout.print_json(data=build_info())
    except RuntimeError as error:
        raise BadInput(str(error)) from error
