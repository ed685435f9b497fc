"""The image encoder of SigLIP: a table of patches and no token before them; its attention hands no keyword on, so it gets a class."""

from pe_swap.families.base import image_encoder, register
from pe_swap.families.native import Grid, Patches
from pe_swap.families.native.grid import none

register(
    "siglip_vision_model",
    image_encoder(
        Grid("embeddings.position_embedding", is_parameter=False, prefix_rows=0),
        attention="encoder.layers.{layer}.self_attn",
        tokens="embeddings.patch_embedding",
        patches=Patches(none),
        attention_class="siglip:SiglipAttention",
    ),
    since="5.24",
)
