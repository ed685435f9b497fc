"""Probes against models whose answers are known, and against numbers worked out another way."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from pe_swap.errors import ConfigError, DataError
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.evaluation.measures import MEASURES, Probe, measure
from pe_swap.evaluation.measures.agreement import neighbours
from pe_swap.evaluation.measures.copy import sequences
from pe_swap.evaluation.measures.diagnose import head_statistics
from pe_swap.evaluation.measures.passkey import FILLER
from pe_swap.evaluation.measures.retrieval import FIRST_NAMES, LAST_NAMES, ranks_of_own
from pe_swap.evaluation.text import Text
from pe_swap.runs.config import MeasureSection
from pe_swap.runs.models import longest_input
from pe_swap.runs.recall import recall_body
from tests.evaluation.measures.oracles import finds_what_followed, words
from tests.support.models import TRAINED_LENGTH, build, swapped
from tests.support.words import DOCUMENTS, numbered_tokenizer


def text(*, lengths: list[int], named: PreTrainedTokenizerBase | None = None, causal: bool = True, **settings: Any) -> Text:
    section = MeasureSection(lengths=lengths, **settings)
    return Text(DOCUMENTS, None, named or numbered_tokenizer(masked=not causal), section, 0, "document", causal)


def read(name: str, model: Any, given: Text, length: int, **options: Any) -> dict[Any, float]:
    """Return a probe's values by quantity and place."""
    probe = measure(name, options)
    assert isinstance(probe, Probe)
    found = {(one.quantity, *one.at.values()): one.value for one in probe.readings(model, given, length)}
    assert {quantity for quantity, *_ in found} <= probe.quantities.keys()
    return found


PROBES = [name for name in MEASURES.names() if issubclass(MEASURES[name], Probe)]


OPTIONS = {"agreement": {"reference": "the unswapped encoder"}}
"""Options that have no default."""


@pytest.mark.parametrize("name", [name for name in PROBES if MEASURES[name].for_decoders])
def test_every_probe_gives_rows_for_a_real_model_and_says_what_it_is(name: str) -> None:
    settings = MeasureSection(lengths=[32, 48], protocols=[], measures=[name])
    evaluator = Evaluator(DOCUMENTS, words() if name == "passkey" else numbered_tokenizer(), settings)
    rows = evaluator.probe_rows(swapped("gpt2", "alibi"), "a", "alibi")
    measured = [row for row in rows if row["value"] is not None]
    assert {row["quantity"] for row in measured} == MEASURES[name].quantities.keys()
    assert all(row["count"] > 0 and row["error"] is None for row in measured)
    note = MEASURES[name](MEASURES[name].Options()).note()
    assert note["title"].endswith(".")
    assert note["columns"] == "length" or note["columns"] in measured[0]["at"]


@pytest.mark.parametrize("name", [name for name in PROBES if MEASURES[name].for_encoders])
def test_probes_of_encoders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pe_swap.evaluation.measures.agreement.load_model", lambda *args, **settings: build("bert"))
    options = {key: value for key, value in OPTIONS.items() if key == name}
    settings = MeasureSection(lengths=[32], protocols=[], measures=[name], options=options)
    named = words() if name in ("passkey", "retrieval") else numbered_tokenizer(masked=True)
    evaluator = Evaluator(DOCUMENTS, named, settings)
    assert evaluator.needs_vocabulary(causal=False) is MEASURES[name].needs_vocabulary
    assert evaluator.rows(swapped("bert", "alibi"), "b", "alibi") == []
    rows = evaluator.probe_rows(swapped("bert", "alibi"), "b", "alibi")
    assert {row["quantity"] for row in rows} == MEASURES[name].quantities.keys()
    assert all(row["error"] is None for row in rows)


# offset


