"""DINOv3: a rotation by row and column, after class token and registers; `base_model_prefix` names its layers alone."""

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import GridRotary, Patches
from pe_swap.families.native.grid import class_and_registers

register(
    "dinov3_vit",
    image_encoder(
        GridRotary(),
        attention="model.layer.{layer}.attention",
        tokens="embeddings.patch_embeddings",
        patches=Patches(class_and_registers),
    ),
    since="5.24",
    is_own_base=True,
)
