"""The contract of a model family: where positions live in it. Data, no tensor mathematics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from pe_swap.errors import FamilyError, UnsupportedModelError
from pe_swap.registry import Registry
from pe_swap.schemes.base import Geometry

FAMILIES: Registry[Family] = Registry("model family")


@dataclass(frozen=True)
class Family:
    """Where one `model_type` of transformers keeps its positions.

    Module paths are relative to the base model (`model.base_model`).

    Attributes:
        model_type: the family's `config.model_type`.
        modeling: the family's modeling module; its head classes are found in it.
        config_class: the family's configuration class.
        pretrained_class: the base class of its heads.
        position_embedding: path of the absolute position table, an `nn.Embedding`.
        token_embedding: path of the token table, whose dtype the added vectors take.
        input_module: path of the module whose call carries `input_ids`, `inputs_embeds` and `position_ids`; empty for the base
            model itself.
        self_attention: path of layer `{layer}`'s self-attention module.
        length_field: the configuration field that holds the rows of the table.
        fills_token_type_ids: the input module looks token types up in a buffer as long as the position table, so calls
            without them need them filled in before any length is possible.
        is_causal: tells from the configuration whether self-attention looks back only.
    """

    model_type: str
    modeling: ModuleType
    config_class: type[PreTrainedConfig]
    pretrained_class: type[PreTrainedModel]
    position_embedding: str
    token_embedding: str
    input_module: str
    self_attention: str
    length_field: str
    fills_token_type_ids: bool
    is_causal: Callable[[Any], bool]

    def head_classes(self) -> list[type[PreTrainedModel]]:
        """Return every model class of the family that can be built, base model and heads."""
        return [
            found
            for found in vars(self.modeling).values()
            if isinstance(found, type) and issubclass(found, self.pretrained_class) and found is not self.pretrained_class
        ]

    def find(self, base_model: nn.Module, path: str) -> nn.Module:
        """Return the module at `path`.

        Raises:
            FamilyError: it is not there; nothing has been patched yet.
        """
        try:
            return base_model.get_submodule(path)
        except AttributeError as error:
            raise FamilyError(
                f"{type(base_model).__name__} has no module '{path}', where the family '{self.model_type}' expects one. Nothing "
                "was patched. This transformers version may have moved it: update pe_swap, or use a version it was tested with."
            ) from error

    def attention_modules(self, base_model: nn.Module, config: Any) -> list[nn.Module]:
        """Return the self-attention modules, one a layer, in order.

        Raises:
            FamilyError: fewer or more of them than the configuration has layers.
        """
        modules = [self.find(base_model, self.self_attention.format(layer=layer)) for layer in range(config.num_hidden_layers)]
        stack = self.find(base_model, self.self_attention.split(".{layer}")[0])
        if len(list(stack.children())) != len(modules):
            raise FamilyError(
                f"{type(base_model).__name__} has {len(list(stack.children()))} layers, but its configuration says "
                f"{len(modules)} (num_hidden_layers). Set the field to the true number before the swap."
            )
        return modules

    def geometry(self, config: Any, trained_length: int) -> Geometry:
        """Return the sizes a scheme may depend on, read from the configuration."""
        return Geometry(
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            head_dim=config.hidden_size // config.num_attention_heads,
            num_layers=config.num_hidden_layers,
            is_causal=self.is_causal(config),
            trained_length=trained_length,
        )


def family_for(model: object) -> Family:
    """Return the family of a model.

    Raises:
        UnsupportedModelError: it is not a transformers model, or a wrapper around one, or of a family without an family.
    """
    if not isinstance(model, PreTrainedModel):
        wraps = not isinstance(model, type) and (hasattr(model, "module") or hasattr(model, "base_model"))
        way_out = (
            "; pass the model inside it, and swap before wrapping."
            if wraps
            else ". Load one first, for instance with AutoModelForCausalLM.from_pretrained(...)."
        )
        raise UnsupportedModelError(
            f"pe_swap patches transformers models (PreTrainedModel), got {type(model).__module__}.{type(model).__name__}{way_out}"
        )
    model_type = family_name(model.config.model_type)
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"No family for the model family '{model_type}' ({type(model).__name__}). Families: {', '.join(FAMILIES.names())}. "
            "A family is one file in pe_swap/families/; for an encoder-decoder model, swap its encoder and its decoder, "
            "then set model.config.encoder = model.encoder.config and model.config.decoder = model.decoder.config."
        )
    return FAMILIES[model_type]


SWAPPED_PREFIX = "pe_swap_"
"""What `model_type` of a swapped model starts with; the family follows."""


def family_name(model_type: str) -> str:
    """Return the family of a `model_type`, swapped or not."""
    return model_type.removeprefix(SWAPPED_PREFIX)


def known_loss_type(model: PreTrainedModel) -> str | None:
    """Return the name of a model's loss.

    transformers picks the loss by the class's name. Causal heads whose name says nothing (`GPT2LMHeadModel`) fall back to the causal
    loss with a warning; for those this is that loss, by its name.
    """
    loss_type: str | None = getattr(model, "loss_type", None)
    heads = [parent.__name__ for parent in type(model).__mro__]
    if loss_type is None and any(name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in heads):
        return "ForCausalLM"
    return loss_type
