"""ViT and DeiT: a table of patches that the embeddings add; DeiT has a second token before the patches, for what it is distilled from."""

from typing import Any

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, Patches


def two(config: Any) -> int:
    """The class token and the distillation token stand before the patches."""
    return 2


for model_type, rows, patches in (("vit", 1, Patches()), ("deit", 2, Patches(two))):
    register(
        model_type,
        image_encoder(
            Grid("embeddings.position_embeddings", prefix_rows=rows),
            attention="layers.{layer}.attention",
            tokens="embeddings.patch_embeddings.projection",
            patches=patches,
        ),
        since="5.24",
    )
