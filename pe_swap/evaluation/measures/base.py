"""The contract of a measure. One file in this folder holds one measure, or several that share their windows.

A measure is a perplexity (it chooses windows of the documents; the evaluator scores them), a probe (it builds its own inputs and
gives numbers), or a measure of images. A file registers its class in `MEASURES`; configuration, command line, record and report read
the registry.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pe_swap.errors import ConfigError, DataError
from pe_swap.evaluation.batches import in_batches, on_device
from pe_swap.evaluation.losses import target_hits, target_losses
from pe_swap.evaluation.rows import ProbeNote
from pe_swap.evaluation.text import Text
from pe_swap.registry import Registry
from pe_swap.runs.config import MeasureSection, Section, build
from pe_swap.runs.images import LabelledImages

MEASURES: Registry[type[Measure]] = Registry("measure")


@dataclass(frozen=True)
class Example:
    """One forward pass of one row.

    Attributes:
        document: index of the document it is from.
        inputs: token ids.
        targets: what each output is to predict, as many as inputs.
        scored: which targets count.
        tokens: index in the document of each scored target.
    """

    document: int
    inputs: list[int]
    targets: list[int]
    scored: list[bool]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Reading:
    """One number of a probe.

    Attributes:
        quantity: a key of the probe's `quantities`.
        value: the number.
        count: trials or targets behind it.
        at: where it was measured beside the length.
    """

    quantity: str
    value: float
    count: int
    at: Mapping[str, float] = field(default_factory=dict)


class MeasureOptions(Section):
    """Base of the options of a measure. A field is an option: `options: {passkey: {depths: 5}}`, `--options.passkey.depths 5`."""


class Measure:
    """One thing that is measured of a model.

    Attributes:
        for_decoders: whether it is defined for models that look back only.
        for_encoders: whether it is defined for masked models.
        needs_vocabulary: whether it needs what leads from hidden states to words, which a sentence encoder has not.
        Options: the class of its options.
    """

    name: ClassVar[str] = ""
    for_decoders: ClassVar[bool] = True
    for_encoders: ClassVar[bool] = False
    needs_vocabulary: ClassVar[bool] = True
    Options: ClassVar[type[MeasureOptions]] = MeasureOptions

    def __init__(self, options: MeasureOptions) -> None:
        self.options: Any = options


class Perplexity(Measure):
    """A measure that chooses which tokens of the documents are scored, and from which context."""

    def examples(self, text: Text, length: int) -> list[Example]:
        """Return every window at a length.

        Raises:
            DataError: no document is long enough.
        """
        raise NotImplementedError


class ImageMeasure(Measure):
    """A measure of models of images: which images a model is right about, at one resolution.

    Attributes:
        title: what the share of right images is called.
    """

    title: ClassVar[str] = ""
    for_decoders = False

    def resolutions(self) -> list[int]:
        """Return the heights, and widths, at which images are given, in pixels."""
        raise NotImplementedError

    def hits(self, model: PreTrainedModel, images: LabelledImages, resolution: int) -> Tensor:
        """Return whether the model is right about each image, bool, `[images]`.

        Args:
            model: a classifier of images in evaluation mode.
            images: pixels and classes.
            resolution: height and width that the images are given at, in pixels.
        """
        raise NotImplementedError


class Probe(Measure):
    """A measure that builds its own inputs.

    Attributes:
        quantities: each number it gives, in words, with its unit.
        columns: what a table has in its columns: `length`, or a name of `Reading.at`.
        averaged: names of `Reading.at` over which a table averages.
    """

    quantities: ClassVar[dict[str, str]] = {}
    columns: ClassVar[str] = "length"
    averaged: ClassVar[tuple[str, ...]] = ()

    def lengths(self, settings: MeasureSection) -> list[int]:
        """Return the lengths at which it is measured: those of the evaluation, unless it has its own."""
        return list(settings.lengths)

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield its numbers at one length.

        Args:
            model: a language model in evaluation mode.
            text: documents, tokenizer and settings.
            length: input tokens.

        Raises:
            DataError: the documents or the vocabulary do not allow it.
            PositionRangeError: the model cannot take the length.
        """
        raise NotImplementedError

    def note(self) -> ProbeNote:
        """Return what a report says of it."""
        return {
            "title": (inspect.getdoc(type(self)) or self.name).splitlines()[0],
            "quantities": dict(self.quantities),
            "columns": self.columns,
            "averaged": list(self.averaged),
            "options": self.options.model_dump(mode="json"),
        }


def measure(name: str, options: Mapping[str, Any] | None = None) -> Measure:
    """Return the measure called `name`, with options.

    Raises:
        UnknownNameError: there is none.
        ConfigError: it has no such option, or a value breaks its rule.
    """
    measure_class = MEASURES[name]
    try:
        return measure_class(build(measure_class.Options, dict(options or {})))
    except ConfigError as error:
        raise ConfigError(f"The options of the measure '{name}': {error}") from error


