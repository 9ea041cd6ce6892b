"""Command-line options that several scripts share, and putting them into effect."""

import argparse
import json
import logging
import os
from pathlib import Path

import torch

import machine

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, without the list of all options."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def positive(kind):
    """An argparse type: a number of that kind, above zero."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not value > 0:
            noun = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"expected a {noun} above 0, got {text!r}")
        return value

    return parse


def names_from(known):
    """An argparse type: a comma-separated choice from `known`."""

    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in known:
                expected = ", ".join(known)
                raise argparse.ArgumentTypeError(f"expected some of {expected}; got {name!r}")
        return names

    return parse


def output_file(text):
    """An argparse type: a file in a folder that exists, so that no run ends without its result."""
    if not Path(text).absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"the folder of {text!r} does not exist")
    return Path(text)


def add_machine_options(parser):
    """Where to run, and how the process is set up."""
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    add_process_options(parser)
    parser.add_argument("--json", metavar="FILE", type=output_file, help="write every row to FILE")


def add_process_options(parser):
    """How the process is set up."""
    parser.add_argument("--threads", type=positive(int), help="CPU threads; default: PyTorch's")
    parser.add_argument(
        "--allocator",
        choices=("keep", "default"),
        default="keep",
        help="keep: freed memory is reused without page faults; default: glibc's own setting",
    )


def set_up_machine(parser, args):
    """Applies the options above; returns the device and the fields that describe the run."""
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU that PyTorch can use; try --device cpu")
    allocator = machine.set_allocator(args.allocator)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.benchmark = True
    # torch.compile says on every machine without a GPU that it has none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    device = torch.device("cuda:0" if args.device == "cuda" else "cpu")
    return device, machine.describe(device, allocator)


def write_json(path, content):
    """Replaces the file in one step: whoever reads it sees the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
