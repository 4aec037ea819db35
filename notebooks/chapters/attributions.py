"""Attributions of an image's pixels by Captum, to set FI beside: integrated gradients and Grad-CAM.

Both are of log P(y_hat), with y_hat the class that a vision-language model predicts from the whole image.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fihelpers.extras import optional
from fihelpers.models.vision import PatchLayout, VisionModel
from fihelpers.scores.pixels import PixelBatch

GRAD_CAM = "Grad-CAM"
INTEGRATED_GRADIENTS = "integrated gradients"
PATH_STEPS = 16  # points on the path from black to the image where integrated gradients are taken


def integrated_gradients(batch: PixelBatch) -> Tensor:
    """Absolute integrated gradients (N, H, W) on the path from black, summed over a pixel's channels."""
    with optional():
        from captum.attr import IntegratedGradients

    x, rows, predicted = _asked(batch)
    made = IntegratedGradients(batch.log_probs).attribute(
        x, target=predicted, additional_forward_args=rows, n_steps=PATH_STEPS, internal_batch_size=len(x)
    )
    return made.detach().abs().sum(1)


def grad_cam(batch: PixelBatch) -> Tensor:
    """Grad-CAM (N, H, W) at the image tokens, spread over the image; 0 where the model cuts the image off."""
    with optional():
        from captum.attr import LayerAttribution, LayerGradCam

    x, rows, predicted = _asked(batch)
    layout = batch.model.layout(*x.shape[-2:])
    with feature_maps(batch.model, layout) as layer:
        coarse = LayerGradCam(batch.log_probs, layer).attribute(
            x, target=predicted, additional_forward_args=rows, relu_attributions=True
        )
    seen = (layout.token_rows, layout.token_columns)
    down, across = ((labels >= 0).nonzero()[:, 0] for labels in seen)
    maps = torch.zeros_like(x[:, 0])
    fine = LayerAttribution.interpolate(coarse.detach(), (len(down), len(across)), "bilinear")
    maps[..., down[:, None], across] = fine[:, 0]
    return maps


ATTRIBUTIONS = {GRAD_CAM: grad_cam, INTEGRATED_GRADIENTS: integrated_gradients}


@contextmanager
def feature_maps(model: VisionModel, layout: PatchLayout) -> Iterator[nn.Module]:
    """Route the image tokens' features, as the language model gets them, through a module.

    While the context is open, the module that it yields takes and gives them as (B, C, rows, columns) in
    every forward pass, so Captum's LayerGradCam can use it as its layer. All images must be laid out alike.
    """
    maps, core = nn.Identity(), model.network.model
    usual = core.get_image_features

    def routed(*args: Any, **kwargs: Any) -> Any:
        output = usual(*args, **kwargs)
        tokens = torch.stack(list(output.pooler_output)).unflatten(1, (layout.rows, layout.columns))
        seen = maps(tokens.permute(0, 3, 1, 2))
        output.pooler_output = list(seen.permute(0, 2, 3, 1).flatten(1, 2))
        return output

    core.get_image_features = routed
    try:
        yield maps
    finally:
        del core.get_image_features


def _asked(batch: PixelBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The images in [0, 1], their rows, and the predicted classes."""
    x, rows = batch.images / 255, torch.arange(len(batch.images))
    with torch.no_grad():
        return x.requires_grad_(), rows, batch.log_probs(x, rows).argmax(-1)
