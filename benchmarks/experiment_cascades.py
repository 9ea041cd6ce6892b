"""Do more cascades and more scales segment better? RefineNet's four variants, trained on CamVid from scratch.

REFINENET_FAST_CAMVID=<folder> python benchmarks/experiment_cascades.py --device cpu --scratch runs --json cascades.json

Each network is trained under one recipe from each seed, and scored on val after the last epoch; no epoch is chosen by
its score. After every run the JSON file and a Markdown table beside it are written anew.
A run is one of `refinenet-fast train` in a folder of --scratch: the same command goes on with one that was cut off,
from its newest checkpoint, and does not repeat a finished one, of whose folder the two JSON files are enough. On a CPU
images and masks are halved, and so scored.
"""

import csv
import dataclasses
import os
import shutil
import statistics
import sys
from functools import partial
from itertools import product
from pathlib import Path

from PIL import Image

import options
from refinenet_fast.training import metrics, samples
from refinenet_fast.training.data import open_split
from refinenet_fast.training.evaluation import evaluate
from refinenet_fast.training.files import BadInput, images_below, read_json, whole_folder, write_json, write_whole
from refinenet_fast.training.loop import train
from refinenet_fast.training.model_file import load_model
from refinenet_fast.training.prediction import Segmenter
from refinenet_fast.training.run_folder import RunFolder
from refinenet_fast.training.settings import TrainSettings

NETWORKS = {  # in the paper's order, worst first
    "single": "paper-single",
    "2-cascaded": "paper-2-cascaded",
    "4-cascaded": "paper",
    "4-cascaded 2-scale": "paper-2-scale",
}
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
SEEDS = (0, 1, 2)
RESULT = "result.json"

# Validation is this script's: once, with the IoU of each class.
_COMMON = {"val_split": "", "pretrained": False, "optimizer": "adamw", "trunk_scale": 1.0, "class_weights": "log"}
_CAMVID = {**_COMMON, "num_classes": len(CLASSES), "ignore_value": len(CLASSES), "dropout": 0.1}
_NARROW = {"trunk": "resnet18", "trunk_stride": "3x3", "width": 64, "crop": (180, 240)}
_QUICK = {"trunk": "test_resnet", "trunk_stride": "3x3", "width": 8, "crop": (64, 64), "dropout": 0.1}
RECIPES = {
    "cpu": {**_CAMVID, **_NARROW, "epochs": 6, "batch": 4, "lr": 3e-4, "workers": 1},
    "cuda": {**_CAMVID, "trunk": "resnet50", "crop": (360, 480), "epochs": 30, "lr": 3e-4, "precision": "bfloat16"},
    "quick": {**_COMMON, **_QUICK, "epochs": 3, "batch": 2, "lr": 1e-3, "workers": 0},
}
HALVED = ("cpu", "quick")


# ---- data ------------------------------------------------------------------------------------


def data_folder(recipe, scratch):
    """What the recipe is trained on: CamVid, for `quick` a few generated images; halved where it says so."""
    if recipe == "quick":
        whole = scratch / "generated"
        if not whole.exists():
            with whole_folder(whole) as partial_folder:
                samples.write_samples(partial_folder, 6, 2, (96, 128))
    else:
        whole = Path(os.environ["REFINENET_FAST_CAMVID"])
    return halved(whole, scratch / "halved") if recipe in HALVED else whole


