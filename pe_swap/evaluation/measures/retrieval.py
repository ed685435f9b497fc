"""Is a short statement found in long texts by their embeddings?

Each document is filler with one statement somewhere in it, "The pass key of NAME is NUMBER."; each query asks for one name's. A query
is right if the document with its name is nearest, by the cosine of mean-pooled embeddings. From Zhu et al., "LongEmbed: Extending
Embedding Models for Long Context Retrieval" (arXiv:2404.12096, section 3.2), with sentences and names of our own: their passkey task
has repeated filler (`haystack: filler`), their needle task has long texts (`haystack: documents`, those of the evaluation).

With a longer text the statement is a smaller part of the mean, so that accuracy falls with the length under any scheme; compare schemes
at one length.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, cycle, islice, product
from typing import ClassVar, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from pe_swap.errors import DataError
from pe_swap.evaluation.embeddings import embeddings
from pe_swap.evaluation.measures.base import MEASURES, MeasureOptions, Probe, Reading, framed
from pe_swap.evaluation.measures.passkey import FILLER, ids_of
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import PositiveInt
from pe_swap.runs.recall import draw

FIRST_NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Irene", "Jacob", "Karen", "Louis")
LAST_NAMES = ("Adams", "Baker", "Clark", "Davis", "Evans", "Foster", "Green", "Harris", "Jones", "King", "Lewis", "Moore")


class RetrievalOptions(MeasureOptions):
    """Options of `retrieval`."""

    haystack: Literal["filler", "documents"] = Field(default="filler", description="repeated sentences, or the evaluation's text")
    documents: PositiveInt = Field(
        default=32, le=len(FIRST_NAMES) * len(LAST_NAMES), description="documents to find one among, each asked for once"
    )


@MEASURES.register("retrieval")
class Retrieval(Probe):
    """A statement found in long documents by mean-pooled embeddings of an encoder, by length (LongEmbed, arXiv:2404.12096)."""

    name = "retrieval"
    for_decoders = False
    for_encoders = True
    needs_vocabulary = False
    Options = RetrievalOptions
    quantities: ClassVar[dict[str, str]] = {
        "accuracy": "Share of queries whose document is nearest",
        "reciprocal_rank": "Mean of 1 / rank of the query's document",
    }

    def readings(self, model: PreTrainedModel, text: Text, length: int) -> Iterator[Reading]:
        """Yield accuracy and mean reciprocal rank."""
        documents, queries = self.documents_and_queries(text, length)
        cosines = embeddings(model, queries, text.settings) @ embeddings(model, documents, text.settings).T
        ranks = ranks_of_own(cosines)
        yield Reading("accuracy", float((ranks == 1).double().mean()), len(ranks))
        yield Reading("reciprocal_rank", float((1 / ranks).mean()), len(ranks))

    def documents_and_queries(self, text: Text, length: int) -> tuple[list[list[int]], list[list[int]]]:
        """Return documents of `length` tokens, and the query of each.

        Raises:
            DataError: the length has no room for a statement.
        """
        generator = torch.Generator().manual_seed(text.seed)
        names = list(product(FIRST_NAMES, LAST_NAMES))
        people = [" ".join(names[index]) for index in draw(range(len(names)), self.options.documents, generator)]
        filler = cycle(ids_of(text.tokenizer, FILLER) if self.options.haystack == "filler" else chain(*text.documents))
        documents, queries = [], []
        for person in people:
            number = int(torch.randint(10_000, 100_000, (), generator=generator))
            statement = ids_of(text.tokenizer, f" The pass key of {person} is {number}. ")
            room = length - len(framed(text, statement)[0])
            if room < 0:
                raise DataError(
                    f"A length of {length:,} has no room for a statement of {len(statement)} tokens. Use longer lengths."
                )
            body = list(islice(filler, room))
            place = int(torch.randint(room + 1, (), generator=generator))
            documents.append(framed(text, [*body[:place], *statement, *body[place:]])[0])
            queries.append(framed(text, ids_of(text.tokenizer, f"What is the pass key of {person}?"))[0])
        return documents, queries


def ranks_of_own(cosines: torch.Tensor) -> torch.Tensor:
    """Return the rank of document i for query i, 1 for the nearest, `[queries]`, float64; ties count against it.

    Args:
        cosines: `[queries, documents]`.
    """
    return (cosines >= cosines.diagonal()[:, None]).sum(dim=1).double()
