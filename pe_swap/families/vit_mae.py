"""ViTMAE: a fixed table of patches, after which most patches go and the rest change places, by a noise; its decoder is left alone."""

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, Patches

register(
    "vit_mae",
    image_encoder(
        Grid("embeddings.position_embeddings"),
        attention="layers.{layer}.attention",
        tokens="embeddings.patch_embeddings.projection",
        patches=Patches(mask_ratio="mask_ratio"),
    ),
    since="5.24",
)