def halved(whole, target):
    """A copy of a data set at half the height and width, made once; a mask's pixel is one of the four it stands for."""
    if target.exists():
        return target
    with whole_folder(target) as folder:
        for kind, split in product(("images", "masks"), ("train", "val")):
            (folder / kind / split).mkdir(parents=True)
            how = Image.Resampling.BOX if kind == "images" else Image.Resampling.NEAREST
            for file in images_below(whole / kind / split):
                with Image.open(file) as image:
                    small = image.resize((image.width // 2, image.height // 2), how)
                small.save(folder / kind / split / f"{file.stem}.png")
        if (whole / "classes.txt").exists():
            shutil.copy(whole / "classes.txt", folder)
    return target


# ---- runs ------------------------------------------------------------------------------------


def wanted(network, seed, data, args):
    """The settings of one run."""
    changed = {} if args.epochs is None else {"epochs": args.epochs}
    recipe = {**RECIPES[args.recipe], **changed}
    return TrainSettings(data, preset=NETWORKS[network], seed=seed, device=args.device, log_every=1, **recipe)


def folder_of(network, seed, args):
    return RunFolder(args.scratch / NETWORKS[network] / f"seed-{seed}")


def run(network, seed, data, args, meta):
    """Train, from where the run was cut off if it was, and score; the row is the last thing that is written."""
    folder, settings = folder_of(network, seed, args), wanted(network, seed, data, args)
    print(f"{network}, seed {seed}", file=sys.stderr, flush=True)
    train(settings, folder.path, resume=True, say=partial(print, file=sys.stderr, flush=True))
    model, description = load_model(folder.last)
    labels = {"num_classes": description.num_classes, "ignore_value": settings.ignore_value}
    val = dataclasses.replace(open_split(data, "folder", "val"), **labels)
    segment = Segmenter(model.to(args.device), description)
    names = description.class_names if args.quick else CLASSES
    found = metrics.scores(evaluate(segment, val, settings.ignore_value), names)
    row = {"benchmark": "experiment_cascades", **meta, "network": network, "seed": seed}
    row |= {"recipe": args.recipe, "epochs": settings.epochs, "images": len(val), "size": list(val.read(0)[1].shape)}
    row |= {"parameters": sum(p.numel() for p in model.parameters()), "train_seconds": seconds_in(folder.log), **found}
    row["settings"] = {name: value for name, value in settings.to_json().items() if name != "data"}
    write_json(folder.path / RESULT, row)
    shutil.rmtree(folder.checkpoints)  # two of them, of three times the weights each
    return row


def seconds_in(log):
    """Seconds of training in all its pieces, without starts, checkpoints and scores."""
    with log.open(newline="") as file:
        return sum(float(row["seconds"]) for row in csv.DictReader(file) if row["seconds"])


def finished(data, args):
    """The rows of all runs in --scratch that are done, whichever --seeds now says.

    Raises:
        BadInput: One, done or not, is of another recipe; names what differs.
    """
    rows = []
    for network in NETWORKS:
        for path in (args.scratch / NETWORKS[network]).glob("seed-*"):
            seed = int(path.name.removeprefix("seed-"))
            RunFolder(path).check(wanted(network, seed, data, args), resume=True, overwrite=False)
            if (path / RESULT).exists():
                rows.append(read_json(path / RESULT))
    return sorted(rows, key=lambda row: (list(NETWORKS).index(row["network"]), row["seed"]))


# ---- the table -------------------------------------------------------------------------------


def table(rows):
    """Markdown: what was measured, and nothing for a network without a finished run."""
    lines = ["| network | parameters | seeds | mIoU on val, % | min–max | training, min |", "|---|---|---|---|---|---|"]
    for network in NETWORKS:
        mine = [row for row in rows if row["network"] == network]
        if not mine:
            continue
        scores = [100 * row["miou"] for row in mine]
        spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
        minutes = statistics.mean(row["train_seconds"] for row in mine) / 60
        cells = [network, f"{mine[0]['parameters'] / 1e6:.1f} M", ", ".join(str(row["seed"]) for row in mine)]
        cells += [f"{statistics.mean(scores):.1f}{spread}", f"{min(scores):.1f}–{max(scores):.1f}", f"{minutes:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*caption(rows), "", *lines]) + "\n"


def caption(rows):
    """Under which recipe, on what, with which code; several where they differ."""

    def all_of(say):
        return " and ".join(dict.fromkeys(map(say, rows)))

    def recipe(row):
        s, (height, width) = row["settings"], row["size"]
        return (
            f"{s['trunk']}, width {s['width']}, {s['epochs']} epochs from scratch, {s['precision']}; "
            f"scored on {row['images']} images of {width}×{height}"
        )

    if not rows:
        return ["No run is finished."]
    return [
        f"{all_of(recipe)}. Mean ± standard deviation (of a sample) over seeds, after the last epoch.",
        f"On {all_of(lambda row: row['device_name'])}; commit {all_of(lambda row: str(row['commit']))}.",
    ]


def report(rows, path):
    text = table(rows)
    if path is not None:
        options.write_json(path, {"rows": rows})
        write_whole(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    return text


# ---- the command -----------------------------------------------------------------------------


def seeds_in(text):
    """An argparse type: 0,1,2."""
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise options.argparse.ArgumentTypeError(f"expected whole numbers such as 0,1,2; got {text!r}")
    return seeds


def parse():
    parser = options.Parser(description=__doc__.splitlines()[0])
    options.add_machine_options(parser)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of the runs, all of one recipe")
    parser.add_argument("--runs", type=options.positive(int), help="stop after so many; default: all")
    parser.add_argument("--seeds", type=seeds_in, default=list(SEEDS), help="0,1,2")
    parser.add_argument("--epochs", type=options.positive(int), help="instead of the recipe's")
    parser.add_argument("--quick", action="store_true", help="tiny networks on a few generated images: a smoke test")
    args = parser.parse_args()
    args.recipe = "quick" if args.quick else args.device
    if not args.quick and not os.environ.get("REFINENET_FAST_CAMVID"):
        parser.error("REFINENET_FAST_CAMVID: expected the folder of CamVid, got nothing; --quick does without")
    return args, options.set_up_machine(parser, args)[1]


def main():
    args, meta = parse()
    try:
        data = data_folder(args.recipe, args.scratch)
        rows = finished(data, args)
        done = {(row["network"], row["seed"]) for row in rows}
        left = [(network, seed) for seed, network in product(args.seeds, NETWORKS) if (network, seed) not in done]
        for network, seed in left[: args.runs]:
            run(network, seed, data, args, meta)
            report(finished(data, args), args.json)
        print(report(finished(data, args), args.json), end="")
    except BadInput as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
