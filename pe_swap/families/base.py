"""A model family: which stacks of layers it has, and what kind of positions each has. Data, no tensor mathematics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from pe_swap.errors import FamilyError, UnsupportedModelError
from pe_swap.families.classes import config_class_of, head_classes_of
from pe_swap.families.native import NativePositions, Patches
from pe_swap.families.native.base import find
from pe_swap.families.native.table import zero
from pe_swap.registry import Registry
from pe_swap.schemes.geometry import Geometry

FAMILIES: Registry[Family] = Registry("model family")

SWAPPED_PREFIX = "pe_swap_"
"""What `model_type` of a swapped model starts with; the family follows."""


NO_LIMIT = 2**20
"""Positions: what the length field of a configuration says for a scheme without a limit.

Tools truncate inputs, warn and allocate by that field (`max_position_embeddings`, `n_positions`), so it names the longest input that the
model takes, and not the length it was trained at, which is `trained_length` in `config.pe_swap`. It is no larger, since some tools
allocate by it. Code that takes the field for the length of a training block should take the trained length.
"""


def decoder(config: Any) -> bool:
    """Attention looks back only, unless the configuration says `is_causal=False`."""
    return bool(getattr(config, "is_causal", True))


def encoder(config: Any) -> bool:
    """Attention looks both ways."""
    return False


def as_configured(config: Any) -> bool:
    """Attention looks back only where the configuration says `is_decoder`."""
    return bool(config.is_decoder)


def always(config: Any) -> bool:
    """Every configuration of the family has the stack."""
    return True


@dataclass(frozen=True)
class Stack:
    """A run of self-attention layers with positions of its own. Paths are relative to the base model (`model.base_model`).

    Attributes:
        native: the kind of the stack's own positions, and where they are.
        attention: path of layer `{layer}`'s self-attention module.
        tokens: path of the table of token embeddings; None where the input is no tokens.
        is_causal: from the configuration to whether attention looks back only.
        name: the stack's name where a family has several (`part=` of a swap).
        caller: path of the module whose call has ids, mask and cache, and hands its keyword arguments on to every layer; empty for
            the base model itself.
        counts: what the family counts into a position id where none are given: `slots`, all of them; what the attention `mask` lets
            through; or `tokens` that are not padding.
        first_id: from the configuration to the position id of a row's first token.
        has_cache: the attention modules take a cache.
        query_is_scaled: queries come to the attention function times `head_dim ** -0.5` already.
        fills_token_type_ids: token types are looked up in a buffer as long as the position table, so a call without them needs them filled
            in before any length is possible.
        length_field: the configuration's field for the longest input, by its standard name; None where there is none.
        guard_field: an integer field that holds the sentence by which the family's own class refuses a swapped folder.
        num_layers: the configuration's field for the number of layers.
        num_heads: the configuration's field for the number of query heads.
        token_scale: name of the factor, in `caller`, that the token embeddings get outside their module; None where there is none.
        input_size: the configuration's field for the width of the token embeddings.
        no_limit: what the length field says for a scheme that never ends; smaller where the family allocates by it.
        layer_paths: from the configuration to the paths of the attention modules, where `attention` cannot say them.
        applies: from the configuration to whether its models have the stack.
        attention_class: `file:class` in `attention_modules`, where the family's own attention module calls no attention function of
            transformers; empty where it does.
        ids_from_mask: the model takes no position ids and hands none on; layers read them from their mask.
        patches: how tokens are made where the input is an image; None where it is a text.
    """

    native: NativePositions
    attention: str
    tokens: str | None
    is_causal: Callable[[Any], bool]
    name: str = ""
    caller: str = ""
    counts: Literal["slots", "mask", "tokens"] = "slots"
    first_id: Callable[[Any], int] = zero
    has_cache: bool = True
    query_is_scaled: bool = False
    fills_token_type_ids: bool = False
    length_field: str | None = "max_position_embeddings"
    guard_field: str = "max_position_embeddings"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    input_size: str = "hidden_size"
    token_scale: str | None = None
    no_limit: int = NO_LIMIT
    layer_paths: Callable[[Any], list[str]] | None = None
    applies: Callable[[Any], bool] = always
    attention_class: str = ""
    ids_from_mask: bool = False
    patches: Patches | None = None

    def paths(self, config: Any) -> list[str]:
        """Return the paths of the self-attention modules, in order."""
        if self.layer_paths is not None:
            return self.layer_paths(config)
        return [self.attention.format(layer=layer) for layer in range(getattr(config, self.num_layers))]

    def attention_modules(self, base_model: nn.Module, config: Any) -> list[nn.Module]:
        """Return the self-attention modules, one per layer, in order.

        Raises:
            FamilyError: fewer or more of them than the configuration has layers.
        """
        paths = self.paths(config)
        if self.layer_paths is None:
            there = len(list(find(base_model, self.attention.split(".{layer}")[0]).children()))
            if there != len(paths):
                raise FamilyError(
                    f"{type(base_model).__name__} has {there} layers, but its configuration says {len(paths)} ({self.num_layers}). Set "
                    "the field to the true number before the swap."
                )
        return [find(base_model, path) for path in paths]

    def geometry(self, base_model: nn.Module, config: Any, trained_length: int) -> Geometry:
        """Return the sizes a scheme may depend on, read from the configuration and the first attention module."""
        first: Any = self.attention_modules(base_model, config)[0]
        heads = getattr(config, self.num_heads)
        sizes = (getattr(first, name, None) for name in ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim"))
        head_dim = next((size for size in sizes if isinstance(size, int)), config.hidden_size // heads)
        return Geometry(
            hidden_size=config.hidden_size,
            num_heads=heads,
            head_dim=head_dim,
            num_layers=len(self.paths(config)),
            is_causal=self.is_causal(config),
            trained_length=trained_length,
            input_size=getattr(config, self.input_size),
            sides=() if self.patches is None else self.patches.layout(config).trained_sides,
        )


def image_encoder(native: NativePositions, attention: str, tokens: str, patches: Patches, **settings: Any) -> Stack:
    """Return the stack of a model of images: attention both ways, no cache, no longest input; further fields as in `Stack`.

    `image_size` and `patch_size` may be one number or two, so the sentence of the guard is written into the number of colours.
    """
    return Stack(
        native,
        attention,
        tokens,
        is_causal=encoder,
        has_cache=False,
        length_field=None,
        guard_field="num_channels",
        patches=patches,
        **settings,
    )


@dataclass(frozen=True)
class Family:
    """One `model_type` of transformers.

    Attributes:
        model_type: the family's `config.model_type`.
        stacks: its stacks; one, but for encoder-decoders.
        is_own_base: every class of the family has all modules of the stacks itself, whatever its `base_model_prefix` says.
    """

    model_type: str
    stacks: tuple[Stack, ...]
    is_own_base: bool = False

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The family's configuration class."""
        return config_class_of(self.model_type)

    @property
    def takes_images(self) -> bool:
        """Whether the input is an image."""
        return any(stack.patches is not None for stack in self.stacks)

    def base_model(self, model: PreTrainedModel) -> Any:
        """Return the part of a model that its heads share, which has all modules of the stacks."""
        return model if self.is_own_base else model.base_model

    def head_classes(self) -> list[type[PreTrainedModel]]:
        """Return every model class of the family that can be built, base model and heads. Imports the family's modeling file."""
        return list(head_classes_of(self.model_type))

    def stacks_of(self, config: Any) -> tuple[Stack, ...]:
        """Return the stacks that models of a configuration have."""
        return tuple(stack for stack in self.stacks if stack.applies(config))

    def stacks_in(self, base_model: nn.Module, config: Any) -> tuple[Stack, ...]:
        """Return the stacks that a model has: an encoder-decoder's classes may hold one of them."""
        modules = {name for name, _ in base_model.named_modules()}
        return tuple(stack for stack in self.stacks_of(config) if stack.caller in modules)

    def is_causal(self, config: Any) -> bool:
        """Tell whether the last stack, whose states the heads read, looks back only."""
        return self.stacks_of(config)[-1].is_causal(config)


