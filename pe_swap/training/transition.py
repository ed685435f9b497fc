"""From a model's own positions to the new ones: what the first steps of a training learn instead of text, and how the old ones go.

**Matching.** The unswapped model, frozen, is the teacher, and the swapped one learns to do what it did: its attention outputs, its last
hidden states or its next-token distributions. Outputs of attention are matched and not its scores, as Goldstein et al. ("RADLADS: Rapid
Attention Distillation to Linear Attention Decoders at Scale", COLM 2025, arXiv:2505.03005, sections 3 and 8) found, and as Yang et al.
("PaTH Attention", NeurIPS 2025, arXiv:2505.16381, section 4.3) did to change a model's positions. Differs from them: the error is divided
by the mean square of what is matched, so that layers of any size count alike; and a model whose positions are a table matches in its own
stream, since the teacher's hidden states hold the old positions, and a student that is fed with them needs no new ones.

**Fading.** The old positions act beside the new ones, times a factor that falls from 1 to 0. Offered because reviewers of Gelberg et al.
("DroPE", arXiv:2512.12167) asked for it; configs/README.md has what it gave.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState

from pe_swap.assignment import starting_from_table
from pe_swap.errors import ConfigError
from pe_swap.families import family_for
from pe_swap.families.native import Alibi, Rotary, SineTable, Table
from pe_swap.patching.holder import SchemeHolder
from pe_swap.patching.install import holders_of, positional_parameters
from pe_swap.runs.config import PositionSampling, TransitionSection
from pe_swap.runs.data import IGNORED
from pe_swap.runs.models import SPLITS_WEIGHTS
from pe_swap.schemes.rope import LENGTH_DEPENDENT
from pe_swap.training.chunked_loss import States, summed_divergence, summed_loss

MEASURED_BLOCKS = 8
"""Blocks on which the sizes of what is matched are measured, once, so that every process and every batch divides by the same."""

LABELS = ("labels", "shift_labels")
"""What a batch has beside the inputs of a model."""


def needs_teacher(section: TransitionSection) -> bool:
    """Tell whether the unswapped model is needed beside the swapped one."""
    return section.match != "none" or section.then == "logits"


def matched_steps(section: TransitionSection, max_steps: int) -> int:
    """Return how many of a training's first steps match."""
    return 0 if section.match == "none" else max(1, round(section.match_share * max_steps))


def needs_no_head(section: TransitionSection, max_steps: int) -> bool:
    """Tell whether a training reads no distribution over words: it has no steps, or all of them match attention or hidden states."""
    return max_steps == 0 or (section.match in ("attention", "hidden") and max_steps == matched_steps(section, max_steps))


# --- Refusals ---