def test_a_passage_elsewhere_is_the_models_own_loss_there() -> None:
    model, given = swapped("gpt2", "sinusoidal"), text(lengths=[16])
    found = read("offset", model, given, 16, offsets=[0, 40], passage=16, documents=2)
    ids = torch.tensor([[1, *document[:16]] for document in DOCUMENTS[:2]])
    losses = []
    for offset in (0, 40):
        with torch.no_grad():
            logits = model(ids[:, :-1], position_ids=torch.arange(offset, offset + 16)[None]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"))
    assert found["perplexity", 40.0] == pytest.approx(float(losses[1].mean().exp()), rel=1e-5)
    assert found["largest_change", 40.0] == pytest.approx(float((losses[1] - losses[0]).abs().max()), rel=1e-4)
    assert found["largest_change", 40.0] > 0.1


@pytest.mark.parametrize("scheme", ["alibi", "rope", "t5"])
def test_shift_invariant_schemes_are_flat(scheme: str) -> None:
    found = read("offset", swapped("gpt2", scheme), text(lengths=[16]), 16, offsets=[0, 2048], passage=16)
    assert found["largest_change", 2048.0] < 5e-3


def test_an_offset_beyond_a_table_is_a_row_that_says_so() -> None:
    options = {"offset": {"offsets": [0, 16, 17], "passage": 16}}
    settings = MeasureSection(lengths=[16], protocols=[], measures=["offset"], options=options)
    rows = Evaluator(DOCUMENTS, numbered_tokenizer(), settings).probe_rows(build("gpt2"), "control", "original")
    assert [row["error"] for row in rows[:4]] == [None] * 4
    assert rows[4]["error"] == f"positions up to 33 are more than the {TRAINED_LENGTH} this model has; swap it to go on"
    assert longest_input(build("gpt2")) == TRAINED_LENGTH


# gain


def test_gain_by_hand() -> None:
    model, recent, length, targets = swapped("gpt2", "rope"), 4, 12, 3
    given = text(lengths=[8, length])
    gains = []
    for document in DOCUMENTS:
        tokens = torch.tensor([1, *document])
        for target in range(len(tokens) - targets, len(tokens)):
            parts = [tokens[len(tokens) - 1 - length : target], tokens[target - recent : target]]
            with torch.no_grad():
                full, short = (F.cross_entropy(model(part[None]).logits[:, -1], tokens[target : target + 1]) for part in parts)
            gains.append(float(short - full))
    found = read("gain", model, given, length, recent=recent, targets=targets)
    assert found["mean_gain",] == pytest.approx(sum(gains) / len(gains), abs=1e-5)
    assert found["key_share",] == sum(gain > 2 for gain in gains) / len(gains)


def test_a_short_context_that_fills_the_shortest_length_is_refused() -> None:
    with pytest.raises(DataError, match="A short context of 9 tokens leaves no target in a window of 8"):
        read("gain", swapped("gpt2", "alibi"), text(lengths=[8]), 8, recent=9)


# copy


def test_sequences_repeat_once_behind_the_start_token() -> None:
    (found,) = sequences(text(lengths=[16]), 8, 1)
    assert found[0] == 1
    assert found[1:9] == found[9:]
    assert len(set(found[1:])) == 8
    assert not {1, 2} & set(found[1:])


def test_a_model_that_finds_what_followed_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    finds_what_followed(monkeypatch)
    found = read("copy", build("gpt2"), text(lengths=[32]), 32)
    assert found["accuracy",] == 1.0
    assert found["loss",] == pytest.approx(math.log(1 + 88 * math.exp(-20)), abs=1e-6)


def test_a_model_that_reaches_less_far_than_the_lag_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # 32 inputs: the start token and 16 tokens twice, so a lag of 16.
    for reach, accuracy in ((15, 0.0), (16, 1.0)):
        finds_what_followed(monkeypatch, reach=reach)
        assert read("copy", build("gpt2"), text(lengths=[32]), 32)["accuracy",] == accuracy


# passkey


def test_a_passkey_prompt_by_hand() -> None:
    probe, given = measure("passkey", {"digits": 2, "distractors": 1}), text(lengths=[40], named=words())
    prompt, places = probe.prompt(given, 40, 0.0, torch.Generator().manual_seed(0))
    said = given.tokenizer.decode(prompt).split()
    assert len(prompt) == 41
    assert places == [39, 40]
    assert said[:5] == ["<s>", "The", "pass", "key", "is"]
    assert said[5:7] == said[39:41]
    assert said[35:39] == ["The", "pass", "key", "is"]
    assert "The number of the house is" in " ".join(said)
    last, _ = probe.prompt(given, 40, 1.0, torch.Generator().manual_seed(0))
    assert given.tokenizer.decode(last).split().count("pass") == 3
    assert len(last) == 41


def test_only_depths_within_reach_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two words decide what follows ("key is", "is 7", "7 3"): digits are drawn apart so that no pair of them comes twice in this seed.
    given = text(lengths=[60], named=words())
    finds_what_followed(monkeypatch, context=2)
    found = read("passkey", build("gpt2"), given, 60, digits=2, depths=3, trials=4)
    assert [found["accuracy", depth] for depth in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    finds_what_followed(monkeypatch, context=2, reach=20)
    found = read("passkey", build("gpt2"), given, 60, digits=2, depths=3, trials=4)
    assert [found["accuracy", depth] for depth in (0.0, 0.5, 1.0)] == [0.0, 0.0, 1.0]


def test_a_vocabulary_without_digits_and_a_length_without_room_are_refused() -> None:
    with pytest.raises(DataError, match="The vocabulary has no token for each digit"):
        read("passkey", build("gpt2"), text(lengths=[60]), 60)
    with pytest.raises(DataError, match="A length of 12 has no room for the number and the question"):
        read("passkey", build("gpt2"), text(lengths=[12], named=words()), 12)


# recall


@pytest.mark.parametrize("task", ["pairs", "noisy", "selective_copy"])
def test_recall_bodies_ask_for_what_they_hold(task: str) -> None:
    choices = list(range(10, 80))
    body, asked = recall_body(task, choices, 3, 40, torch.Generator().manual_seed(1))
    assert len(body) == 40
    if task == "selective_copy":
        *inside, mark = body[:-3]
        filler = max(set(inside), key=inside.count)
        assert [token for token in inside if token != filler] == body[-3:]
        assert mark not in inside
        assert asked == [37, 38, 39]
    else:
        assert asked == [35, 37, 39]
        for place in asked:
            key, value = body[place - 1], body[place]
            assert body[:34].count(key) == body[:34].count(value) == 1
            assert body[body.index(key) + 1] == value
        if task == "pairs":
            assert {body[0], body[2], body[4]} == {body[34], body[36], body[38]}


@pytest.mark.parametrize("task", ["pairs", "noisy"])
def test_a_model_that_finds_what_followed_recalls(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finds_what_followed(monkeypatch)
    assert read("recall", build("gpt2"), text(lengths=[40]), 40, task=task)["accuracy",] == 1.0
    finds_what_followed(monkeypatch, reach=3)
    assert read("recall", build("gpt2"), text(lengths=[40]), 40, task=task)["accuracy",] < 0.2


def test_too_little_room_for_the_pairs_is_refused() -> None:
    with pytest.raises(DataError, match="has no room for 4 pairs and their questions"):
        read("recall", build("gpt2"), text(lengths=[12]), 12)


# diagnose


def test_statistics_of_an_even_spread_by_hand() -> None:
    causal = torch.ones(3, 3).tril() / torch.arange(1, 4)[:, None]
    # Queries 1 and 2: mass 1/2 and 1/3; distances (1 + 0) / 2 and (2 + 1 + 0) / 3; an even spread has all its entropy.
    assert head_statistics(causal[None]).tolist() == [pytest.approx([5 / 12, 0.75, 1.0])]
    both_ways = torch.full((3, 3), 1 / 3)
    assert head_statistics(both_ways[None]).tolist() == [pytest.approx([1 / 3, (2 / 3 + 1.0) / 2, 1.0])]
    assert head_statistics(torch.eye(3)[None]).tolist() == [pytest.approx([0.0, 0.0, 0.0])]


@pytest.mark.parametrize(("family", "case"), [("gpt2", "alibi"), ("gpt2", "rope"), ("bert", "t5")])
def test_diagnosis_is_that_of_the_models_own_probabilities(family: str, case: str) -> None:
    model, given = swapped(family, case), text(lengths=[24], causal=family == "gpt2")
    before = model.config._attn_implementation
    found = read("diagnose", model, given, 24, documents=1)
    assert model.config._attn_implementation == before
    assert len(found) == 3 * 2 * 12
    eager = swapped(family, case, backend="eager")
    document = DOCUMENTS[0]
    row = [1, *document[:23]] if family == "gpt2" else [1, *document[:22], 2]
    with torch.no_grad():
        attentions = eager(torch.tensor([row]), output_attentions=True).attentions
    for layer, probabilities in enumerate(attentions):
        expected = probabilities[0, :, 1:, 0].mean(-1)
        values = [found["first_token_mass", float(layer), float(head)] for head in range(12)]
        assert values == pytest.approx(expected.tolist(), abs=1e-5)


# retrieval


def names_and_words() -> PreTrainedTokenizerFast:
    texts = [FILLER, "The pass key of is What ?", *FIRST_NAMES, *LAST_NAMES]
    found = dict.fromkeys(word for text in texts for word in re.findall(r"\w+|[^\w\s]", text))
    inner = Tokenizer(
        WordLevel({name: index for index, name in enumerate(["[UNK]", "[CLS]", "[SEP]", *found])}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def test_documents_hold_what_their_queries_ask_for() -> None:
    given = text(lengths=[40], named=names_and_words(), causal=False)
    documents, queries = measure("retrieval", {"documents": 5}).documents_and_queries(given, 40)
    assert [len(document) for document in documents] == [40] * 5
    for document, query in zip(documents, queries, strict=True):
        said, asked = (given.tokenizer.decode(ids).split() for ids in (document, query))
        assert asked[:6] == ["[CLS]", "What", "is", "the", "pass", "key"]
        first, last = asked[7:9]
        assert [said[index + 1] for index, word in enumerate(said) if word == first] == [last]
    found, _ = measure("retrieval", {"documents": 1, "haystack": "documents"}).documents_and_queries(given, 40)
    assert sum(token in DOCUMENTS[0][:40] for token in found[0]) >= 25


def test_a_bag_of_words_retrieves_and_a_constant_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    given = text(lengths=[40], named=names_and_words(), causal=False)

    names = torch.tensor(given.tokenizer.convert_tokens_to_ids([*FIRST_NAMES, *LAST_NAMES]))

    def bag_of_names(model: Any, ids: torch.Tensor) -> torch.Tensor:
        return (ids[..., None] == names).double()

    monkeypatch.setattr("pe_swap.evaluation.embeddings.hidden_states", bag_of_names)
    assert read("retrieval", build("bert"), given, 40, documents=20) == {("accuracy",): 1.0, ("reciprocal_rank",): 1.0}
    monkeypatch.setattr("pe_swap.evaluation.embeddings.hidden_states", lambda model, ids: torch.ones(*ids.shape, 4))
    found = read("retrieval", build("bert"), given, 40, documents=20)
    assert (found["accuracy",], found["reciprocal_rank",]) == (0.0, pytest.approx(1 / 20))


def test_ranks_by_hand() -> None:
    cosines = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.6], [0.3, 0.2, 0.3]])
    assert ranks_of_own(cosines).tolist() == [1.0, 3.0, 2.0]


# agreement


def test_neighbours_by_hand() -> None:
    vectors = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.3, 0.7]]), dim=-1)
    assert neighbours(vectors).tolist() == [1, 0, 3, 2]


def test_agreement_is_the_cosine_of_mean_states(tmp_path: Path) -> None:
    model, given = swapped("bert", "rope"), text(lengths=[16], causal=False)
    build("bert").save_pretrained(tmp_path)
    row = [1, *DOCUMENTS[0][:14], 2]
    with torch.no_grad():
        ours, theirs = (one.base_model(torch.tensor([row])).last_hidden_state.mean(1) for one in (model, build("bert")))
    found = read("agreement", model, given, 16, reference=str(tmp_path), documents=1)
    assert found["cosine",] == found["lowest_cosine",] == pytest.approx(float(F.cosine_similarity(ours, theirs)), abs=1e-5)
    assert found["cosine",] < 0.999
    assert read("agreement", build("bert"), given, 16, reference=str(tmp_path))["lowest_cosine",] == pytest.approx(1, abs=1e-5)
    beyond = read("agreement", swapped("bert", "alibi"), given, TRAINED_LENGTH + 1, reference=str(tmp_path))
    assert {name for (name, *_) in beyond} <= {"same_neighbour"}, "there is no cosine beyond the reference's positions"
    with pytest.raises(ConfigError, match=r"'agreement': it needs the encoder to agree with\. Name it with"):
        measure("agreement")