def chosen(settings: MeasureSection, *, of_images: bool = False) -> list[Measure]:
    """Return the measures that an evaluation is to take, perplexities first, each once.

    Raises:
        UnknownNameError: `protocols`, `measures` or `options` names one that is not there.
        ConfigError: `protocols` names a probe, `options` one that is not measured, an option is wrong, or a measure of images is asked of
            text, or one of text of images.
    """
    names = list(dict.fromkeys([*settings.protocols, *settings.measures]))
    found = [measure(name, settings.options.get(name)) for name in names]
    for name in settings.protocols:
        if not issubclass(MEASURES[name], Perplexity):
            raise ConfigError(f"protocols names '{name}', which is no perplexity. Name it under measures.")
    for one in found:
        if isinstance(one, ImageMeasure) is not of_images:
            ours, theirs = ("images", "text") if of_images else ("text", "images")
            way_out = "Set eval.protocols to [] and eval.measures to [accuracy]" if of_images else "Drop it"
            raise ConfigError(f"The measure '{one.name}' is of {theirs}, and the data are {ours}. {way_out}, or name other data.")
    for name in settings.options:
        if MEASURES[name] and name not in names:
            raise ConfigError(f"options names '{name}', which is not measured. Add it to measures, or leave its options out.")
    return sorted(found, key=lambda one: isinstance(one, Probe))


def descriptions() -> str:
    """Return a line per registered measure, for a command's help."""
    lines = [f"  {name}: {(inspect.getdoc(MEASURES[name]) or '').splitlines()[0]}" for name in MEASURES.names()]
    return "\n".join(lines)


def ordinary_tokens(text: Text) -> list[int]:
    """Return the token ids from which probes draw at random: the whole vocabulary but special tokens, in order."""
    special = set(text.tokenizer.all_special_ids)
    return [index for index in range(len(text.tokenizer)) if index not in special]


def framed(text: Text, body: Sequence[int]) -> tuple[list[int], int]:
    """Return a body between the tokens that the model expects around a text, and how many of them stand before it."""
    if text.is_causal:
        return [*text.start, *body], len(text.start)
    tokenizer = text.tokenizer
    before = [] if tokenizer.cls_token_id is None else [int(tokenizer.cls_token_id)]
    after = [] if tokenizer.sep_token_id is None else [int(tokenizer.sep_token_id)]
    return [*before, *body, *after], len(before)


def body_length(text: Text, length: int) -> int:
    """Return how many tokens of its own a prompt may have, so that `length` tokens go into the model.

    A decoder's last token is a target only, so that a prompt has one token more than its inputs.
    """
    return length - len(framed(text, [])[0]) + (1 if text.is_causal else 0)


def first_windows(text: Text, length: int) -> list[list[int]]:
    """Return the first window of every document that fills the length, between the tokens that the model expects around a text.

    Raises:
        DataError: no document does.
    """
    around = len(framed(text, [])[0])
    rows = [framed(text, document[: length - around])[0] for document in text.documents if len(document) + around >= length]
    if not rows:
        raise DataError(f"No document has {length:,} tokens. Use shorter lengths, or longer documents.")
    return rows


def example_losses(
    model: PreTrainedModel, examples: Sequence[Example], settings: MeasureSection
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each example's losses, nats, and the index in the window of the last token each target is predicted from.

    Examples of one length go through the model together; no padding is involved.
    """
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        by_length[len(example.inputs)].append(index)
    losses: list[Tensor] = [torch.zeros(0)] * len(examples)
    positions: list[Tensor] = [torch.zeros(0)] * len(examples)
    for length, members in by_length.items():
        inputs, targets, scored = (
            torch.tensor([getattr(examples[index], part) for index in members]) for part in ("inputs", "targets", "scored")
        )
        found = torch.cat(
            in_batches(
                len(members),
                settings.batch_tokens // length,
                on_device(model, target_losses, inputs, targets, scored),
            )
        )
        for index, loss, row in zip(members, torch.split(found, scored.sum(1).tolist()), scored, strict=True):
            losses[index], positions[index] = loss, row.nonzero()[:, 0]
    return losses, positions


def answered(model: PreTrainedModel, text: Text, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Tensor:
    """Return whether each token of each answer is the most probable one, boolean, `[prompts, answer tokens]`.

    Of a decoder, a token counts as it does in greedy decoding: all tokens of an answer are right if and only if greedy decoding
    gives the answer. A masked model gets a mask token in place of each answer token, all at once.

    Args:
        model: a language model in evaluation mode.
        text: the tokenizer, and how many tokens go through the model at once.
        prompts: token ids, answers included, all of one length.
        answers: for each prompt, the index in it of each answer token, and the same number in every prompt.

    Raises:
        DataError: a masked model's tokenizer has no mask token.
    """
    ids = torch.tensor([list(prompt) for prompt in prompts])
    asked = torch.zeros_like(ids, dtype=torch.bool)
    for row, places in enumerate(answers):
        asked[row, torch.tensor(places)] = True
    if text.is_causal:
        inputs, targets, scored = ids[:, :-1], ids[:, 1:], asked[:, 1:]
    else:
        if text.tokenizer.mask_token_id is None:
            raise DataError(
                "The tokenizer has no mask token, so a masked language model cannot be asked. Name its own tokenizer."
            )
        inputs, targets, scored = ids.masked_fill(asked, int(text.tokenizer.mask_token_id)), ids, asked
    size = text.settings.batch_tokens // inputs.shape[1]
    return torch.cat(in_batches(len(ids), size, on_device(model, target_hits, inputs, targets, scored))).view(len(ids), -1)
