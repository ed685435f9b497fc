"""The module that holds every scheme of a stack, in the place of the model's own positions."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pe_swap.assignment import Assignment
from pe_swap.errors import PositionRangeError, SwapStateError
from pe_swap.families import Stack
from pe_swap.families.base import NO_LIMIT
from pe_swap.families.native.base import Holder
from pe_swap.families.native.grid import PatchLayout
from pe_swap.patching.saved_whole import require_saved_by_whom_it_is_known
from pe_swap.schemes.base import INPUT_HOOKS, Scheme
from pe_swap.schemes.geometry import Geometry

Ref = TypeVar("Ref", bound="ModuleRef")


@dataclass(frozen=True)
class ModuleRef:
    """Where a module of a model stands. A plain object, so that the module is not registered twice.

    Looked up at each call: tools put other modules there (a resized vocabulary, PEFT's `modules_to_save`), and those are what has to
    act.

    Attributes:
        root: a model that the module is a part of.
        path: the module's name in it, with dots.
    """

    root: nn.Module
    path: str

    def found(self) -> Any:
        """Return what stands there now."""
        found: Any = self.root
        for name in self.path.split("."):
            found = getattr(found, name)
        return found

    def __deepcopy__(self: Ref, memo: dict[int, Any]) -> Ref:
        """Follow what is being copied, where the module is a part of it; otherwise keep the module.

        A copied layer or attention module stands in the same model, and has to act with that model's weights: it would act with a private
        copy of them otherwise, untrained and lost in a saved state.
        """
        names, module = self.path.split("."), self.root
        for depth, name in enumerate(names):
            if id(module) in memo:
                return type(self)(memo[id(module)], ".".join(names[depth:]))
            module = getattr(module, name)
        return self


@dataclass(frozen=True)
class TokenTable(ModuleRef):
    """Where the token embeddings are looked up."""

    @property
    def module(self) -> nn.Module:
        """The table."""
        module: nn.Module = self.found()
        return module

    @property
    def weight(self) -> Tensor:
        """Its weight, whose dtype and device the added vectors take."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight

    @property
    def device(self) -> torch.device:
        """Where tokens are looked up: the weight's device, or the one to which accelerate brings a weight that it keeps elsewhere."""
        weight, brought_to = self.weight, getattr(getattr(self.module, "_hf_hook", None), "execution_device", None)
        return torch.device(brought_to) if weight.is_meta and brought_to is not None else weight.device


@dataclass(frozen=True)
class HolderRef(ModuleRef):
    """Where a stack's `SchemeHolder` stands."""

    @property
    def holder(self) -> SchemeHolder:
        """What stands there: a `SchemeHolder`, or a wrapper that passes its methods on.

        Raises:
            SwapStateError: it is something else, so that a call would run without its positions.
        """
        found = self.found()
        if not hasattr(found, "scheme_at"):
            raise SwapStateError(
                f"{type(self.root).__name__}.{self.path} is a {type(found).__name__}, where the schemes of this swapped model were: "
                "something else has replaced them. Undo that patch, or load the model again."
            )
        holder: SchemeHolder = found
        return holder


@dataclass
class Original:
    """What a swap replaced, kept to be put back bit for bit. Not part of the state dict.

    Attributes:
        module: the model's own positions: a table, or a rotary module.
        dtype: of the token embeddings at the swap.
        length: what the length field said.
        loss_type: the model's own, None where transformers knows none.
        config: the unswapped configuration.
        trains: whether the token embeddings were trained at the swap; None where the module's own weights differed from them in that, so
            that they do not go together.
    """

    module: nn.Module
    dtype: torch.dtype
    length: Any
    loss_type: str | None
    config: Any
    trains: bool | None

    def with_numbers(self, device: torch.device) -> nn.Module:
        """Return the module with its frequencies: a load builds it on `meta`, and fills only what the model still holds."""
        if any(buffer.is_meta for buffer in self.module.buffers()) and device.type != "meta":
            build: Any = type(self.module)
            self.module = build(self.config).to(device)
        return self.module

    def current(self, tokens: TokenTable) -> nn.Module:
        """Return the module as the model would hold it now, had it never been swapped: moved, cast, frozen or trained with the rest.

        Weights that accelerate keeps elsewhere stay there: its hook on the module brings them at each call.
        """
        if self.trains is not None and tokens.weight.requires_grad != self.trains:
            self.trains = tokens.weight.requires_grad
            self.module.requires_grad_(self.trains)
        if any(parameter.is_meta for parameter in self.module.parameters()):
            return self.module
        device, dtype = tokens.device, tokens.weight.dtype
        self.with_numbers(device).to(device=device)
        return self.module if dtype == self.dtype else self.module.to(dtype=dtype)


def trained_together(module: nn.Module | None, weight: Tensor) -> bool | None:
    """Return whether a module's own weights and the token embeddings are all trained, or None where they differ in that."""
    together = module is None or all(parameter.requires_grad == weight.requires_grad for parameter in module.parameters())
    return weight.requires_grad if together else None


def stand_in_weight(max_length: int | None) -> Tensor:
    """Return what a swapped model saves under the name of a table's weight: as many rows as it takes positions, of no numbers.

    An unswapped class that reads such a state, alone or as a part of another model, raises for the shape; without it, it would build a
    random table and only report that. Classes that read the rows as a limit find the right one.
    """
    return torch.zeros(max_length or NO_LIMIT, 0)


class SchemeHolder(Holder):
    """Every scheme of one stack, under one state-dict prefix.

    Where the stack's own positions were a module, it stands in that module's place and is called in its stead.

    Attributes:
        schemes: one entry per scheme, however many layers it serves.
        assignment: which scheme acts where.
        stack: the stack's description.
        tokens: where the token embeddings are.
        first_id: the position id of a row's first token, as the family counts.
        original: what was replaced, or None where it is not at hand: a table, in a model that was loaded already swapped.
        handed: for each layer, the name in `kept` of the rotation it is handed, or None where layers are handed none.
        weight: see `stand_in_weight`; None where no table was replaced.
        patches: how the model makes its tokens from an image; None where its input is a text.
        prefix: vectors of the tokens before the patches that the table had too, `[rows, input_size]`; None where there are none. A buffer.
        mean: the mean row of the table that was replaced, `[input_size]`, added to every token embedding; None where it was not kept. A
            buffer: saved, never trained, whole in every process.
        fade: factor on the model's own positions where they act beside the schemes: in training, while they go gradually. Not saved.
        acts_on_input: a scheme makes or adds to what the first layer is called with.
    """

    def __init__(
        self,
        schemes: Iterable[Scheme],
        assignment: Assignment,
        stack: Stack,
        tokens: TokenTable,
        first_id: int,
        original: Original | None,
        mean: Tensor | None = None,
        prefix: Tensor | None = None,
        patches: PatchLayout | None = None,
    ) -> None:
        super().__init__()
        self._is_hf_initialized = True  # transformers' loading draws no numbers for what the schemes start themselves
        self.schemes = nn.ModuleList(schemes)
        self.kept = nn.ModuleDict()
        self.assignment = assignment
        self.stack = stack
        self.tokens = tokens
        self.first_id = first_id
        self.original = original
        self.handed: tuple[str | None, ...] = (None,) * len(assignment.layers)
        self.handed_to_all = ""
        self.weight: Tensor | None
        self.register_buffer("weight", stand_in_weight(self.max_length) if stack.native.is_embedding else None)
        self.patches = patches
        self.prefix: Tensor | None
        self.register_buffer("prefix", prefix)
        self.mean: Tensor | None
        self.register_buffer("mean", mean)
        self.fade = 0.0
        self.acts_on_input = any(self.input_hook(hook) is not None for hook in INPUT_HOOKS)

    def __iter__(self) -> Iterator[Scheme]:
        """Iterate over the schemes."""
        for scheme in self.schemes:
            assert isinstance(scheme, Scheme)
            yield scheme

    def scheme_at(self, index: int) -> Scheme:
        """Return the scheme at `index`."""
        scheme = self.schemes[index]
        assert isinstance(scheme, Scheme)
        return scheme

    def input_hook(self, hook: str) -> Scheme | None:
        """Return the input scheme where it overrides `hook`, else None."""
        if self.assignment.input is None:
            return None
        scheme = self.scheme_at(self.assignment.input)
        return scheme if hook in scheme.hooks else None

    @property
    def max_length(self) -> int | None:
        """The shortest limit of any scheme, in positions, or None where there is none."""
        return min((scheme.max_length for scheme in self if scheme.max_length is not None), default=None)

    @property
    def trained_length(self) -> int:
        """The length that the model was trained at, in positions."""
        return self.geometry.trained_length

    @property
    def geometry(self) -> Geometry:
        """The sizes of the model."""
        return next(iter(self)).geometry

    @property
    def device(self) -> torch.device:
        """The device of the token embeddings."""
        return self.tokens.device

    def train(self, mode: bool = True) -> SchemeHolder:
        """Switch between training and evaluation, as every module.

        Warns:
            UserWarning: a training begins in which other weights of the model move and no parameter of the schemes does: PEFT freezes
                all that its configuration does not name, and parameters that a swap brought have not been trained by anybody.
        """
        super().train(mode)
        parameters = list(self.parameters())
        if mode and parameters and not any(parameter.requires_grad for parameter in parameters) and self._acts_beside_trained():
            name = self.stack.native.holder_path.rpartition(".")[2]
            warnings.warn(
                f"The parameters of {'+'.join(dict.fromkeys(scheme.name for scheme in self))} are frozen, while others of the model are "
                f'trained. Train them too (in a PEFT configuration modules_to_save=["{name}"]), or ignore this where they are trained '
                "already.",
                UserWarning,
                stacklevel=2,
            )
        return self

    def _acts_beside_trained(self) -> bool:
        """Tell whether these schemes act in their model, and not a copy that is trained in their place, and a weight of it is trained."""
        model = self.tokens.root
        try:
            acts = model.get_submodule(self.stack.native.holder_path) is self
        except AttributeError:
            return False
        return acts and any(parameter.requires_grad for parameter in model.parameters())

    def zero_based(self, position_ids: Tensor) -> Tensor:
        """Return position ids counted from 0; what a family gives padding, below its first id, becomes 0."""
        if self.stack.counts == "slots" and self.first_id == 0:
            return position_ids
        return (position_ids - self.first_id).clamp(min=0)

    def vectors(self, position_ids: Tensor) -> Tensor:
        """Return what is added at 0-based ids, `[batch or 1, length or 1, input_size]`, in the token embeddings' dtype.

        Raises:
            PositionRangeError: the model's own table still acts, and has no row for a position.
        """
        vectors = self._vectors_of_schemes(position_ids)
        if not self.fade:
            return vectors
        table = self.stack.native.table(self.original.config, self.replaced)  # type: ignore[union-attr]  # there, where it fades
        assert table is not None
        if int(position_ids.max()) >= len(table):
            raise PositionRangeError(
                f"Position {int(position_ids.max())} is beyond the {len(table)} of the model's own table, which still acts with factor "
                f"{self.fade:g} (train.transition.fade_steps). Keep to its length until it is gone."
            )
        rows = table[position_ids] if self.mean is None else table[position_ids] - self.mean  # the mean stays: they fade to it
        return vectors + (self.fade * rows).to(vectors.dtype)

    @property
    def replaced(self) -> nn.Module:
        """The model's own positions, that a swap in this process has replaced."""
        assert self.original is not None
        return self.original.current(self.tokens)

    def _vectors_of_schemes(self, position_ids: Tensor) -> Tensor:
        """Return what the scheme on the input adds, and the mean that was kept; see `vectors`."""
        weight = self.tokens.weight
        scheme = self.input_hook("encode")
        mean = None if self.mean is None else self.mean.to(position_ids.device)[None, None]
        if scheme is not None:
            vectors = scheme.encode(position_ids)
            return (vectors if mean is None else vectors + mean).to(weight.dtype)
        # A zero without dimensions: it broadcasts, and takes part in no type promotion.
        return torch.zeros((), dtype=weight.dtype, device=position_ids.device) if mean is None else mean.to(weight.dtype)

    def grid_vectors(self, height: int, width: int) -> Tensor:
        """Return what is added to the tokens of an image, `[1, tokens, input_size]`, in the dtype of its patch embeddings.

        Args:
            height: of the image, in pixels.
            width: of the image, in pixels.
        """
        assert self.patches is not None
        weight, sides = self.tokens.weight, self.patches.sides(height, width)
        scheme = self.input_hook("encode")
        if scheme is not None:
            vectors = scheme.encode_grid(sides, self.device)
        else:
            vectors = torch.zeros(1, sides[0] * sides[1], self.geometry.input_size, dtype=weight.dtype, device=self.device)
        if self.mean is not None:
            vectors = vectors + self.mean
        if self.prefix is None:
            return vectors.to(weight.dtype)
        return torch.cat((self.prefix[None].to(weight.dtype), vectors.to(weight.dtype)), dim=1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the tensors to a state, as every module; a method of PyTorch's own.

        Raises:
            SwapStateError: see `require_saved_by_whom_it_is_known`.
        """
        require_saved_by_whom_it_is_known(self.tokens.root)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model gets where it called its own positions."""
        return self.stack.native.stand_in(self, *args, **kwargs)
