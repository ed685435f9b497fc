"""Models of images or sound and text that are built as LLaVA is: an encoder, and a decoder of text that is handed what it says.

The decoder's attention is causal, also over what stands for an image, but for Gemma 3 and PaliGemma. A model whose positions have three
axes (Qwen2-VL) is not here.
"""

from pe_swap.families.composite import Part, register_composites

TEXT = Part("text", "text_config", "language_model")
VISION = Part("vision", "vision_config", "vision_tower", is_default=False)

register_composites(
    (
        "aria",
        "aya_vision",
        "cohere2_vision",
        "internvl",
        "llava",
        "llava_next",
        "llava_next_video",
        "llava_onevision",
        "mistral3",
        "vipllava",
    ),
    TEXT,
    VISION,
)
register_composites(
    ("gemma3", "paligemma"), Part("text", "text_config", "language_model", looks_both_ways=True), VISION, since="5.24"
)
register_composites(("lfm2_vl",), TEXT, VISION, since="5.24")  # as its text model
register_composites(("lighton_ocr",), TEXT, Part("vision", "vision_config", "vision_encoder", is_default=False))
register_composites(("idefics3", "smolvlm", "modernvbert"), Part("text", "text_config", "text_model"))
register_composites(("qwen2_audio", "voxtral"), TEXT)
