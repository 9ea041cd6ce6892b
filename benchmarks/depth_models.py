"""Other people's networks with RefineNet's blocks, from their configurations, with random weights: nothing is fetched.

Needs transformers and segmentation_models_pytorch (extra `bench`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree


@dataclasses.dataclass(frozen=True)
class Widths:
    """Of a vision transformer (hidden, depth, heads) and the decoder on it: of its neck's maps, of its fusion."""

    hidden: int
    depth: int
    heads: int
    neck: tuple[int, int, int, int]
    fusion: int

    @property
    def taps(self):
        """The transformer's blocks whose results are read, counted from 1: one at each quarter."""
        return [self.depth * k // 4 for k in (1, 2, 3, 4)]


TINY = Widths(hidden=32, depth=4, heads=2, neck=(12, 16, 24, 24), fusion=12)
SMALL = Widths(hidden=384, depth=12, heads=6, neck=(48, 96, 192, 384), fusion=64)
BASE = Widths(hidden=768, depth=12, heads=12, neck=(96, 192, 384, 768), fusion=128)
LARGE = Widths(hidden=1024, depth=24, heads=16, neck=(256, 512, 1024, 1024), fusion=256)
TIPS_BASE = dataclasses.replace(BASE, fusion=256)
CHM_LARGE = dataclasses.replace(LARGE, neck=(128, 256, 512, 1024))


def _vit(kind, widths, patch, **options):
    """A Hugging Face configuration of a plain vision transformer."""
    sizes = {"hidden_size": widths.hidden, "num_hidden_layers": widths.depth, "num_attention_heads": widths.heads}
    return kind(**sizes, patch_size=patch, **options)


def _dinov2(widths, **options):
    from transformers import Dinov2Config

    options = {"image_size": 518, "out_indices": widths.taps, "reshape_hidden_states": False} | options
    return _vit(Dinov2Config, widths, 14, mlp_ratio=4, apply_layernorm=True, **options)


def depth_anything(widths, **options):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    sizes = {"reassemble_hidden_size": widths.hidden, "neck_hidden_sizes": list(widths.neck)}
    return DepthAnythingForDepthEstimation(
        DepthAnythingConfig(
            backbone_config=_dinov2(widths), **sizes, fusion_hidden_size=widths.fusion, head_hidden_size=32, **options
        )
    )


def prompt_depth_anything(widths):
    from transformers import PromptDepthAnythingConfig, PromptDepthAnythingForDepthEstimation

    sizes = {"reassemble_hidden_size": widths.hidden, "neck_hidden_sizes": list(widths.neck)}
    return PromptDepthAnythingForDepthEstimation(
        PromptDepthAnythingConfig(backbone_config=_dinov2(widths), **sizes, fusion_hidden_size=widths.fusion)
    )


def dpt(widths, segments=False, **options):
    from transformers import DPTConfig, DPTForDepthEstimation, DPTForSemanticSegmentation

    taps = [tap - 1 for tap in widths.taps]
    sizes = {"intermediate_size": 4 * widths.hidden, "neck_hidden_sizes": list(widths.neck), "is_hybrid": False}
    sizes |= {"backbone_out_indices": taps, "fusion_hidden_size": widths.fusion, "image_size": 384}
    kind = DPTForSemanticSegmentation if segments else DPTForDepthEstimation
    return kind(_vit(DPTConfig, widths, 16, **(sizes | options)))


def dpt_hybrid(widths, side):
    """A ResNet's maps for the two finest levels. Images are of one size, ``side`` square."""
    channels = [-(-c // 8) * 8 for c in (*widths.neck[:2], 2 * widths.neck[1])]  # rounded as it would round them
    resnet = {"model_type": "bit", "layer_type": "bottleneck", "depths": [1, 1, 1], "hidden_sizes": channels}
    resnet |= {"embedding_size": channels[0], "num_groups": 1, "global_padding": "same"}
    resnet |= {"out_features": ["stage1", "stage2", "stage3"], "embedding_dynamic_padding": True}
    shape = [1, channels[-1], side // 16, side // 16]
    neck = [*channels[:2], *widths.neck[2:]]
    options = {"backbone_config": resnet, "backbone_featmap_shape": shape, "neck_hidden_sizes": neck}
    return dpt(widths, is_hybrid=True, image_size=side, **options)


def zoedepth(widths, **options):
    from transformers import BeitConfig, ZoeDepthConfig, ZoeDepthForDepthEstimation

    vit = {"intermediate_size": 4 * widths.hidden, "image_size": 384, "out_indices": widths.taps}
    vit |= {"reshape_hidden_states": False, "use_relative_position_bias": True}
    sizes = {"neck_hidden_sizes": list(widths.neck), "fusion_hidden_size": widths.fusion}
    return ZoeDepthForDepthEstimation(
        ZoeDepthConfig(
            backbone_config=_vit(BeitConfig, widths, 16, **vit), **sizes, bottleneck_features=widths.fusion, **options
        )
    )


def chmv2(widths):
    from transformers import CHMv2Config, CHMv2ForDepthEstimation, DINOv3ViTConfig

    options = {"intermediate_size": 4 * widths.hidden, "image_size": 224, "out_indices": widths.taps}
    options |= {"reshape_hidden_states": True, "return_class_token": True, "num_register_tokens": 4}
    sizes = {"post_process_channels": list(widths.neck), "fusion_hidden_size": widths.fusion, "head_hidden_size": 32}
    return CHMv2ForDepthEstimation(CHMv2Config(backbone_config=_vit(DINOv3ViTConfig, widths, 16, **options), **sizes))


def tipsv2_dpt(widths):
    from transformers import Tipsv2DptConfig, Tipsv2DptForDepthEstimation, Tipsv2VisionConfig

    options = {"image_size": 224, "out_indices": widths.taps, "reshape_hidden_states": False}
    sizes = {"neck_hidden_sizes": list(widths.neck), "fusion_hidden_size": widths.fusion}
    return Tipsv2DptForDepthEstimation(
        Tipsv2DptConfig(backbone_config=_vit(Tipsv2VisionConfig, widths, 14, **options), **sizes)
    )


def depth_pro(widths, **options):
    from transformers import DepthProConfig, DepthProForDepthEstimation

    small = widths is TINY
    patch = 32 if small else 384
    vit = {"model_type": "dinov2", "hidden_size": widths.hidden, "num_hidden_layers": widths.depth}
    vit |= {"num_attention_heads": widths.heads, "image_size": patch, "patch_size": 8 if small else 16, "mlp_ratio": 4}
    sizes = {"fusion_hidden_size": widths.fusion, "patch_size": patch, "use_fov_model": False}
    sizes |= {"intermediate_hook_ids": [widths.taps[1] - 1, widths.taps[0] - 1]}
    sizes |= {"intermediate_feature_dims": [widths.fusion] * 2, "scaled_images_feature_dims": list(widths.neck[:0:-1])}
    return DepthProForDepthEstimation(
        DepthProConfig(image_model_config=vit, patch_model_config=vit, fov_model_config=vit, **(sizes | options))
    )


def smp_dpt(widths):
    import segmentation_models_pytorch as smp

    return smp.DPT(
        "tu-vit_base_patch16_224.augreg_in21k",
        encoder_weights=None,
        encoder_depth=4,
        decoder_intermediate_channels=widths.neck,
        decoder_fusion_channels=widths.fusion,
        classes=5,
        dynamic_img_size=True,
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """How a network is built, at what sizes it is shown, and the modules that are its decoder, in order."""

    build: Callable[[Widths], torch.nn.Module]
    widths: dict[str, Widths]
    side: int  # of the image, in pixels
    decoder: tuple[str, ...]


SIZES = {"S": SMALL, "B": BASE, "L": LARGE}
FAMILIES = {
    "depth-anything": Family(depth_anything, SIZES, 518, ("neck", "head")),
    "dpt": Family(dpt, {"L": LARGE}, 384, ("neck", "head")),
    "zoedepth": Family(zoedepth, {"L": LARGE}, 384, ("neck", "relative_head")),
    "chmv2": Family(chmv2, {"L": CHM_LARGE}, 384, ("head", "features_to_depth")),
    "tipsv2-dpt": Family(tipsv2_dpt, {"B": TIPS_BASE}, 448, ("neck", "decoder", "bin_regressor")),
    "prompt-depth-anything": Family(prompt_depth_anything, {"S": SMALL, "L": LARGE}, 518, ("neck", "head")),
    "depth-pro": Family(depth_pro, {"L": LARGE}, 1536, ("fusion_stage", "head")),
    "smp-dpt": Family(smp_dpt, {"B": LARGE}, 384, ("decoder", "segmentation_head")),
}


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Weights and statistics that keep the data's scale: as initialised, many a decoder gives a constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p[0].numel() ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
    return model


class Decoder(torch.nn.Module):
    """Modules of a network, each fed by the one before, as one run of the network called them.

    forward(*tensors): what the first module was given, its tensors in order. `inputs` are those of that run. Of a list
    of maps, a module that takes one map is given the last.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str], image: torch.Tensor) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(model.get_submodule(name) for name in names)
        calls: list[Any] = []
        hooks = [
            part.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
            for part in self.parts
        ]
        with torch.no_grad():
            model(image)
        for hook in hooks:
            hook.remove()
        leaves, self.layout = pytree.tree_flatten(calls[0])
        self.inputs = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.leaves = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self.slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.rest = [(isinstance(args[0], torch.Tensor), args[1:], kwargs) for args, kwargs in calls[1:]]

    def forward(self, *tensors):
        leaves = list(self.leaves)
        for slot, tensor in zip(self.slots, tensors):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self.layout)
        y = self.parts[0](*args, **kwargs)
        for part, (takes_one, args, kwargs) in zip(self.parts[1:], self.rest):
            y = part(y[-1] if takes_one and isinstance(y, list) else y, *args, **kwargs)
        return y
