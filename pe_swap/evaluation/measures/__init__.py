"""What an evaluation measures: one file per measure, found by scanning this folder."""

from pe_swap.evaluation.measures.base import (
    MEASURES,
    Example,
    ImageMeasure,
    Measure,
    Perplexity,
    Probe,
    Reading,
    chosen,
    descriptions,
    measure,
)

MEASURES.scan(__name__, __path__)

__all__ = [
    "MEASURES",
    "Example",
    "ImageMeasure",
    "Measure",
    "Perplexity",
    "Probe",
    "Reading",
    "chosen",
    "descriptions",
    "measure",
]
