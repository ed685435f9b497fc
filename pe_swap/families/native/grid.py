"""Native positions of the patches of an image: a table with one vector per place of a grid, resampled for another grid.

The models add the table in one method of their embeddings, `interpolate_pos_encoding(embeddings, height, width)`, which returns a vector
per token. So a swap takes the table out, puts the holder of the schemes in its place, and lets that method be the holder's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_swap.errors import FamilyError
from pe_swap.families.native.base import Holder, NativePositions, find

METHOD = "interpolate_pos_encoding"
"""The method of the embeddings that returns the vectors of all tokens, and the argument by which a call asks for it."""


def two_sides(size: Any) -> tuple[int, int]:
    """Return height and width of what a configuration gives as one number or as two."""
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)


def one(config: Any) -> int:
    """One token stands before the patches: the class token."""
    return 1


def none(config: Any) -> int:
    """No token stands before the patches."""
    return 0


def class_and_registers(config: Any) -> int:
    """The class token and the registers stand before the patches."""
    return 1 + int(config.num_register_tokens)


@dataclass(frozen=True)
class PatchLayout:
    """How one model makes a row of tokens from an image: tokens that stand nowhere, then the patches, row by row.

    Attributes:
        prefix: number of tokens that stand nowhere.
        patch: height and width of a patch, in pixels.
        trained_sides: rows and columns of patches that the model was trained with.
        kept: share of the patches that stay, in the order of a noise that the model takes; None where all stay where they are.
    """

    prefix: int
    patch: tuple[int, int]
    trained_sides: tuple[int, int]
    kept: float | None = None

    @property
    def trained_tokens(self) -> int:
        """How many tokens an image of the trained size becomes."""
        rows, columns = self.trained_sides
        return self.prefix + rows * columns

    def sides(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image, whose size is in pixels; pixels that are left over are in no patch."""
        return height // self.patch[0], width // self.patch[1]

    def position_ids(self, sides: tuple[int, int], device: torch.device, noise: Tensor | None = None) -> Tensor:
        """Return row and column of every token, `[batch or 1, tokens, 2]`, int64; -1 and -1 for a token that stands nowhere.

        Args:
            sides: rows and columns of the image's patches.
            device: where they are computed.
            noise: `[batch, rows * columns]`: patches come in the order of this noise, and the last go, where `kept` says so.
        """
        rows, columns = (torch.arange(side, device=device) for side in sides)
        grid = torch.stack((rows[:, None].expand(sides), columns[None, :].expand(sides)), dim=-1).reshape(1, -1, 2)
        if noise is not None and self.kept is not None:
            grid = grid[0, noise.argsort(dim=1)[:, : int(grid.shape[1] * self.kept)]]
        return torch.cat((grid.new_full((len(grid), self.prefix, 2), -1), grid), dim=1)


