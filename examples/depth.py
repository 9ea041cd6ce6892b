"""Depth of one image by Depth Anything V2 from Hugging Face, on refinenet_fast's kernels.

python examples/depth.py photo.jpg --out depth.png

Needs `pip install refinenet_fast[examples]`. The weights come from the hub; where it cannot be reached the network runs
with random ones, in the widths that its name says, and says so: the picture is then meaningless, the timing is not.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError
from matplotlib import colormaps
from PIL import Image, ImageOps
from torch import Tensor, nn
from transformers import (
    AutoModelForDepthEstimation,
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)

import refinenet_fast

NAME = "depth-anything/Depth-Anything-V2-Small-hf"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PATCH = 14  # pixels; sides are multiples of it
UNREACHABLE = (OSError, *HfHubHTTPError.__bases__)  # the hub lets errors of its HTTP client through
WIDTHS = {  # the transformer's channels, blocks, heads, blocks that are read; the neck's channels, the fusion's
    "Small": (384, 12, 6, [3, 6, 9, 12], [48, 96, 192, 384], 64),
    "Base": (768, 12, 12, [3, 6, 9, 12], [96, 192, 384, 768], 128),
    "Large": (1024, 24, 16, [5, 12, 18, 24], [256, 512, 1024, 1024], 256),
}


def load(name: str) -> nn.Module:
    try:
        return AutoModelForDepthEstimation.from_pretrained(name).eval()
    except UNREACHABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        widths = named_widths(name)
        print(f"{name} cannot be fetched ({reason}): random weights instead, in {widths}'s widths", file=sys.stderr)
        torch.manual_seed(0)
        return DepthAnythingForDepthEstimation(configuration(widths)).eval()


def named_widths(name: str) -> str:
    """Those that a model's name says; Small for a name that says none."""
    return next((widths for widths in WIDTHS if widths.lower() in name.lower()), "Small")


def configuration(widths: str) -> DepthAnythingConfig:
    """Depth Anything V2's, without a look at the hub."""
    hidden, depth, heads, taps, neck, fusion = WIDTHS[widths]
    backbone = Dinov2Config(
        hidden_size=hidden,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        image_size=518,
        patch_size=PATCH,
        out_indices=taps,
        reshape_hidden_states=False,
    )
    return DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=hidden, neck_hidden_sizes=neck, fusion_hidden_size=fusion
    )


def read(path: Path, side: int) -> tuple[Image.Image, Tensor]:
    """The image, and the network's input (1, 3, H, W): its shorter side about ``side`` pixels."""
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = side / min(image.size)
    width, height = (max(1, round(s * scale / PATCH)) * PATCH for s in image.size)
    x = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).float() / 255
    x = (x - torch.tensor(MEAN)) / torch.tensor(STD)
    return image, x.permute(2, 0, 1)[None]


def seconds(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """Depth (1, H, W), and the faster of two runs."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        depth = model(x).predicted_depth
        times.append(time.perf_counter() - start)
    return depth, min(times)


def picture(depth: Tensor, size: tuple[int, int]) -> Image.Image:
    """Near is bright; of ``size`` (width, height)."""
    low, high = depth.min(), depth.max()
    scaled = ((depth - low) / (high - low).clamp(min=1e-6))[0].numpy()
    colours = (colormaps["inferno"](scaled)[..., :3] * 255).astype(np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("depth.png"))
    parser.add_argument("--model", default=NAME, help=f"of the hub; default: {NAME}")
    parser.add_argument("--side", type=int, default=518, help="pixels of the shorter side; default: 518")
    args = parser.parse_args()
    model = load(args.model)
    image, x = read(args.image, args.side)
    before, slow = seconds(model, x)
    refinenet_fast.accelerate(model)
    depth, fast = seconds(model, x)
    blocks = refinenet_fast.explain(model)
    print(f"{sum(row.op is not None for row in blocks)} of {len(blocks)} blocks accelerated")
    print(f"{slow:.2f} s before, {fast:.2f} s after; largest difference {(depth - before).abs().max():.1e}")
    picture(depth, image.size).save(args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