def require_transition(
    section: TransitionSection,
    model: PreTrainedModel,
    name: str,
    *,
    is_control: bool,
    is_trained: bool,
    positions: PositionSampling | None,
    block_size: int,
) -> None:
    """Refuse a transition that the unswapped model, as it was loaded, cannot take part in.

    Args:
        section: the transition.
        model: the model before its swap.
        name: the model's name, for errors.
        is_control: whether it stays unswapped.
        is_trained: whether somebody trained it, so that it is no configuration with random weights.
        positions: how position ids are drawn.
        block_size: tokens in a block.

    Raises:
        ConfigError: it was loaded already swapped; it has random weights; a launcher splits weights over processes; or its positions end
            before a block does, or are none that fade.
    """
    keys = [
        key
        for key, is_asked in (
            ("match", section.match != "none"),
            ("then: logits", section.then == "logits"),
            ("fade_steps", section.fade_steps > 0),
        )
        if is_asked
    ]
    if not keys:
        return
    asked = f"train.transition ({', '.join(keys)}) needs the unswapped model"
    if is_control:
        raise ConfigError(
            f"train.transition ({', '.join(keys)}) is given for scheme.name 'original', which goes nowhere. Leave it out, or name a scheme."
        )
    if getattr(model.config, "pe_swap", None) is not None:
        raise ConfigError(
            f"{asked}, and '{name}' was loaded already swapped: its own positions are gone. Name the model it was made from."
        )
    if not is_trained:
        raise ConfigError(
            f"{asked}, and this one starts with random weights, which are worth nothing to match. Name a trained model."
        )
    if needs_teacher(section) and any(map(parse_flag_from_env, SPLITS_WEIGHTS)):
        raise ConfigError(
            f"{asked} beside the one that is trained, and the launcher splits the weights of models over processes (FSDP or DeepSpeed). "
            "Launch with --multi_gpu."
        )
    if positions is not None:
        raise ConfigError(
            f"{asked}, which was not trained at the positions that train.positions ('{positions.name}') draws. Leave one of them out."
        )
    for stack in family_for(model).stacks_in(model.base_model, model.config):
        if not isinstance(stack.native, Table):
            continue
        length = stack.native.trained_length(model.config, stack.native.require_native(model.base_model))
        if length is not None and block_size > length:
            raise ConfigError(
                f"{asked}, whose positions end at {length:,}, and data.block_size is {block_size:,}. Use blocks of at most {length:,}."
            )
        if section.match_input == "teacher":
            raise ConfigError(
                f"train.transition.match_input is 'teacher', and '{name}' adds its positions to its hidden states: fed with those, the "
                "swapped model would learn nothing from its new positions. Use match_input 'own'."
            )


def require_fading(model: PreTrainedModel) -> None:
    """Refuse to fade positions that the new ones cannot stand beside.

    Raises:
        ConfigError: the new scheme starts from the old table, or turns queries and keys that the old rotation turns; or the old positions
            are of a kind that takes no factor.
    """
    for holder in holders_of(model):
        kind = holder.stack.native
        names = "+".join(dict.fromkeys(scheme.name for scheme in holder))
        if isinstance(kind, Table):
            if {scheme.name for scheme in holder} & set(starting_from_table()):
                raise ConfigError(
                    f"train.transition.fade_steps is given for '{names}', which starts from the old table, so that it would act twice. "
                    "Leave fade_steps out."
                )
        elif isinstance(kind, Rotary) and not isinstance(kind, SineTable):
            if scales_or_stretches(holder):
                raise ConfigError(
                    "train.transition.fade_steps is given, and the model's own rotation scales scores or depends on the length (yarn, "
                    "longrope, dynamic), so that it would not go by its angles alone. Leave fade_steps out."
                )
            if any("transform_query_key" in scheme.hooks and scheme.reads_position_ids for scheme in holder):
                raise ConfigError(
                    f"train.transition.fade_steps is given for '{names}', which turns queries and keys, and so does the old rotation. "
                    "Leave fade_steps out."
                )
        elif not isinstance(kind, Alibi):
            raise ConfigError(
                f"train.transition.fade_steps is given, and the positions of a '{model.config.model_type}' take no factor. Leave it out."
            )


def scales_or_stretches(holder: SchemeHolder) -> bool:
    """Tell whether a model's own rotation does more than turn by angles that are in proportion to positions."""
    scalings = [value for name, value in vars(holder.replaced).items() if name.endswith("attention_scaling")]
    layers = range(len(holder.assignment.layers))
    assert holder.original is not None
    kind, config = holder.stack.native, holder.original.config
    types = {kind.options(config, layer, holder.replaced).get("rope_type") for layer in layers}
    return any(scaling != 1.0 for scaling in scalings) or bool(types & set(LENGTH_DEPENDENT))


# --- Fading ---


def faded(step: int, fade_steps: int) -> float:
    """Return the factor on the old positions in a step, counted from 0: `1 - step / fade_steps`, and 0 from then on."""
    return max(0.0, 1.0 - step / fade_steps) if fade_steps else 0.0


