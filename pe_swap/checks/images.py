"""The properties of a swapped model of images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.attention.shared_in_call import SharedInCall
from pe_swap.checks.report import Check
from pe_swap.checks.text import TextChecker
from pe_swap.families.native import PatchLayout


class ImageChecker(TextChecker):
    """The checks of a model of images, on random images of the size that it was trained with."""

    reordered = "mean state, patches in another order"

    @property
    def patches(self) -> PatchLayout:
        """How the model makes its tokens."""
        assert self.holder.patches is not None
        return self.holder.patches

    def checks(self) -> dict[str, Callable[[], Check]]:
        """Return the checks by name, in the order of the report."""
        return {
            "every layer bound": self.bound,
            "own scheme = unswapped": self.identity,
            "order matters": self.order,
            "backend = eager": self.eager,
            "batch = alone": self.batched,
            "another size": self.resized,
        }

    def images(self, batch: int, sides: tuple[int, int], seed: int = 0) -> Tensor:
        """Return random images of so many rows and columns of patches, `[batch, colours, height, width]`."""
        height, width = (side * pixels for side, pixels in zip(sides, self.patches.patch, strict=True))
        weight, generator = self.holder.tokens.weight, torch.Generator().manual_seed(seed)
        return torch.randn(batch, weight.shape[1], height, width, generator=generator).to(weight.device, weight.dtype)

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Return random images of the trained size, whatever the length."""
        return self.images(batch, self.patches.trained_sides, seed)

    def states(self, input_ids: Tensor, model: PreTrainedModel | None = None, **kwargs: Any) -> Tensor:
        """Return the base model's last hidden states of images, `[batch, tokens, hidden_size]`, float32."""
        base_model = self.running(model or self.model)
        noise = self.noise(self.patches.sides(*input_ids.shape[-2:]))
        if noise is not None:
            kwargs["noise"] = noise.expand(len(input_ids), -1)
        output = base_model(pixel_values=input_ids, **kwargs)
        if "last_hidden_state" in output:
            return output.last_hidden_state.float()  # type: ignore[no-any-return]
        return output.feature_maps[-1].float().flatten(2).transpose(1, 2)  # type: ignore[no-any-return]  # a backbone

    def unshared(self) -> SharedInCall:
        """Return what the layers of a call on `tokens` share, if each computes everything itself."""
        sides = self.patches.trained_sides
        return SharedInCall(self.patches.position_ids(sides, self.device, self.noise(sides)), shares=False, sides=sides)

    def noise(self, sides: tuple[int, int]) -> Tensor | None:
        """Return the noise that keeps the first patches in their order, `[1, patches]`, for a model that drops some; else None."""
        if self.patches.kept is None:
            return None
        return torch.arange(sides[0] * sides[1], dtype=torch.float32, device=self.device)[None]

    def order_difference(self) -> float:
        """Return how much the mean state changes when the patches of an image change places."""
        image, (rows, columns), (height, width) = self.tokens(1, 0), self.patches.trained_sides, self.patches.patch
        cut = image.reshape(-1, rows, height, columns, width).permute(1, 3, 0, 2, 4).flatten(0, 1)
        order = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(1)).to(cut.device)
        other = cut[order].reshape(rows, columns, -1, height, width).permute(2, 0, 3, 1, 4).reshape(image.shape)
        first, second = (self.states(x).mean(1) for x in (image, other))
        return float((first - second).norm() / first.norm())

    def batched(self) -> Check:
        """Check that an image among others equals the image alone."""
        images = self.tokens(3, 0)
        return self.compare("batch = alone", self.states(images)[1:2], self.states(images[1:2]), "one of three images")

    def resized(self) -> Check:
        """Check that an image of another size and shape gives finite states."""
        rows, columns = self.patches.trained_sides
        sides = (rows + 3, columns + 1)
        finite = bool(self.states(self.images(1, sides)).isfinite().all())
        return Check("another size", finite, None, f"{sides[0]} x {sides[1]} patches, trained with {rows} x {columns}")
