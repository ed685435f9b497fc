"""The image encoder of CLIP: a table of patches; the model is handed to no other by its own configuration, which is `clip_vision_model`."""

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, Patches

register(
    "clip_vision_model",
    image_encoder(
        Grid("embeddings.position_embedding", is_parameter=False),
        attention="encoder.layers.{layer}.self_attn",
        tokens="embeddings.patch_embedding",
        patches=Patches(),
    ),
    since="5.24",
)