class Fading(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Sets the factor on the old positions before every step; it follows from the step alone, so that a resumed run has the same."""

    def __init__(self, holders: Sequence[SchemeHolder], fade_steps: int) -> None:
        self._holders = holders
        self._fade_steps = fade_steps

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set it for the step that begins."""
        self._set(faded(state.global_step, self._fade_steps))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set it for what is measured after the step: what the next step will begin with."""
        self._set(faded(state.global_step, self._fade_steps))

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the old positions out."""
        self._set(0.0)

    def _set(self, share: float) -> None:
        for holder in self._holders:
            holder.fade = share


# --- Matching ---


def teacher_of(model: PreTrainedModel, section: TransitionSection) -> PreTrainedModel:
    """Return a frozen copy of a model that is not swapped yet.

    Weights that do not train while the copy is needed are the model's own, one copy for both: with `match_trains: attention`, and
    cross-entropy afterwards, all but those of attention modules.
    """
    shares = section.match != "none" and section.match_trains == "attention" and section.then == "cross_entropy"
    training = {id(parameter) for module in attention_modules(model) for parameter in module.parameters()}
    memo = {id(parameter): parameter for parameter in model.parameters() if shares and id(parameter) not in training}
    teacher = copy.deepcopy(model, memo).eval()
    for parameter in teacher.parameters():
        if id(parameter) not in memo:
            parameter.requires_grad_(False)
    return teacher


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """Return the self-attention modules of a model, in the order of its stacks and layers."""
    stacks = family_for(model).stacks_in(model.base_model, model.config)
    unswapped = model.config.unswapped() if getattr(model.config, "pe_swap", None) is not None else model.config
    return [module for stack in stacks for module in stack.attention_modules(model.base_model, unswapped)]


@dataclass
class AttentionCalls:
    """What the attention modules of a model were called with and returned, for as long as `recorded` lasts.

    Attributes:
        modules: the attention modules.
        inputs: their hidden states, `[batch, length, hidden_size]`.
        outputs: what they returned, `[batch, length, width]`.
        given: hidden states to call them with instead; kept until the next, as gradient checkpointing calls them again.
    """

    modules: Sequence[nn.Module]
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    given: list[Tensor] = field(default_factory=list)

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record the calls of the modules."""

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.inputs.append(args[0] if args else kwargs["hidden_states"])

        def after(module: nn.Module, args: Any, output: Any) -> None:
            self.outputs.append(output if isinstance(output, Tensor) else output[0])

        handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module in self.modules]
        handles += [module.register_forward_hook(after) for module in self.modules]
        self.inputs, self.outputs = [], []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def replaced_inputs(self) -> Iterator[None]:
        """Call the modules with `given`, where there are some, in place of their hidden states."""

        def before(index: int) -> Any:
            def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                if not self.given or not torch.is_grad_enabled():
                    return None
                return (
                    ((self.given[index], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": self.given[index]})
                )

            return replace

        handles = [
            module.register_forward_pre_hook(before(index), with_kwargs=True, prepend=True)
            for index, module in enumerate(self.modules)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.given = []


def relative_error(ours: Tensor, theirs: Tensor, size: Tensor, mask: Tensor) -> Tensor:
    """Return `mean_t |ours_t - theirs_t|^2 / (width size)`, a number, float32.

    Args:
        ours: `[batch, length, width]`.
        theirs: the same shape.
        size: mean square of what is matched.
        mask: `[batch, length]`, 1 for tokens and 0 for padding.
    """
    squares = (ours.float() - theirs.float()).square().mean(-1)
    return (squares * mask).sum() / (mask.sum() * size)


class Transition:
    """What a training learns in each step, with the unswapped model as its teacher.

    Attributes:
        section: the recipe.
        steps: how many first steps match.
        teacher: the unswapped model, frozen; None once it is needed no more.
        sizes: mean square of each thing that is matched, over all tokens of some blocks.
    """

    def __init__(self, section: TransitionSection, teacher: PreTrainedModel | None, max_steps: int) -> None:
        self.section = section
        self.steps = matched_steps(section, max_steps)
        self.teacher = teacher
        self.sizes: list[Tensor] = []
        self._step = 0
        self._student: PreTrainedModel | None = None
        self._calls = AttentionCalls(())

    @contextmanager
    def of(self, student: PreTrainedModel, batch: Mapping[str, Any]) -> Iterator[None]:
        """Teach a swapped model for as long as the context lasts.

        Args:
            student: the swapped model.
            batch: some blocks, on which sizes are measured.
        """
        self._student, self._calls = student, AttentionCalls(attention_modules(student))
        if self.teacher is not None:
            self.teacher.to(student.device)
            if self.steps:
                given = {name: value.to(student.device) for name, value in batch.items() if name not in LABELS}
                with torch.no_grad():
                    found = self._of_teacher(given.pop("input_ids"), given)
                self.sizes = [theirs.float().square().mean() for theirs in found.matched]
        with self._calls.replaced_inputs():
            yield

    def begin(self, step: int) -> None:
        """Note the step that begins, counted from 0; let go of the teacher when it is needed no more."""
        self._step = step
        if not self.is_matching and self.section.then == "cross_entropy":
            self.teacher = None
        if not self.is_matching:
            self._calls.given = []

    @property
    def is_matching(self) -> bool:
        """Whether the current step matches."""
        return self._step < self.steps

    def objective_at(self, step: int) -> str:
        """Return what a step learns, counted from 0: "attention", "hidden", "logits" or "cross_entropy"."""
        return self.section.match if step < self.steps else self.section.then

    def objective(self, states: States, input_ids: Tensor, targets: Tensor, arguments: Mapping[str, Any]) -> Tensor:
        """Return the current step's loss, summed over the targets but the ignored; see `chunked_loss.Objective`."""
        assert self._student is not None
        asked = self.objective_at(self._step)
        if asked == "cross_entropy":
            return summed_loss(self._student, states(), targets)
        wanted = targets != IGNORED
        with torch.no_grad():
            theirs = self._of_teacher(input_ids, arguments)
        if asked == "logits":
            assert self.teacher is not None
            return summed_divergence(self._student, states()[wanted], self.teacher, theirs.hidden[wanted])
        mask = arguments.get("attention_mask")
        mask = torch.ones_like(input_ids) if mask is None else mask
        if self.section.match_input == "teacher":
            self._calls.given = theirs.inputs
        with self._calls.recorded():
            hidden = states()
        ours = [hidden] if asked == "hidden" else self._calls.outputs
        errors = [
            relative_error(own, other, size, mask) for own, other, size in zip(ours, theirs.matched, self.sizes, strict=True)
        ]
        return torch.stack(errors).mean() * wanted.sum()

    def untrained(self, model: PreTrainedModel) -> list[nn.Parameter]:
        """Return the parameters that the current step must leave alone."""
        if not self.is_matching or self.section.match_trains == "all":
            return []
        training = {id(parameter) for module in attention_modules(model) for parameter in module.parameters()}
        training |= {id(parameter) for _, parameter in positional_parameters(model)}
        return [parameter for parameter in model.parameters() if id(parameter) not in training]

    def _of_teacher(self, input_ids: Tensor, arguments: Mapping[str, Any]) -> TeacherCall:
        """Run the teacher, without gradients."""
        assert self.teacher is not None
        calls = AttentionCalls(attention_modules(self.teacher))
        with calls.recorded():
            hidden: Tensor = self.teacher.base_model(input_ids, **arguments).last_hidden_state
        return TeacherCall(hidden, calls.inputs, calls.outputs if self.section.match == "attention" else [hidden])


@dataclass(frozen=True)
class TeacherCall:
    """What a teacher did on a batch.

    Attributes:
        hidden: last hidden states, `[batch, length, hidden_size]`.
        inputs: hidden states that each attention module was called with.
        matched: what is matched: the output of each attention module, or the last hidden states alone.
    """

    hidden: Tensor
    inputs: list[Tensor]
    matched: list[Tensor]