WAITING: dict[str, str] = {}
"""Families whose file in the installed transformers is another than described here, each with the first version where it is the same."""


def register(model_type: str, *stacks: Stack, since: str = "5.16", is_own_base: bool = False) -> None:
    """File a family under its `model_type`, where the installed transformers has it.

    Args:
        model_type: the family's `config.model_type`.
        stacks: its stacks.
        since: the first version of transformers whose file of the family is as the stacks say.
        is_own_base: see `Family`.
    """
    if model_type not in CONFIG_MAPPING_NAMES:
        return
    if Version(transformers.__version__) < Version(since):
        WAITING[model_type] = since
        return
    FAMILIES.register(model_type)(Family(model_type, stacks, is_own_base))


def family_for(model: object) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: it is not a transformers model, or of a family that no file here describes.
    """
    if not isinstance(model, PreTrainedModel):
        way_out = (
            "Give its model.get_base_model(), which is changed in place."
            if hasattr(model, "get_base_model")
            else "Load a model first, for instance with AutoModelForCausalLM.from_pretrained(...); swap before you wrap it."
        )
        raise UnsupportedModelError(
            f"pe_swap patches transformers models (PreTrainedModel), and this is a {type(model).__module__}.{type(model).__name__}. "
            + way_out
        )
    name = family_name(model.config.model_type)
    require_family(name, type(model).__name__)
    return FAMILIES[name]


def require_family(name: str, what: str) -> None:
    """Refuse a family that no file here describes, or none for the installed transformers.

    Args:
        name: the family.
        what: of what model it is, for the error.

    Raises:
        UnsupportedModelError: it is one.
    """
    if name in FAMILIES:
        return
    if name in WAITING:
        raise UnsupportedModelError(
            f"The family '{name}' ({what}) is described for transformers {WAITING[name]} or later, whose file of it is another than in "
            f"{transformers.__version__}, which is installed. Update transformers."
        )
    raise UnsupportedModelError(
        f"No family '{name}' ({what}) is described in pe_swap/families. Use a model of a family in "
        "pe_swap.list_families(), or add a file there, as its README.md says."
    )


def base_model_of(model: PreTrainedModel) -> Any:
    """Return the part of a model of a known family that its heads share; see `Family.base_model`."""
    return family_for(model).base_model(model)


def family_name(model_type: str) -> str:
    """Return the family of a `model_type`, swapped or not."""
    return model_type.removeprefix(SWAPPED_PREFIX)


@functools.cache
def _causal_heads() -> frozenset[str]:
    """Return the names of transformers' causal language models."""
    return frozenset(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def known_loss_type(model: PreTrainedModel) -> str | None:
    """Return the name of a model's loss.

    transformers picks the loss by the class's name. Causal heads whose name says nothing (`GPT2LMHeadModel`) fall back to the causal
    loss with a warning; for those this is that loss, by its name.
    """
    loss_type: str | None = getattr(model, "loss_type", None)
    if loss_type is None and any(parent.__name__ in _causal_heads() for parent in type(model).__mro__):
        return "ForCausalLM"
    return loss_type
