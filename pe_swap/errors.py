"""Every error pe_swap raises on purpose.

Each kind derives from `PESwapError` and from the builtin a caller would catch anyway, so `except ValueError` keeps working.
A message names the thing, the value, the rule and a way out.
"""


class PESwapError(Exception):
    """Base of every error raised on purpose by pe_swap."""


class UnknownNameError(PESwapError, ValueError):
    """A scheme or a model family that no file in the registry's folder defines."""


class OptionError(PESwapError, ValueError):
    """A scheme option that does not exist or whose value breaks its rule."""


class LayerError(PESwapError, ValueError):
    """A `layers` argument that names no layer, a layer the model lacks, or a layer a scheme cannot be limited to."""


class UnsupportedModelError(PESwapError, TypeError):
    """A model, or a kind of model, that the scheme or pe_swap cannot be put into."""


class UnsupportedBackendError(PESwapError, ValueError):
    """An attention implementation that cannot honour the scheme."""


class SwapStateError(PESwapError, RuntimeError):
    """A restore or a check of a model in a state that does not allow it."""


class FamilyError(PESwapError, RuntimeError):
    """A model whose modules are not where its family says: nothing is patched rather than a part of it."""


class PositionRangeError(PESwapError, IndexError):
    """A position beyond what the scheme can represent."""


class CheckpointError(PESwapError, RuntimeError):
    """A saved model that is missing, damaged, incomplete, or written by a newer pe_swap."""


class ConfigError(PESwapError, ValueError):
    """A run configuration with an unknown key or a value that breaks its rule."""


class DataError(PESwapError, ValueError):
    """Text that is missing, empty, or too short for what was asked of it."""


class DivergedError(PESwapError, ArithmeticError):
    """A training run that ended with losses or weights that are not finite."""
