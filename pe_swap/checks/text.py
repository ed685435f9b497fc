"""The properties of a swapped model of texts."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, EncoderDecoderCache

from pe_swap.attention.names import library_name
from pe_swap.attention.shared_in_call import ARGUMENT, SharedInCall
from pe_swap.checks.report import Check
from pe_swap.errors import PESwapError, PositionRangeError
from pe_swap.families import base_model_of
from pe_swap.patching.holder import SchemeHolder
from pe_swap.patching.install import layer_hooks
from pe_swap.patching.layer_cache import cache_argument, parameters_of
from pe_swap.schemes import Scheme
from pe_swap.swap import restore_positional, swap_positional

LENGTH = 24
"""Tokens in most checks; fewer where a scheme ends before that."""

SHIFT = 17
"""Positions by which the check of shift invariance moves every token."""

LONGEST_ROW = 2048
"""Tokens: the longest row that the check beyond the trained length runs; beyond it, a short row stands at far position ids."""

MEMORY_LENGTH = 8
"""States that a decoder with an encoder attends to in place of the encoder's."""

ABOVE_ROUNDING = 10.0
"""How many times the measured rounding an effect must be to count as one."""


class TextChecker:
    """The checks of one swapped stack of layers.

    Hidden states of the base model are compared: every head shares them. Where the decoder has an input of its own (T5, BART, Whisper),
    the stack is called by itself.

    Attributes:
        part: the name of the stack, or of the model inside a composite, in the report; empty where there is no name to tell it from others.
        memory: states that stand for an encoder's, `[1, MEMORY_LENGTH, hidden_size]`; None where the stack attends to none.
        takes_ids: the stack takes position ids.
    """

    reordered = "last state, tokens before it reversed"

    def __init__(self, model: PreTrainedModel, holder: SchemeHolder, part: str) -> None:
        self.model = model
        self.holder = holder
        self.part = part
        self.schemes = list(holder)
        self.stack = holder.stack
        self.first_id = holder.first_id
        self.is_causal = self.stack.is_causal(model.config)
        base_model = base_model_of(model)
        self.runs_alone = "decoder_input_ids" in parameters_of(base_model)
        weight, takes = holder.tokens.weight, parameters_of(self.running(model))
        self.device, self.vocabulary = weight.device, weight.shape[0]
        self.takes_ids = "position_ids" in takes and not self.stack.ids_from_mask
        self.cache_argument = cache_argument(self.running(model)) if self.stack.has_cache else ""
        self.memory: Tensor | None = None
        if self.runs_alone and self.is_causal:
            states = torch.randn(1, MEMORY_LENGTH, model.config.hidden_size, generator=torch.Generator().manual_seed(6))
            self.memory = states.to(self.device, weight.dtype)
        self.tolerance = max(torch.finfo(dtype).eps for dtype in (weight.dtype, torch.float32)) ** 0.5
        self.length = min(LENGTH, holder.max_length or LENGTH)

    def running(self, model: PreTrainedModel) -> Any:
        """Return the module of a model that is called: the base model, or the stack by itself."""
        base_model: Any = base_model_of(model)
        return base_model.get_submodule(self.stack.caller) if self.runs_alone else base_model

    @property
    def title(self) -> str:
        """What is swapped, in words."""
        names = "+".join(dict.fromkeys(scheme.name for scheme in self.schemes))
        return f"{names} ({self.part})" if self.part else names

    @property
    def implementation(self) -> str:
        """The attention implementation in use, by transformers' name."""
        return str(library_name(self.model.config._attn_implementation))

    def run_all(self) -> list[Check]:
        """Run everything."""
        return [self.run(name, check) for name, check in self.checks().items()]

    def checks(self) -> dict[str, Callable[[], Check]]:
        """Return the checks by name, in the order of the report."""
        checks: dict[str, Callable[[], Check]] = {
            "every layer bound": self.bound,
            "own scheme = unswapped": self.identity,
            "order matters": self.order,
            "backend = eager": self.eager,
            "left-padded = alone": lambda: self.padded("left"),
            "right-padded = alone": lambda: self.padded("right"),
        }
        if self.is_causal:
            checks["causal"] = self.future
            if self.stack.has_cache:
                checks["cached = uncached"] = self.cached
        return checks | {"shift invariant": self.shifted, "beyond trained length": self.longer}

    def run(self, name: str, check: Callable[[], Check]) -> Check:
        """Run one check; an error of ours is a failure that says so, and the other checks still run."""
        try:
            found = check()
        except PESwapError as error:
            found = Check(name, False, None, str(error))
        return replace(found, part=self.part)

    def tokens(self, batch: int, length: int, seed: int = 0) -> Tensor:
        """Return random token ids, `[batch, length]`, none of them padding: some families count positions by it."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(self.vocabulary, (batch, length), generator=generator)
        padding = getattr(self.model.config, "pad_token_id", None)
        return ids.masked_fill(ids == (-1 if padding is None else padding), self.vocabulary // 2).to(self.device)

    def states(self, input_ids: Tensor, model: PreTrainedModel | None = None, **kwargs: Any) -> Tensor:
        """Return the base model's last hidden states, `[batch, length, hidden_size]`, float32; `position_ids` count from 0."""
        if self.is_causal and self.stack.has_cache and self.cache_argument not in kwargs:
            kwargs["use_cache"] = False
        if not self.takes_ids:
            kwargs.pop("position_ids", None)
        if "position_ids" in kwargs:
            kwargs["position_ids"] = kwargs["position_ids"] + self.first_id
        if self.memory is not None:
            kwargs["encoder_hidden_states"] = self.memory.expand(len(input_ids), -1, -1)
        hidden: Tensor = self.running(model or self.model)(input_ids, **kwargs).last_hidden_state
        return hidden.float()

    def compare(self, name: str, found: Tensor, expected: Tensor, detail: str, *, claimed: bool = True) -> Check:
        """Return the check that two tensors are equal up to rounding."""
        difference = float((found - expected).norm() / expected.norm())
        if not claimed:
            return Check(name, None, difference, detail)
        return Check(name, difference <= self.tolerance, difference, detail)

    def bound(self) -> Check:
        """Check that one forward pass calls every scheme where it should act."""
        wanted: Counter[tuple[int, str, int | None]] = Counter()
        layers, acting_on_input = self.holder.assignment.layers, self.holder.assignment.input
        for layer, index in enumerate(layers):
            if index is not None:
                wanted.update((index, hook, layer) for hook in layer_hooks(self.holder, layer))
        if acting_on_input is not None:
            hooks = self.schemes[acting_on_input].hooks & {"encode", "embed"}
            wanted.update((acting_on_input, hook, None) for hook in hooks)
        with _calls(self.schemes) as seen:
            self.states(self.tokens(1, self.length), **{ARGUMENT: self.unshared()})
        missing = [f"{self.schemes[index].name}.{hook} in layer {layer}" for index, hook, layer in wanted - seen]
        detail = f"not called: {', '.join(missing)}" if missing else f"{len(wanted)} hooks called in one forward pass"
        without = [str(layer) for layer, index in enumerate(layers) if index is None]
        if without:
            what = "keep the model's own positions" if self.stack.native.keeps_layers else "have no positions of their own"
            detail += f"; layers {', '.join(without)} {what}"
        return Check("every layer bound", not missing, None, detail)

    def unshared(self) -> SharedInCall:
        """Return what the layers of a call on `tokens` share, if each computes everything itself."""
        return SharedInCall(self.ids(self.length), shares=False)

    def ids(self, length: int, first: int = 0) -> Tensor:
        """Return position ids from `first` on, counted from 0, `[1, length]`."""
        return torch.arange(length, device=self.device)[None] + first

    def identity(self) -> Check:
        """Check that the scheme which the model had, swapped in as one of ours, gives the unswapped states."""
        name = "own scheme = unswapped"
        if self.holder.original is None:
            return Check(name, None, None, "not measured: the model was loaded already swapped, without what was replaced")
        if base_model_of(self.model).get_submodule(self.stack.native.holder_path) is not self.holder:
            return Check(name, None, None, "not measured: the module of the schemes is wrapped (PEFT's modules_to_save)")
        scheme = self.stack.native.own_scheme
        if scheme is None:
            return Check(name, None, None, "not measured: no scheme is the model's own positions")
        other = restore_positional(copy.deepcopy(self.model))
        ids = self.tokens(2, min(self.length, self.holder.trained_length))
        expected = self.states(ids, model=other)
        with torch.random.fork_rng(devices=[] if self.device.type == "cpu" else [self.device]):
            swap_positional(other, scheme, part=self.stack.name or None)
        found = self.states(ids, model=other)
        return self.compare(name, found, expected, f"'{scheme}' in a copy of the unswapped model")

    def order(self) -> Check:
        """Check that positions reach the output: the same tokens in another order give the last one another state."""
        difference, rounding = self.order_difference(), self.rounding()
        if not self.is_causal and not any(scheme.tells_order for scheme in self.schemes):
            return Check("order matters", None, difference, "an encoder without positions: no order is expected")
        if difference <= ABOVE_ROUNDING * rounding:
            with _disturbed(self.holder):
                starts_neutral = self.order_difference() > ABOVE_ROUNDING * rounding
            if starts_neutral:
                return Check("order matters", None, difference, "not yet: the scheme starts from adding nothing, train it")
        detail = f"{self.reordered}; rounding is {rounding:.1e}"
        weight = self.holder.tokens.weight
        if torch.finfo(weight.dtype).bits == 16 and rounding < difference <= ABOVE_ROUNDING * rounding:
            return Check("order matters", None, difference, f"{detail}, too near to tell: check a float32 copy")
        return Check("order matters", difference > ABOVE_ROUNDING * rounding, difference, detail)

    def order_difference(self) -> float:
        """Return how much the last state changes when the tokens before it are reversed."""
        ids = self.tokens(1, self.length)
        other = torch.cat((ids[:, :-1].flip(1), ids[:, -1:]), dim=1)
        first, second = self.states(ids)[:, -1], self.states(other)[:, -1]
        return float((first - second).norm() / first.norm())

    def rounding(self) -> float:
        """Return how much a row's last state changes by rounding: the row alone against the row in a batch of three."""
        ids = self.tokens(1, self.length)
        others = self.tokens(2, self.length, seed=5)
        alone, together = self.states(ids)[0, -1], self.states(torch.cat((ids, others)))[0, -1]
        return max(float((alone - together).norm() / alone.norm()), float(torch.finfo(self.holder.tokens.weight.dtype).eps))

    def eager(self) -> Check:
        """Check that the attention implementation in use equals the plain one."""
        ids = self.tokens(2, self.length)
        modules = self.stack.attention_modules(base_model_of(self.model), self.model.config)
        configs = [self.model.config, *(module.config for module in modules if hasattr(module, "config"))]
        own: Any = {id(config): config for config in configs}  # the stacks of a T5 have copies of their own
        implementations = {key: library_name(config._attn_implementation) for key, config in own.items()}
        found = self.states(ids)
        try:  # on the configurations: model.set_attn_implementation would refuse to go back to what GPT-2 does not declare
            for config in own.values():
                config._attn_implementation = "eager"
            expected = self.states(ids)
        finally:
            for key, config in own.items():
                config._attn_implementation = implementations[key]
        return self.compare("backend = eager", found, expected, self.implementation)

    def padded(self, side: str) -> Check:
        """Check that a row padded on one side equals the row alone."""
        short = max(1, self.length * 2 // 3)
        whole, row = self.tokens(1, self.length, seed=1), self.tokens(1, short, seed=2)
        padding = self.tokens(1, self.length - short, seed=3)
        parts = (padding, row) if side == "left" else (row, padding)
        mask = torch.cat((torch.zeros_like(padding), torch.ones_like(row)), dim=1)
        mask = mask if side == "left" else mask.flip(1)
        mask = torch.cat((torch.ones_like(whole), mask))
        position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
        together = self.states(torch.cat((whole, torch.cat(parts, dim=1))), attention_mask=mask, position_ids=position_ids)
        how, claimed = "given", True
        if not self.takes_ids and self.stack.counts == "slots":  # padding moves what is on its right, and makes the row longer
            how, claimed = "count the padding", not self.rescaled and (side == "right" or self.shift_invariant)
        elif not self.takes_ids:
            how = "counted from the mask"
        detail = f"{short} of {self.length}, position ids {how}" + ("" if claimed else ": not claimed")
        found, expected = together[1][mask[1].bool()], self.states(row)[0]
        return self.compare(f"{side}-padded = alone", found, expected, detail, claimed=claimed)

    @property
    def rescaled(self) -> list[int]:
        """Original lengths of the schemes whose scale of positions changes with the length of a row."""
        return [scheme.original_length for scheme in self.schemes if not scheme.cached_equals_uncached]

    @property
    def shift_invariant(self) -> bool:
        """Whether all schemes claim that only differences of positions matter."""
        return all(scheme.shift_invariant for scheme in self.schemes)

    def future(self) -> Check:
        """Check that later tokens do not change earlier states."""
        half = self.length // 2
        ids, other = self.tokens(1, self.length), self.tokens(1, self.length, seed=4)
        changed = torch.cat((ids[:, :half], other[:, half:]), dim=1)
        return self.compare(
            "causal", self.states(changed)[:, :half], self.states(ids)[:, :half], f"first {half} states, later tokens changed"
        )

    def cached(self) -> Check:
        """Check that a prefill, a chunk and a token equal one pass; where a scheme does not claim that, across its original length."""
        rescaled = self.rescaled
        first = max(rescaled, default=0) - self.length // 2
        if self.holder.max_length is not None:
            first = min(first, self.holder.max_length - self.length)
        first = max(first, 0) if self.takes_ids else 0
        ids, where = self.tokens(2, self.length), torch.arange(self.length, device=self.device)[None] + first
        cache: Cache = DynamicCache(config=self.model.config)
        if self.memory is not None:
            cache = EncoderDecoderCache(cache, DynamicCache(config=self.model.config))
        parts, start = [], 0
        for length in (self.length // 2, self.length // 4, 1, self.length):
            chunk = slice(start, start + length)
            if ids[:, chunk].shape[1]:
                given = {"position_ids": where[:, chunk]} if rescaled else {}
                parts.append(self.states(ids[:, chunk], use_cache=True, **{self.cache_argument: cache}, **given))
            start += length
        expected = self.states(ids, **({"position_ids": where} if rescaled else {}))
        detail = "prefill, chunk, token, chunk"
        if rescaled:
            detail += f", from position {first:,}; not claimed: earlier keys were turned at another scale"
        return self.compare("cached = uncached", torch.cat(parts, dim=1), expected, detail, claimed=not rescaled)

    def shifted(self) -> Check:
        """Check that only differences of positions matter, where the schemes claim it."""
        claimed = self.shift_invariant
        name, ids = "shift invariant", self.tokens(1, self.length)
        if not self.takes_ids:
            return Check(name, None, None, "not measured: this family takes no position ids")
        here, mask = torch.arange(self.length, device=self.device)[None], torch.ones_like(ids)
        try:
            moved = self.states(ids, attention_mask=mask, position_ids=here + SHIFT)
        except PositionRangeError:
            return Check(name, None, None, f"not claimed, and positions end at {self.holder.max_length}")
        there = self.states(ids, attention_mask=mask, position_ids=here)
        return self.compare(name, moved, there, f"by {SHIFT}" + ("" if claimed else ": not claimed"), claimed=claimed)

    def longer(self) -> Check:
        """Check that a length beyond the trained one gives finite states."""
        trained, limit = self.holder.trained_length, self.holder.max_length
        if limit is not None and limit <= trained:
            return Check("beyond trained length", None, None, f"positions end at {limit:,}")
        last = min(trained + 8, limit or trained + 8)
        length = min(last, LONGEST_ROW)
        ids, given = self.tokens(1, length), {}
        if length < last and not self.takes_ids:
            return Check(
                "beyond trained length", None, None, f"not measured: more than {LONGEST_ROW:,} tokens, and no position ids"
            )
        if length < last:
            given = {"position_ids": self.ids(length, first=last - length), "attention_mask": torch.ones_like(ids)}
        finite = bool(self.states(ids, **given).isfinite().all())
        detail = f"{length:,} tokens up to position {last:,}, trained at {trained:,}"
        return Check("beyond trained length", finite, None, detail)


@contextmanager
def _disturbed(holder: SchemeHolder) -> Iterator[None]:
    """Add noise to every positional parameter, and put the very same numbers back."""
    parameters = list(holder.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype))
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)


@contextmanager
def _calls(schemes: list[Scheme]) -> Iterator[Counter[tuple[int, str, int | None]]]:
    """Count the calls of every scheme's hooks, as `(index of the scheme, hook, layer)`.

    A pair that `fold_bias_into_query_key` gives has `score_bias` in it, and counts as its call.
    """
    seen: Counter[tuple[int, str, int | None]] = Counter()

    def counted(index: int, hook: str, method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            found = method(*args, **kwargs)
            if hook != "fold_bias_into_query_key":
                seen[(index, hook, kwargs.get("layer"))] += 1
            elif found is not None:
                seen[(index, "score_bias", kwargs.get("layer"))] += 1
            return found

        return call

    before = [dict(vars(scheme)) for scheme in schemes]
    try:
        for index, scheme in enumerate(schemes):
            for hook in (*scheme.hooks, "fold_bias_into_query_key"):
                method = "encode_grid" if hook == "encode" and scheme.geometry.sides else hook
                vars(scheme)[method] = counted(index, hook, getattr(scheme, method))
        yield seen
    finally:
        for scheme, attributes in zip(schemes, before, strict=True):
            vars(scheme).clear()
            vars(scheme).update(attributes)
