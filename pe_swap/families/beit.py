"""BEiT: a bias for every pair of rows and columns, in each layer or shared by all; or a table of patches, without such a bias."""

from typing import Any

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, GridBias, Patches


def has_bias(config: Any) -> bool:
    """Tell whether a model has a bias and no table."""
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    return bool(biased and not config.use_absolute_position_embeddings)


def has_table(config: Any) -> bool:
    """Tell whether a model has a table and no bias."""
    biased = config.use_relative_position_bias or config.use_shared_relative_position_bias
    return bool(config.use_absolute_position_embeddings and not biased)


def biases(config: Any) -> list[list[str]]:
    """Return where biases are worked out: one for all layers, one in each, or both."""
    shared, each = (
        ["shared_position_bias"],
        [f"layers.{layer}.relative_position_bias" for layer in range(config.num_hidden_layers)],
    )
    asked = ((config.use_shared_relative_position_bias, shared), (config.use_relative_position_bias, each))
    return [paths for is_there, paths in asked if is_there]


register(
    "beit",
    *(
        image_encoder(
            native,
            attention="layers.{layer}.attention",
            tokens="embeddings.patch_embeddings.projection",
            patches=Patches(),
            applies=applies,
        )
        for native, applies in (
            (GridBias("", biases), has_bias),
            (Grid("embeddings.position_embeddings"), has_table),
        )
    ),
    since="5.24",
)
