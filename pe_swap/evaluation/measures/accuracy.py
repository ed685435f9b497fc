"""The share of images whose class a model finds, at resolutions that it was not trained at.

An unswapped model with a table takes other resolutions by resampling it, as its family does (`interpolate_pos_encoding=True`); a swapped
one takes them by itself.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.evaluation.measures.base import MEASURES, ImageMeasure, MeasureOptions
from pe_swap.families.native.grid import METHOD
from pe_swap.runs.config import ORIGINAL, PositiveInt, require_once
from pe_swap.runs.images import LabelledImages
from pe_swap.runs.models import scheme_name


class AccuracyOptions(MeasureOptions):
    """Options of `accuracy`."""

    resolutions: list[PositiveInt] = Field(
        default=[168, 224, 336, 448], min_length=1, description="heights and widths that images are given at, in pixels"
    )
    batch_images: PositiveInt = Field(default=100, description="images in one forward pass")

    @field_validator("resolutions")
    @classmethod
    def _require_once(cls, values: list[Any]) -> list[Any]:
        return require_once(values)


@MEASURES.register("accuracy")
class Accuracy(ImageMeasure):
    """Share of images whose class is the most probable one, by resolution; of models of images alone (`compare.py`)."""

    name = "accuracy"
    title = "Accuracy"
    Options = AccuracyOptions

    def resolutions(self) -> list[int]:
        """Return the resolutions of the options."""
        return list(self.options.resolutions)

    @torch.no_grad()
    def hits(self, model: PreTrainedModel, images: LabelledImages, resolution: int) -> Tensor:
        """Return whether the class of the largest logit is each image's own; see `ImageMeasure.hits`."""
        given = {METHOD: True} if scheme_name(model) == ORIGINAL and METHOD in inspect.signature(model.forward).parameters else {}
        found = []
        for start in range(0, len(images), self.options.batch_images):
            rows = slice(start, start + self.options.batch_images)
            part = LabelledImages(images.pixels[rows], images.labels[rows]).at(resolution, resolution)
            logits = model(pixel_values=part.pixels.to(model.device), **given).logits
            found.append(logits.argmax(-1).cpu() == part.labels)
        return torch.cat(found)
