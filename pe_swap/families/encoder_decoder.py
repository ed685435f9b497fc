"""`EncoderDecoderModel` and `VisionEncoderDecoderModel`: any encoder and any decoder, put together."""

from pe_swap.families.composite import Part, register_composites

DECODER = Part("decoder", "decoder", "decoder")

# Configurations of older versions cannot be built around those of their parts.
register_composites(("encoder-decoder",), Part("encoder", "encoder", "encoder"), DECODER, since="5.24")
register_composites(("vision-encoder-decoder",), Part("encoder", "encoder", "encoder", is_default=False), DECODER, since="5.24")
