"""The members of the family: which maps each block reads, and named presets."""

from __future__ import annotations

from typing import Any

# By number of cascades: the trunk maps (0 is 1/4, 3 is 1/32) that each block reads, in the order in which the blocks
# run (figure 2 and section 4.3). Every block but the first reads the previous block's output as well.
WIRING: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0, 1, 2, 3),),
    2: ((2, 3), (0, 1)),
    4: ((3,), (2,), (1,), (0,)),
}

_PAPER = {"crp_stages": 2, "trunk_stride": "1x1", "upsample": "bicubic"}
_LIGHT = {"crp_stages": 4, "light_weight": True}

PRESETS: dict[str, dict[str, Any]] = {
    # Lin et al., CVPR 2017: Caffe's ResNet, MATLAB's resizing of the scores.
    "paper": _PAPER,
    "paper-single": {**_PAPER, "cascades": 1},
    "paper-2-cascaded": {**_PAPER, "cascades": 2},
    "paper-2-scale": {**_PAPER, "scales": (1.2, 0.6)},
    "paper-improved-crp": {**_PAPER, "crp_order": "conv-pool"},
    # DrSleep/refinenet-pytorch, whose released weights most people have.
    "pytorch-port": {"crp_stages": 4},
    # Nekrasov et al., BMVC 2018.
    "light-weight": _LIGHT,
    "light-weight-mobilenet": {**_LIGHT, "trunk": "mobilenetv2_100"},
}
"""Keyword arguments of :class:`refinenet_fast.RefineNet` by name; give another ``trunk`` beside them as you like."""
