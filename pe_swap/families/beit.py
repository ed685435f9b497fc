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


def first_bias(config: Any) -> str:
    """Return where a bias is worked out."""
    return "shared_position_bias" if config.use_shared_relative_position_bias else "layers.0.relative_position_bias"


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
            (GridBias("", first_bias), has_bias),
            (Grid("embeddings.position_embeddings"), has_table),
        )
    ),
    since="5.24",
)
