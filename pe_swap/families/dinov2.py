"""DINOv2: a table of patches, in float32 where it is resampled; the later models have registers, and a filter against aliasing."""

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, Patches
from pe_swap.families.native.grid import class_and_registers

for model_type, antialias, patches in (
    ("dinov2", False, Patches()),
    ("dinov2_with_registers", True, Patches(class_and_registers)),
):
    register(
        model_type,
        image_encoder(
            Grid("embeddings.position_embeddings", antialias=antialias),
            attention="encoder.layer.{layer}.attention",
            tokens="embeddings.patch_embeddings.projection",
            patches=patches,
        ),
        since="5.24",
    )
