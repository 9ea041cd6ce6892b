"""The command ``refinenet-fast``: its entry point, which needs nothing that a plain installation lacks."""

from __future__ import annotations

import sys

EXTRA = ("typer", "torchvision", "safetensors", "PIL", "matplotlib")


def main() -> None:
    """Run the command line; where what it needs is not installed, say how to install it."""
    try:
        from refinenet_fast import cli
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        print(f"refinenet-fast needs {error.name}: run `pip install 'refinenet_fast[train]'`", file=sys.stderr)
        raise SystemExit(1) from None
    cli.run()
