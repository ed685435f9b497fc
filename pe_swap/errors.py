"""Every error that pe_swap raises on purpose.

Each class derives from `PESwapError` and from the builtin that a caller would catch anyway, so `except ValueError` keeps working.
A message has two sentences: what is wrong (the thing, its value, the rule), and what to do.
"""


class PESwapError(Exception):
    """Base of every error raised on purpose by pe_swap."""


class UnknownNameError(PESwapError, ValueError):
    """A name of a scheme or a model family that is not registered."""


class OptionError(PESwapError, ValueError):
    """A scheme option that does not exist, or whose value breaks its rule."""


class LayerError(PESwapError, ValueError):
    """A `layers` argument that is empty, names a layer that the model does not have, or limits a scheme that acts on the input."""


class UnsupportedModelError(PESwapError, TypeError):
    """A model, or a kind of model, that pe_swap or the scheme does not support."""


class UnsupportedBackendError(PESwapError, ValueError):
    """An attention implementation that cannot honour the scheme."""


class SchemeContractError(PESwapError, RuntimeError):
    """A scheme whose hook returned what the contract of `Scheme` does not allow."""


class SwapStateError(PESwapError, RuntimeError):
    """A swap, restore or check of a model in a state that does not allow it."""


class FamilyError(PESwapError, RuntimeError):
    """A model whose modules are not where its family says; nothing was patched."""


class PositionRangeError(PESwapError, IndexError):
    """A position beyond what the scheme can represent."""


class CheckpointError(PESwapError, RuntimeError):
    """A saved model that is missing, damaged, incomplete, or written by a newer pe_swap."""


class ConfigError(PESwapError, ValueError):
    """A run configuration with an unknown key or a value that breaks its rule."""


class DataError(PESwapError, ValueError):
    """Text that is missing, empty, or too short for the configuration."""


class DivergedError(PESwapError, ArithmeticError):
    """A training run that ended with losses or weights that are not finite."""
