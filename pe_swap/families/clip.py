"""CLIP and SigLIP: an encoder of images beside one of texts, and their image classifiers, which have the first alone."""

from pe_swap.families.composite import Part, register_composites

register_composites(
    ("clip", "siglip"),
    Part("vision", "vision_config", "vision_model"),
    Part("text", "text_config", "text_model", is_default=False),
    since="5.24",  # as their image encoders
)