@dataclass(frozen=True)
class Patches:
    """What a family says of its patches; the sizes are the configuration's `image_size` and `patch_size`.

    Attributes:
        prefix: from the configuration to the number of tokens that stand nowhere (class, distillation and register tokens).
        mask_ratio: the configuration's field for the share of patches that go, at random; empty where none does.
    """

    prefix: Callable[[Any], int] = one
    mask_ratio: str = ""

    def layout(self, config: Any) -> PatchLayout:
        """Return how models of a configuration make tokens."""
        patch, image = two_sides(config.patch_size), two_sides(config.image_size)
        kept = 1 - getattr(config, self.mask_ratio) if self.mask_ratio else None
        return PatchLayout(self.prefix(config), patch, (image[0] // patch[0], image[1] // patch[1]), kept)


class TableOfGrid(nn.Module):
    """A table that a model holds as a parameter of its own, as a module.

    Attributes:
        weight: the parameter itself, `[1, prefix rows + patches, width]`.
        place: how many parameters its module has before it: there it is put back.
    """

    def __init__(self, weight: nn.Parameter, place: int) -> None:
        super().__init__()
        self.weight = weight
        self.place = place


@dataclass(frozen=True)
class Grid(NativePositions):
    """A table of vectors, one per patch of the trained grid, and one per token before the patches that has such a vector.

    Those of the tokens before the patches are no positions: they stay with the model, whatever the scheme.

    Attributes:
        path: the table, relative to the base model. The holder of the schemes takes its place.
        is_parameter: the table is a parameter; False where it is an `nn.Embedding`.
        prefix_rows: rows before those of the patches.
        antialias: the family resamples its table with a filter against aliasing.
    """

    path: str
    is_parameter: bool = True
    prefix_rows: int = 1
    antialias: bool = False

    kind = "grid"
    own_scheme = "learned"
    keeps_layers = False

    @property
    def is_embedding(self) -> bool:
        """Whether the table is no bare parameter."""
        return not self.is_parameter

    @property
    def owner_path(self) -> str:
        """Path of the embeddings, whose table it is."""
        return self.path.rpartition(".")[0]

    @property
    def holder_path(self) -> str:
        """The table's own place."""
        return self.path

    def trained_length(self, config: Any, native: nn.Module | None) -> int | None:
        """Return None: the stack's patches say it."""
        return None

    def require_native(self, base_model: nn.Module) -> nn.Module:
        """Return the table, as a module.

        Raises:
            FamilyError: something else is there.
        """
        name = self.path.rpartition(".")[2]
        owner = find(base_model, self.owner_path)
        found, expected = getattr(owner, name, None), nn.Parameter if self.is_parameter else nn.Embedding
        if not isinstance(found, expected):
            raise FamilyError(
                f"{type(base_model).__name__}.{self.path} is a {type(found).__name__}, where a table of positions ({expected.__name__}) "
                "was expected: something else has patched this model. Undo that patch before the swap."
            )
        return TableOfGrid(found, list(owner._parameters).index(name)) if isinstance(found, nn.Parameter) else found

    def rows(self, native: nn.Module | None) -> Tensor | None:
        """Return all rows of the table, `[prefix rows + patches, width]`, float32."""
        if native is None:
            return None
        weight: Tensor = native.weight  # type: ignore[assignment]
        return weight.detach().reshape(-1, weight.shape[-1]).float()

    def table(self, config: Any, native: nn.Module | None) -> Tensor | None:
        """Return the rows of the patches, `[patches, width]`, float32."""
        rows = self.rows(native)
        return None if rows is None else rows[self.prefix_rows :]

    def prefix(self, native: nn.Module | None) -> Tensor | None:
        """Return the rows of the tokens before the patches, `[prefix_rows, width]`, float32; None where there are none."""
        rows = self.rows(native)
        return None if rows is None or not self.prefix_rows else rows[: self.prefix_rows].clone()

    def empty_prefix(self, width: int) -> Tensor | None:
        """Return room for the rows of the tokens before the patches."""
        return torch.zeros(self.prefix_rows, width) if self.prefix_rows else None

    def options(self, config: Any, layer: int, native: nn.Module | None) -> Mapping[str, Any]:
        """Return how the family resamples its table, by the name of `learned`'s option."""
        return {"extend": "bicubic_antialiased" if self.antialias else "bicubic"}

    def length_to_build(self, config: Any) -> None:
        """Return None: no length field says how large the table is."""
        return None

    def stand_in(self, holder: Holder, embeddings: Tensor, height: int, width: int) -> Tensor:
        """Return the vectors of all tokens of an image, for the family's `interpolate_pos_encoding`, whose arguments these are.

        Args:
            holder: what holds the schemes.
            embeddings: the tokens, `[batch, tokens, width]`.
            height: of the image, in pixels.
            width: of the image, in pixels.
        """
        return holder.grid_vectors(height, width)

    def take_out(self, base_model: nn.Module) -> None:
        """Remove the table where it is a parameter, so that the holder, a module, can have its name."""
        owner, name = find(base_model, self.owner_path), self.path.rpartition(".")[2]
        owner._parameters.pop(name, None)

    def put_back(self, base_model: nn.Module, table: nn.Module) -> None:
        """Put a table that is a parameter where it was, among the parameters of its module, in the holder's place."""
        owner, name = find(base_model, self.owner_path), self.path.rpartition(".")[2]
        if not isinstance(table, TableOfGrid):
            base_model.set_submodule(self.path, table)
            return
        del owner._modules[name]
        others = list(owner._parameters.items())
        owner._parameters.clear()
        owner._parameters.update([*others[: table.place], (name, table.weight), *others[table.place :]])
