"""The whole network: a trunk, or one for each scale, and a cascade of RefineNet blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refinenet_fast import folding, published
from refinenet_fast.blocks import Convolution, RefineNetBlock, check_count, check_kernel, check_positive
from refinenet_fast.initialise import INITS, initialise
from refinenet_fast.ops import _check, fuse
from refinenet_fast.ops._autocast import autocast_dtype
from refinenet_fast.ops.crp import ORDERS
from refinenet_fast.ops.rcu import SKIPS
from refinenet_fast.trunks import create_trunk, features
from refinenet_fast.variants import PRESETS, WIRING

HEADS = {"3x3": 3, "1x1": 1}
CONV_BIASES = {"first": (True, False), "both": (True, True), "none": (False, False)}
# How logits come to the images' size: bilinearly without or with aligned corners, bicubically.
UPSAMPLINGS = ("bilinear", "bilinear-aligned", "bicubic")


class Prediction(NamedTuple):
    """What :meth:`RefineNet.predict` returns."""

    classes: Tensor  # (N, H, W) int64
    probabilities: Tensor  # (N, H, W) float32 (float64 for a float64 model), of the class that was chosen


class RefineNet(nn.Module):
    """RefineNet for semantic segmentation (Lin et al., CVPR 2017; arXiv 1611.06612), every variant of it.

    The trunk's maps at 1/4, 1/8, 1/16 and 1/32 go through the blocks from the deepest on. Dropout acts on the two
    deepest maps and before the classifier. The decoder has no batch norm.

    Args:
        num_classes: Channels of the logits.
        trunk: The name of a timm model with maps at 1/4, 1/8, 1/16 and 1/32: the paper's are ResNet-50, 101 and 152.
        pretrained: Load the trunk's ImageNet weights.
        cascades: Blocks: 4 (figure 2c), 2 (a block on {1/16, 1/32}, one on {1/4, 1/8, previous}) or 1, that fuses all.
        scales: The image's sizes that trunks see: ``(1.2, 0.6)`` is the paper's 2-scale network, in which each block
            fuses the maps of all trunks at its level. With 4 cascades only.
        crp_stages: Stages of chained residual pooling: 2 in the paper, 4 in the released networks.
        crp_order: ``"pool-conv"``, or ``"conv-pool"`` (the paper's improved variant).
        width: Channels of the blocks.
        deep_width: Channels of the deepest block, unless it is the only one.
        light_weight: Light-Weight RefineNet (Nekrasov et al., BMVC 2018): no residual conv units, 1x1 convolutions.
        rcu_skip: ``"raw"`` (paper), or ``"relu"`` (ports whose ReLU works in place).
        conv_bias: Which convolutions of a residual conv unit have one: ``"first"``, ``"both"`` or ``"none"``.
        head: The classifier's kernel, ``"3x3"`` or ``"1x1"``; it has a bias.
        align_corners: Of the bilinear upsampling inside the blocks.
        dropout: Probability of dropping an activation, in training.
        freeze_bn: Keep the trunk's batch norm as it is in training: its parameters require no gradient, and the model's
            ``train()`` leaves it in eval mode. None: where pretrained weights were loaded.
        upsample: True or ``"bilinear"``: logits at the images' size, without aligned corners; ``"bilinear-aligned"``
            with them; ``"bicubic"`` as the original; False: at the last block's size, a quarter of the image's (of the
            largest scale's).
        share_trunk: One trunk for all scales, rather than one with weights of its own for each.
        trunk_stride: ``"3x3"`` (torchvision, timm), or ``"1x1"`` (Caffe, and so the paper; timm's pretrained weights
            were trained with the other).
        crp_kernel: Of the convolutions in chained residual pooling, 3 or 1; None: 3, and 1 where ``light_weight``.
        init: Of the decoder: ``"paper"`` or ``"kaiming"``, see :func:`refinenet_fast.initialise.initialise`.
        recompute_units: Of each residual conv unit, compute the first convolution again in backward instead of keeping
            its result: a convolution more beside six, and the decoder keeps a third less.
        checkpoint_blocks: Of each block, and of each of the trunk's stages, keep the input alone, and compute the rest
            again in backward: the least memory, for one more forward pass. The same bits either way.

    Raises:
        TypeError, ValueError: An argument is not of this form, or contradicts another; names it, what was expected and
            what came.
        ImportError: timm is not installed.
        RuntimeError: The pretrained weights cannot be had; says what to do.

    Example:
        >>> model = RefineNet(num_classes=21, trunk="resnet18").eval()
        >>> model(torch.randn(1, 3, 375, 500)).shape
        torch.Size([1, 21, 375, 500])
    """

    def __init__(
        self,
        num_classes: int,
        trunk: str = "resnet101",
        pretrained: bool = False,
        cascades: int = 4,
        scales: Sequence[float] = (1.0,),
        crp_stages: int = 2,
        crp_order: str = "pool-conv",
        width: int = 256,
        deep_width: int = 512,
        light_weight: bool = False,
        rcu_skip: str = "raw",
        conv_bias: str = "first",
        head: str = "3x3",
        align_corners: bool = True,
        dropout: float = 0.5,
        freeze_bn: bool | None = None,
        upsample: bool | str = True,
        *,
        share_trunk: bool = False,
        trunk_stride: str = "3x3",
        crp_kernel: int | None = None,
        init: str = "paper",
        recompute_units: bool = True,
        checkpoint_blocks: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "crp_stages": crp_stages, "width": width, "deep_width": deep_width}
        for argument, value in sizes.items():
            check_positive(value, argument)
        for argument, word, known in (
            ("crp_order", crp_order, ORDERS),
            ("rcu_skip", rcu_skip, SKIPS),
            ("conv_bias", conv_bias, tuple(CONV_BIASES)),
            ("head", head, tuple(HEADS)),
            ("init", init, INITS),
        ):
            _check.choice(word, argument, known)
        _check.flag(pretrained, "pretrained")
        _check.flag(recompute_units, "recompute_units")
        if _check.flag(light_weight, "light_weight"):
            _without_units(rcu_skip=(rcu_skip, "raw"), conv_bias=(conv_bias, "first"))
        crp_kernel = (1 if light_weight else 3) if crp_kernel is None else check_kernel(crp_kernel, "crp_kernel")
        self.wiring = _wiring(cascades)
        self.scales = _scales(scales, cascades, _check.flag(share_trunk, "share_trunk"))
        self.upsample = _upsampling(upsample)
        self.dropout = nn.Dropout(_probability(dropout))
        self.freeze_bn = _check.flag(pretrained if freeze_bn is None else freeze_bn, "freeze_bn")
        self.checkpoint_blocks = _check.flag(checkpoint_blocks, "checkpoint_blocks")
        self.trunk_name = trunk
        self.trunks = nn.ModuleList()
        for _ in range(1 if share_trunk else len(self.scales)):
            net, channels = create_trunk(trunk, pretrained, trunk_stride)
            self.trunks.append(net)
        self.blocks = nn.ModuleList()
        previous = None
        for i, reads in enumerate(self.wiring):
            last = i == len(self.wiring) - 1
            channels_out = width if last or i > 0 else deep_width
            self.blocks.append(
                RefineNetBlock(
                    [channels[level] for level in reads for _ in self.scales],
                    channels_out,
                    previous,
                    crp_stages,
                    output_units=0 if light_weight else 3 if last else 1,
                    align_corners=align_corners,
                    adaptive_units=0 if light_weight else 2,
                    kernel_size=1 if light_weight else 3,
                    crp_order=crp_order,
                    crp_kernel=crp_kernel,
                    rcu_bias=CONV_BIASES[conv_bias],
                    rcu_skip=rcu_skip,
                    rcu_recompute=recompute_units,
                )
            )
            previous = channels_out
        kernel = HEADS[head]
        self.classifier = Convolution(width, num_classes, kernel, padding=kernel // 2)
        initialise(self.blocks, self.classifier, init)
        for norm in self._frozen():
            norm.requires_grad_(False)
        self.train()

    @property
    def trunk(self) -> nn.Module:
        """The trunk; the first of several."""
        return self.trunks[0]

    # -- construction from elsewhere ------------------------------------------------------------------------------

    @classmethod
    def from_preset(cls, name: str, num_classes: int, **overrides: Any) -> RefineNet:
        """A named network: see :data:`refinenet_fast.variants.PRESETS`.

        Raises:
            ValueError: No such preset; names those there are.
        """
        _check.choice(name, "name", tuple(PRESETS))
        return cls(num_classes, **{**PRESETS[name], **overrides})

    @classmethod
    def from_state_dict(
        cls,
        source: str | Path | Mapping[str, Any],
        **overrides: Any,
    ) -> RefineNet:
        """The network that a published state dict belongs to, with its weights, in eval mode.

        Both published layouts are recognised, DrSleep/refinenet-pytorch's and DrSleep/light-weight-refinenet's, also
        wrapped in ``{"segmenter": ...}``, ``{"model": ...}``, ``{"weights": ...}`` or ``{"state_dict": ...}`` and with
        the prefix ``module.``. Trunk, classes and widths follow from the shapes; four stages of chained residual
        pooling and a bias on the first convolution of each residual conv unit are expected, as the published networks
        have.

        Args:
            source: A state dict, or the path of a file: PyTorch's, read with ``weights_only=True``, or
                ``.safetensors``. Float64 tensors give a float64 network, others a float32 one.
            **overrides: Of the constructor's arguments, those that the weights do not decide: ``upsample=False``, as
                the published networks are, ``dropout``, ``align_corners``, ``rcu_skip``, ``crp_order``,
                ``trunk_stride``; ``crp_stages`` and ``conv_bias`` where they are others. Batch norm is frozen unless
                ``freeze_bn=False``.

        Raises:
            TypeError: ``source`` or an entry of it is something else.
            ValueError: It is no such state dict (says what it looks like), a key is missing, unknown or of another
                shape (names all of them), or an override contradicts the weights.
        """
        weights = published.read(source)
        decided = published.recognise(weights) | {"pretrained": False, "cascades": 4}
        for name, value in decided.items():
            if name in overrides and overrides[name] != value:
                raise ValueError(f"{name}: expected {value!r}, as in the state dict, got {overrides[name]!r}")
        model = cls(**{"crp_stages": 4, "freeze_bn": True, **overrides, **decided})
        published.load(model, weights)
        return model.eval()

    def to_published_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of the published networks: what :meth:`from_state_dict` reads.

        Tensors share memory with the model's, as those of ``state_dict()`` do. Conventions that no weights tell
        (``rcu_skip``, ``crp_order``, ``align_corners``, ``trunk_stride``) are not in it.

        Raises:
            ValueError: The published networks have no names for this variant; says why.
        """
        own = self.state_dict()
        return {theirs: own[ours] for theirs, ours in published.names(self).items()}

    def fold_batch_norm(self) -> RefineNet:
        """A copy for inference, in eval mode, with the trunk's batch norm folded into its convolutions.

        Raises:
            ValueError: A trunk has a batch norm that does not follow a convolution; names it.
        """
        return folding.folded(self)

    # -- training -------------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> RefineNet:
        """Training or evaluation mode; frozen batch norm stays in evaluation mode."""
        super().train(mode)
        for norm in self._frozen():
            norm.eval()
        return self

    def _frozen(self) -> list[nn.Module]:
        modules = self.trunks.modules() if self.freeze_bn else ()
        return [module for module in modules if isinstance(module, nn.modules.batchnorm._BatchNorm)]

    def param_groups(self, lr: float, trunk_scale: float = 0.1, weight_decay: float = 5e-4) -> list[dict[str, Any]]:
        """Groups for an optimizer: the trunk at ``lr * trunk_scale``, everything else at ``lr`` (section 4).

        Parameters that require no gradient, such as those of frozen batch norm, are left out.

        Example:
            >>> model = RefineNet(num_classes=21, trunk="resnet18")
            >>> optimizer = torch.optim.SGD(model.param_groups(lr=5e-4), momentum=0.9)
        """
        trunk = [p for p in self.trunks.parameters() if p.requires_grad]
        in_trunk = {id(p) for p in self.trunks.parameters()}
        decoder = [p for p in self.parameters() if p.requires_grad and id(p) not in in_trunk]
        groups = [("trunk", trunk, lr * trunk_scale), ("decoder", decoder, lr)]
        return [{"name": n, "params": ps, "lr": rate, "weight_decay": weight_decay} for n, ps, rate in groups if ps]

    # -- computation ----------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N, num_classes, H, W), or where upsample=False (N, num_classes, H / 4, W / 4) rounded up
        """Logits, in ``channels_last`` memory.

        Args:
            images: Of any size from one pixel up (with ResNets and MobileNets; some trunks need more), in any memory
                layout, normalised as the trunk's training images were
                (for timm's ResNets by ImageNet's mean and standard deviation per channel); of the model's dtype, or of
                one that autocast casts.

        Raises:
            TypeError, ValueError: ``images`` are not of this form; says what was expected and what came.
        """
        logits = self._small_logits(images)
        return self._resize(logits, images) if self.upsample else logits

    @torch.no_grad()
    def predict(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> Prediction:
        """The most probable class of every pixel and its probability, at the images' size; as in eval mode.

        The same as ``model(images).float().softmax(1).max(1)``, some classes at a time: full-size logits of all
        classes, which at 150 classes and 1024x2048 pixels are 1.3 GB an image, are never held at once.

        Args:
            images: As in :meth:`forward`.
        """
        training = [module for module in self.modules() if module.training]
        super().train(False)
        try:
            logits = self._small_logits(images)
        finally:
            for module in training:
                module.training = True
        return _most_probable(logits, lambda some: self._resize(some, images))

    def _small_logits(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N, num_classes, H / 4, W / 4)
        self._check_images(images)
        again = self.checkpoint_blocks and torch.is_grad_enabled()
        return self._decode([self._features(k, scale, images, again) for k, scale in enumerate(self.scales)], again)

    def _decode(
        self,
        maps: list[list[Tensor]],  # of each scale, (N, C_i, H_i, W_i) at 1/4, 1/8, 1/16 and 1/32
        again: bool = False,
    ) -> Tensor:  # (N, num_classes, H / 4, W / 4)
        """Blocks and classifier; ``again``: backward computes each block again from its input."""
        y: Tensor | None = None
        for reads, block in zip(self.wiring, self.blocks, strict=True):
            paths = [features[level] for level in reads for features in maps]
            paths = paths if y is None else [*paths, y]
            y = checkpoint(block, paths, use_reentrant=False, preserve_rng_state=False) if again else block(paths)
        return self.classifier(self.dropout(y))

    def _features(
        self,
        k: int,
        scale: float,
        images: Tensor,  # (N, 3, H, W)
        again: bool,
    ) -> list[Tensor]:  # each (N, C_i, scale * H / r_i, scale * W / r_i), r = 4, 8, 16, 32
        """The four maps of the image at the k-th scale, dropout on the two deepest; ``again``: see :func:`features`."""
        if scale != 1:
            up, down = Fraction(scale).limit_denominator(1000).as_integer_ratio()  # for sizes that are symbols
            size = [max(1, (2 * side * up + down) // (2 * down)) for side in images.shape[2:]]
            images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        trunk = self.trunks[k if len(self.trunks) > 1 else 0]
        maps = features(trunk, images.contiguous(memory_format=torch.channels_last), again)
        return [*maps[:2], self.dropout(maps[2]), self.dropout(maps[3])]

    def _resize(
        self,
        logits: Tensor,  # (N, K, h, w)
        images: Tensor,  # (N, 3, H, W)
    ) -> Tensor:  # (N, K, H, W)
        size = (images.shape[2], images.shape[3])
        if self.upsample == "bicubic":
            return F.interpolate(logits, size, mode="bicubic", align_corners=False)
        return fuse([logits], [None], size=size, align_corners=self.upsample == "bilinear-aligned")

    def _check_images(
        self,
        images: Tensor,  # (N, 3, H, W)
    ) -> None:
        if not isinstance(images, Tensor):
            raise TypeError(f"images: expected a Tensor, got {type(images).__name__}")
        if images.dim() != 4 or images.shape[1] != 3 or images.shape[2] < 1 or images.shape[3] < 1:
            raise ValueError(f"images: expected shape (N, 3, H, W) with H, W >= 1, got {tuple(images.shape)}")
        weight = self.classifier.weight
        if images.device != weight.device:
            raise ValueError(f"images: expected device {weight.device}, that of the model, got {images.device}")
        if not images.dtype.is_floating_point or autocast_dtype(images) != autocast_dtype(weight):
            raise TypeError(f"images: expected {weight.dtype}, the dtype of the model, got {images.dtype}")


def _most_probable(
    logits: Tensor,  # (N, K, h, w)
    resize: Callable[[Tensor], Tensor],  # (N, k, h, w) -> (N, k, H, W)
) -> Prediction:
    """Softmax and its maximum over resized logits, a few classes at a time."""
    few = max(1, min(8, logits.shape[1] // 4))
    wide = torch.promote_types(logits.dtype, torch.float32)
    best = classes = total = None
    for first in range(0, logits.shape[1], few):
        some = resize(logits[:, first : first + few]).to(wide)
        value, index = some.max(1)
        higher = value if best is None else torch.maximum(best, value)
        level = torch.where(higher == -math.inf, 0, higher)  # of classes that are ruled out, so far all
        here = torch.exp(some - level[:, None]).sum(1)
        if best is None:
            classes, total = index, here
        else:
            classes = torch.where(value > best, index + first, classes)
            total = total * torch.exp(best - level) + here
        best = higher
    probabilities = torch.where(best == -math.inf, math.nan, 1 / total)
    return Prediction(torch.where(probabilities.isnan(), 0, classes), probabilities)


def _without_units(**arguments: tuple[Any, Any]) -> None:
    """Raise where an argument says something about residual conv units, which a light-weight network has not."""
    for argument, (value, default) in arguments.items():
        if value != default:
            raise ValueError(
                f"{argument}: expected {default!r} where light_weight, without residual conv units, got {value!r}"
            )


def _wiring(cascades: Any) -> tuple[tuple[int, ...], ...]:
    if check_count(cascades, "cascades") not in WIRING:
        raise ValueError(f"cascades: expected one of {', '.join(map(str, WIRING))}, got {cascades}")
    return WIRING[cascades]


def _scales(scales: Any, cascades: int, share_trunk: bool) -> tuple[float, ...]:
    scales = tuple(_check.sequence(scales, "scales"))
    for scale in scales:
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise TypeError(f"scales: expected numbers, got {scale!r}")
        if not 0 < scale < math.inf:
            raise ValueError(f"scales: expected positive numbers, got {scale!r}")
    if len(scales) > 1 and cascades != 4:
        raise ValueError(f"scales: expected one scale where cascades={cascades}; several need cascades=4, got {scales}")
    if share_trunk and len(scales) == 1:
        raise ValueError(f"share_trunk: expected False where there is one scale, got True with scales={scales}")
    return scales


def _upsampling(value: Any) -> str | None:
    if value is True or value is False:
        return UPSAMPLINGS[0] if value else None
    if value not in UPSAMPLINGS:
        raise ValueError(f"upsample: expected True, False or one of {', '.join(UPSAMPLINGS)}, got {value!r}")
    return value


def _probability(dropout: Any) -> float:
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {dropout!r}")
    return dropout
