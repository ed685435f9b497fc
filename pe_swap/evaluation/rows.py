"""What an evaluation writes: one typed row per result. Reports, plots and model cards are made from rows alone."""

from __future__ import annotations

from typing import TypedDict

PROTOCOL_VERSION = "pe_swap-evaluation-2"
"""Name of how numbers are computed. It changes whenever the same models and text would give other numbers.

2: the first token of every window where the tokenizer adds one; buckets of loss by position end at powers of two.
"""


class PositionLoss(TypedDict):
    """Mean loss of the targets in one range of positions."""

    first: int
    """Least number of tokens that a target of the range is predicted from (of a masked token: its place, from 1)."""
    last: int
    """Greatest number; never above the length."""
    tokens: int
    """Targets in the range."""
    loss: float
    """Their mean loss, nats."""


class PerplexityRow(TypedDict):
    """One model under one protocol at one length."""

    model: str
    """Label: the last part of the model's path."""
    scheme: str
    """Its schemes, or `original`."""
    seeds: list[int]
    """Seeds of the trainings behind the row, one of a single model; empty where its folder holds no record of a training."""
    protocol: str
    """Name of the measure, one of `MEASURES`."""
    protocol_version: str
    """`PROTOCOL_VERSION` of the code that measured."""
    first_token: str
    """`window` where every window starts with the tokenizer's first token, `document` where only the first one does."""
    length: int
    """Input tokens of a window."""
    perplexity: float | None
    """exp(summed loss / scored tokens); None where `error` says why there is none."""
    ci_low: float | None
    """2.5th percentile of the perplexity over resampled documents, and seeds if there are several; None of a single document."""
    ci_high: float | None
    """97.5th percentile."""
    bits_per_byte: float | None
    """Summed loss in bits / UTF-8 bytes of the scored text: comparable between vocabularies. None where bytes are not known."""
    tokens: int
    """Scored targets."""
    documents: int
    """Documents they are from."""
    loss_by_position: list[PositionLoss]
    """Mean loss by position in the window."""
    document_losses: list[list[float]]
    """Summed loss of each of the documents, nats, `[models, documents]`: one model, or one per seed."""
    document_tokens: list[int]
    """Scored targets of each of the documents."""
    document_bytes: list[int] | None
    """Bytes of the scored text of each of the documents; None where not known."""
    control: str | None
    """Model that the ratio divides by; None where no other model was measured at this length."""
    ratio: float | None
    """Perplexity / perplexity of the control on the same documents; 1 for the control itself."""
    ratio_low: float | None
    """2.5th percentile of the ratio over resampled documents and seeds, drawn once for both; None of a single document."""
    ratio_high: float | None
    """97.5th percentile."""
    error: str | None
    """Why nothing was measured, or None."""


class ProbeRow(TypedDict):
    """One number that a measure other than a perplexity gives."""

    model: str
    scheme: str
    seeds: list[int]
    """As in `PerplexityRow`."""
    measure: str
    """Name of the measure, one of `MEASURES`."""
    protocol_version: str
    length: int
    """Input tokens."""
    quantity: str
    """What the number is, for instance `accuracy`; empty where nothing was measured."""
    at: dict[str, float]
    """Where it was measured beside the length, for instance `{"depth": 0.5}`."""
    value: float | None
    """The number; None where `error` says why there is none."""
    count: int
    """Trials or targets behind it."""
    error: str | None


class ProbeNote(TypedDict):
    """What a report says of a measure; kept in the record, so that a report needs nothing else."""

    title: str
    """First line of the measure's documentation."""
    quantities: dict[str, str]
    """Each quantity, in words, with its unit."""
    columns: str
    """What stands in a table's columns: `length`, or a name in `at`."""
    averaged: list[str]
    """Names in `at` over which a table averages; a picture shows them."""
    options: dict[str, object]
    """The options it was measured with."""


class AccuracyRow(TypedDict):
    """One model of images under one measure at one resolution."""

    model: str
    """Label of the model."""
    scheme: str
    """Its schemes, or `original`."""
    seeds: list[int]
    """As in `PerplexityRow`."""
    measure: str
    """Name of the measure, one of `MEASURES`."""
    protocol_version: str
    resolution: int
    """Height and width that images were given at, pixels."""
    accuracy: float
    """Share of images that the model is right about."""
    ci_low: float | None
    """2.5th percentile over resampled images, and seeds if there are several; None of a single image."""
    ci_high: float | None
    """97.5th percentile."""
    images: int
    """Images."""
    hits: list[str]
    """A word per seed, with `1` for an image that the model is right about, else `0`."""
    control: str | None
    """Model that the difference is to; None where there is no other."""
    difference: float | None
    """Accuracy less that of the control on the same images; 0 for the control itself."""
    difference_low: float | None
    """2.5th percentile of the difference over resampled images and seeds, drawn once for both."""
    difference_high: float | None
    """97.5th percentile."""
