"""Loading a classifier of images by name, or starting one from a configuration."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel
from transformers.models.auto import modeling_auto

from pe_swap.errors import CheckpointError, ConfigError, PESwapError, UnsupportedModelError
from pe_swap.families import FAMILIES, family_name
from pe_swap.families.native.grid import two_sides
from pe_swap.runs.images import Images
from pe_swap.runs.models import described, is_configuration, takes_images


def image_config(model: str | dict[str, Any], images: Images) -> Any:
    """Return the configuration of a classifier of images, named or described.

    Raises:
        CheckpointError: there is none under that name.
        ConfigError: fields that transformers refuses, or that do not fit the images.
        UnsupportedModelError: it is no classifier of images that pe_swap knows.
    """
    if is_configuration(model):
        config = described(model, num_labels=images.classes, num_channels=images.channels)
    else:
        try:
            config = AutoConfig.from_pretrained(model)
        except PESwapError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"Cannot load a model from '{model}': {error}. Name a folder with a config.json and weights."
            ) from error
    require_classifier(config, images)
    return config


def require_classifier(config: Any, images: Images) -> None:
    """Refuse a configuration that is not of a classifier of these images.

    Raises:
        ConfigError: other classes or colours than the images have.
        UnsupportedModelError: no classifier of images.
    """
    if (
        not takes_images(config)
        or family_name(config.model_type) not in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    ):
        known = [
            name
            for name in FAMILIES.names()
            if FAMILIES[name].takes_images and name in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
        ]
        raise UnsupportedModelError(
            f"data.images is for classifiers of images, and a model of type '{config.model_type}' is none that pe_swap can swap. Name one "
            f"of {', '.join(known)}, or text under data."
        )
    for field, wanted, what in (
        ("num_labels", images.classes, "classes"),
        ("num_channels", images.channels, "colours"),
    ):
        if getattr(config, field) != wanted:
            raise ConfigError(
                f"The model's {field} is {getattr(config, field)}, and the images have {wanted} {what}. Set {field} to {wanted} under "
                "'model', or name a model that fits."
            )


def require_resolution(config: Any, resolution: int) -> None:
    """Refuse a resolution of which a model's patches leave pixels over.

    Raises:
        ConfigError: its patches do.
    """
    for side in two_sides(config.patch_size):
        if resolution % side:
            raise ConfigError(
                f"options.accuracy.resolutions names {resolution} pixels, and a patch of the model has {side}, which does not divide it. "
                f"Name multiples of {side}, such as {max(side, resolution // side * side)}."
            )


def start_image_model(model: str | dict[str, Any], images: Images) -> PreTrainedModel:
    """Build a classifier with random weights, with the classes and colours of the images.

    Raises:
        ConfigError: as `image_config`.
        UnsupportedModelError: as `image_config`.
    """
    config = image_config(model, images)
    try:
        built: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"transformers refuses the model configuration {model}: {error}. Correct it.") from error
    return built


def load_image_model(name: str) -> PreTrainedModel:
    """Load a classifier of images, swapped or not, in float32.

    Raises:
        CheckpointError: it is missing, incomplete (a head without weights, for instance) or damaged.
    """
    try:
        model, info = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
    except PESwapError:
        raise
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"Cannot load a classifier of images from '{name}': {error}") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"'{name}' has no weights for {', '.join(sorted(info['missing_keys'])[:4])}; they would be random, and so would every "
            "accuracy. Name a checkpoint that was saved with its head."
        )
    loaded: PreTrainedModel = model
    return loaded
