"""The option `scale` of schemes that add fixed vectors to the token embeddings.

Fixed vectors have a size of their own. A pretrained model is used to the size of its position table, so that is the default.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pe_swap.errors import OptionError
from pe_swap.schemes.geometry import Native
from pe_swap.schemes.options import MATCH, SchemeOptions
from pe_swap.schemes.parameters import root_mean_square


@dataclass(frozen=True)
class ScaledOptions(SchemeOptions):
    """What every scheme of fixed vectors takes.

    Attributes:
        scale: factor on the vectors; `"match"` gives those of the trained positions the root mean square of the table that they replace,
            or, in a model without a table, that of its token embeddings.
    """

    scale: float | str = MATCH

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        self.require_number("scale", 0.0, 1e6, or_text=(MATCH,))

    def matching_scale(self, native: Native, unscaled: Callable[[], Tensor] | float) -> float:
        """Return the scale: as given, or the size to match over that of the unscaled vectors.

        Args:
            native: the model's own positions.
            unscaled: the vectors, or their root mean square.

        Raises:
            OptionError: there is nothing to match.
        """
        if not isinstance(self.scale, str):
            return self.scale
        size = native.token_rms if native.table is None else root_mean_square(native.table)
        if size is None:
            raise OptionError(
                f"{self.scheme}: option 'scale' is 'match', but there is no table to match: this model was loaded already swapped, "
                "or takes images and never had one. Give a number, or swap the model it was made from."
            )
        return size / (unscaled if isinstance(unscaled, float) else root_mean_square(unscaled()))
