"""A swapped model saved, and loaded by every way transformers has."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForTextEncoding,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

import pe_swap
from pe_swap.errors import CheckpointError
from pe_swap.families import FAMILIES
from pe_swap.patching.install import holder_of
from pe_swap.saving.auto_classes import heads_by_auto_class
from tests.support.covering import PAIRS, covering_pairs
from tests.support.families import EOS, auto_class, config_of, described_alike, inputs_of, outputs, tiny
from tests.support.memory import Largest
from tests.support.models import CASES, MATRIX_FAMILIES, build, disturb, swapped, token_ids
from tests.support.processes import python
from tests.support.words import word_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder")

PER_LAYER = "rope+alibi"
"""Two schemes in one model, beside the cases of one."""

SCHEMES_ENOUGH = ["rope", "t5", "learned", "concat-learned"]
"""For what does not depend on the scheme: none of its weights in the file, some, a limit, some at the input."""

LEFT_OUT = {
    "AutoModelForAudioClassification": "of Whisper it has the encoder alone, which is left out",
    "AutoBackbone": "transformers 5.24 asks the Hub whether a folder exists, and loads none",
    "AutoModelForSemanticSegmentation": "BEiT's convolutions round differently where weights lie elsewhere in memory: 8e-9 of 1e-2",
}

ENOUGH_IN = [("gpt2", "AutoModelForCausalLM"), ("gpt2", "AutoModel"), ("bert", "AutoModelForMaskedLM"), ("bert", "AutoModel")]
"""Heads that are loaded under all of them; every other head under one."""

AUTO_CLASSES = [
    (family, name, case)
    for family in described_alike()
    for name in heads_by_auto_class(FAMILIES[family])
    if name not in LEFT_OUT
    for case in (SCHEMES_ENOUGH if (family, name) in ENOUGH_IN else ["t5"])
]
"""Every Auto class of one family for each description."""


def mixed(family: str) -> PreTrainedModel:
    """Return a model whose layers have different schemes."""
    model = pe_swap.swap_positional(build(family), "sinusoidal")
    pe_swap.swap_positional(model, "rope", layers=[0], base=777.0)
    pe_swap.swap_positional(model, "t5", layers=[1], num_buckets=8, max_distance=12)
    disturb(model)
    return model


def model_of(family: str, case: str) -> PreTrainedModel:
    return mixed(family) if case == PER_LAYER else swapped(family, case)


def tensors(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return every tensor of the output, caches aside."""
    with torch.no_grad():
        return {name: value for name, value in model.eval()(**inputs_of(model, ids)).items() if isinstance(value, Tensor)}


def assert_same(first: PreTrainedModel, second: PreTrainedModel, ids: Tensor | None = None) -> None:
    """Assert that two models give the same bits."""
    ids = token_ids(2, 20) if ids is None else ids
    expected, found = tensors(first, ids), tensors(second, ids)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# --- other processes -----------------------------------------------------------------------------------------------------------

LOAD_ALL = """
import json, sys
from pathlib import Path
import torch
import pe_swap
import transformers

torch.set_num_threads(1)
folder = Path(sys.argv[1])
inputs, found = torch.load(folder / "inputs.pt"), {}
for name, auto_class in json.loads((folder / "names.json").read_text()).items():
    with torch.no_grad():
        found[name] = getattr(transformers, auto_class).from_pretrained(folder / name)(**inputs[name]).logits
torch.save(found, folder / "found.pt")
"""


def test_every_scheme_comes_back_in_a_new_process(tmp_path: Path) -> None:
    ids, expected, names, inputs = token_ids(2, 20), {}, {}, {}
    for case, family in [*PAIRS, *((PER_LAYER, family) for family in MATRIX_FAMILIES), ("t5", "vit"), ("shaw-all", "dinov2")]:
        model, name = model_of(family, case), f"{family},{case}"
        model.save_pretrained(tmp_path / name)
        names[name] = auto_class(family).__name__
        inputs[name], expected[name] = inputs_of(model, ids), tensors(model, ids)["logits"]
    torch.save(inputs, tmp_path / "inputs.pt")
    (tmp_path / "names.json").write_text(json.dumps(names))
    python(LOAD_ALL, tmp_path)
    found = torch.load(tmp_path / "found.pt")
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


STRANGERS = """
import importlib.abc, io, json, sys
from pathlib import Path
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, GPT2LMHeadModel

sys.stdin = io.StringIO()

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "pe_swap":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def attempt(load):
    try:
        return f"loaded {type(load()).__name__}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

folder, report = Path(sys.argv[1]), {}
causal = folder / "gpt2,learned"
sys.meta_path.insert(0, NotInstalled())
report["auto"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(causal, trust_remote_code=False))
report["trusted"] = attempt(lambda: AutoModelForCausalLM.from_pretrained(causal, trust_remote_code=True))
report["config"] = attempt(lambda: AutoConfig.from_pretrained(causal, trust_remote_code=True))
report["tokenizer"] = attempt(lambda: AutoTokenizer.from_pretrained(causal, trust_remote_code=False))
report["tokenizer, nobody to ask"] = attempt(lambda: AutoTokenizer.from_pretrained(causal))
report["concrete"] = attempt(lambda: GPT2LMHeadModel.from_pretrained(causal))
assert "pe_swap" not in sys.modules

del sys.meta_path[0]
ids, found = torch.tensor(json.loads((folder / "ids.json").read_text())), {}
for name in ("gpt2,learned", "gpt2,rope", "bert,shaw"):
    auto_class = AutoModelForMaskedLM if name.startswith("bert,") else AutoModelForCausalLM
    with torch.no_grad():
        found[name] = auto_class.from_pretrained(folder / name, trust_remote_code=True)(ids).logits
torch.save(found, folder / "found.pt")
print("\\n" + json.dumps(report))
"""


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, Tensor], dict[str, Tensor]]:
    """Return what a process that never imports pe_swap meets: its errors without pe_swap installed, then its logits with it."""
    folder = tmp_path_factory.mktemp("strangers")
    ids, expected = token_ids(2, 20), {}
    for name in ("gpt2,learned", "gpt2,rope", "bert,shaw"):
        model = swapped(*name.split(","))
        model.save_pretrained(folder / name)
        expected[name] = tensors(model, ids)["logits"]
    word_tokenizer("gpt2").save_pretrained(folder / "gpt2,learned")
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    output = python(STRANGERS, folder, HF_HOME=str(folder / "home"))
    return json.loads(output.splitlines()[-1]), expected, torch.load(folder / "found.pt")


def test_trust_remote_code_loads_without_an_import(strangers: Any) -> None:
    _, expected, found = strangers
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_without_pe_swap_every_way_fails_and_says_what_to_install(strangers: Any) -> None:
    report, _, _ = strangers
    missing = "ImportError: The positions of this model were swapped by pe_swap, which is not installed. Run: pip install pe-swap"
    assert report["trusted"] == report["config"] == missing
    assert "Run: pip install pe-swap; then import pe_swap and load it with an Auto class" in report["concrete"]
    # transformers' own words, which lead to the ones above.
    assert report["auto"].startswith("ValueError: The repository ")
    assert "Please pass the argument `trust_remote_code=True`" in report["auto"]


def test_a_tokenizer_loads_without_pe_swap(strangers: Any) -> None:
    """Without the argument transformers asks whether to run the folder's code, and goes on without it where nobody answers."""
    report, _, _ = strangers
    assert report["tokenizer"] == report["tokenizer, nobody to ask"]
    assert report["tokenizer"].startswith("loaded ")


# --- Auto classes, and what they are given -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name", "case"), AUTO_CLASSES)
def test_every_auto_class_loads_its_head(family: str, name: str, case: str, tmp_path: Path) -> None:
    head = heads_by_auto_class(FAMILIES[family])[name]
    is_decoder = {"is_decoder": True} if name == "AutoModelForCausalLM" and "is_decoder" in config_of(family).to_dict() else {}
    torch.manual_seed(1)
    scheme, options = CASES[case]
    model = pe_swap.swap_positional(head(config_of(family, **is_decoder)), scheme, **options)
    disturb(model)
    model.save_pretrained(tmp_path)
    loaded, info = getattr(modeling_auto, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert isinstance(loaded, head)
    assert type(loaded).__name__ == f"PESwap{head.__name__}"
    ids = token_ids(4, 24)
    ids[:, -1] = EOS
    assert_same(model, loaded, ids.view(2, 2, 24) if "MultipleChoice" in name else ids)


@pytest.mark.parametrize("family", ["gpt2", "bert"])
@pytest.mark.parametrize("case", SCHEMES_ENOUGH)
def test_a_base_model_is_taken_out_of_a_head_and_a_head_put_on(family: str, case: str, tmp_path: Path) -> None:
    model = swapped(family, case)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    ids = token_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(base(ids).last_hidden_state, model.base_model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    assert_same(model.base_model, auto_class(family).from_pretrained(tmp_path / "base").base_model)


@pytest.mark.parametrize("case", SCHEMES_ENOUGH)
def test_swapped_to_saved_to_loaded_to_saved_is_a_fixed_point(case: str, tmp_path: Path) -> None:
    swapped("gpt2", case).save_pretrained(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("first", "second"))
    assert first == second
    assert not [name for name in first if name.endswith((".bin", ".pt", ".pkl", ".pth"))]


@pytest.mark.parametrize("case", ["rope", "t5", "learned", "shaw-all"])
@pytest.mark.parametrize(
    "given",
    [
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"low_cpu_mem_usage": True},
        {"dtype": "auto"},
        {"attn_implementation": "eager"},
    ],
    ids=lambda given: "-".join(map(str, next(iter(given.items())))),
)
def test_arguments_of_from_pretrained(case: str, given: dict[str, Any], tmp_path: Path) -> None:
    model = swapped("gpt2", case, given.get("attn_implementation", "sdpa"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(model, loaded)


@pytest.mark.parametrize("case", SCHEMES_ENOUGH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_that_of_a_cast_model(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = swapped("gpt2", case)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same(model.to(dtype), loaded)
    loaded.save_pretrained(tmp_path / "cast")
    assert_same(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "cast", dtype="auto"))


@pytest.mark.parametrize("case", SCHEMES_ENOUGH)
def test_a_checkpoint_in_shards(case: str, tmp_path: Path) -> None:
    model = swapped("gpt2", case)
    model.save_pretrained(tmp_path, max_shard_size="50kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


@pytest.mark.parametrize(("case", "family"), covering_pairs(MATRIX_FAMILIES))
def test_from_config_builds_the_scheme_with_fresh_weights(case: str, family: str, tmp_path: Path) -> None:
    model = swapped(family, case)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    fresh = auto_class(family).from_config(config)
    assert {name: value.shape for name, value in fresh.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }
    fresh.load_state_dict(model.state_dict())
    assert_same(model, fresh)
    assert_same(fresh, copy.deepcopy(fresh))
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()
    assert copy.deepcopy(config) == config


def test_a_model_from_a_folder_says_that_it_is_swapped_as_one_that_was_built_does(tmp_path: Path) -> None:
    """Transformers writes the `model_type` that it reads into the configuration, where it hides the class's."""
    build("gpt2").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert pe_swap.swap_positional(model, "alibi").config.model_type == "pe_swap_gpt2"
    assert pe_swap.restore_positional(model).config.model_type == "gpt2"


def test_a_pickled_model_is_the_model(tmp_path: Path) -> None:
    """Data loaders and launchers send models to their processes by pickle."""
    model = mixed("gpt2")
    model.save_pretrained(tmp_path)
    for original in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert_same(original, pickle.loads(pickle.dumps(original)))


# --- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "load"),
    [
        ("gpt2", GPT2LMHeadModel.from_pretrained),
        ("gpt2", GPT2Model.from_pretrained),
        ("gpt2", GPT2Config.from_pretrained),
        ("bert", BertForMaskedLM.from_pretrained),
        ("bert", BertConfig.from_pretrained),
    ],
)
@pytest.mark.parametrize("case", ["rope", "learned"])
def test_a_familys_own_class_refuses(family: str, load: Callable[[Path], Any], case: str, tmp_path: Path) -> None:
    swapped(family, case).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="Run: pip install pe-swap; then import pe_swap and load it with an Auto class"):
        load(tmp_path)


def edited(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a saved folder's `config.json`."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_a_folder_written_by_a_newer_pe_swap(tmp_path: Path) -> None:
    swapped("gpt2", "rope").save_pretrained(tmp_path)
    edited(tmp_path, lambda content: content["pe_swap"].update(format=2, version="9.1", schemes="in a form unknown today"))
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"saved by a newer pe_swap \('9.1', format 2\).*pip install --upgrade pe-swap"):
            load(tmp_path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda weights: weights.pop("transformer.wpe.schemes.0.table"),
            r"not in the checkpoint, or of another shape: transformer.wpe",
        ),
        (
            lambda weights: weights.update({"transformer.wpe.schemes.0.table": torch.zeros(3, 12)}),
            r"another shape: transformer.wpe",
        ),
        (
            lambda weights: weights.update({"transformer.wpe.weight": torch.zeros(32, 96)}),
            r"another shape: transformer.wpe.weight",
        ),
        (
            lambda weights: weights.update({"transformer.wpe.schemes.1.table": torch.zeros(2)}),
            r"not in the scheme: .*schemes.1.table",
        ),
    ],
    ids=["missing", "misshapen", "original-table", "extra"],
)
@pytest.mark.parametrize("given", [{}, {"ignore_mismatched_sizes": True}], ids=["", "ignoring"])
def test_positional_weights_that_do_not_fit(change: Any, text: str, given: dict[str, Any], tmp_path: Path) -> None:
    swapped("gpt2", "t5").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=text) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, **given)
    assert "Save the model again with save_pretrained, or load the folder it was made from." in str(caught.value)


def test_misshapen_weights_are_refused_before_they_are_allocated(tmp_path: Path) -> None:
    """2**24 rows of 96 would take 6.4 GB."""
    swapped("gpt2", "learned").save_pretrained(tmp_path)
    edited(tmp_path, lambda content: content["pe_swap"]["schemes"][0]["options"].update(max_length=2**24))
    with Largest() as allocated, pytest.raises(CheckpointError, match=r"of another shape: transformer\.wpe"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert allocated.numbers < 1e5


def test_weights_of_the_rest_that_do_not_fit_are_transformers_own_error(tmp_path: Path) -> None:
    swapped("gpt2", "rope").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.ln_f.weight"] = torch.zeros(3)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes") as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize("kept", [0, 5, 300, 20_000])
def test_a_truncated_file(kept: int, tmp_path: Path) -> None:
    swapped("gpt2", "t5").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"weights in '.*' cannot be read: .*A file is damaged or was cut short"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    model = swapped("gpt2", "t5")
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="use_safetensors is False, but swapped models are saved as safetensors only"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)


def test_a_length_beyond_the_schemes_end_is_refused(tmp_path: Path) -> None:
    swapped("gpt2", "learned").save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, n_positions=48).config.n_positions == 48
    with pytest.raises(CheckpointError) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path, n_positions=65)
    for fact in ("max_position_embeddings is given as 65", "end at 64", "learned with max_length=65"):
        assert fact in str(caught.value)


@pytest.mark.parametrize(("family", "is_decoder"), [("bert", True), ("bert-decoder", False)])
def test_a_model_swapped_as_the_other_kind_is_refused(family: str, is_decoder: bool, tmp_path: Path) -> None:
    swapped(family, "t5").save_pretrained(tmp_path)
    was, built = ("a decoder (causal attention)", "an encoder (two-sided attention)")[:: -1 if is_decoder else 1]
    with pytest.raises(CheckpointError) as caught:
        AutoModelForMaskedLM.from_pretrained(tmp_path, is_decoder=is_decoder)
    assert str(caught.value) == (
        f"This model was swapped as {was} and is being built as {built}, where its positional weights would mean something else. Load it "
        "as it was saved; or build the other kind from the unswapped model, and swap that."
    )


def test_a_loaded_model_swaps_on_and_its_limits_follow(tmp_path: Path) -> None:
    swapped("gpt2", "learned").save_pretrained(tmp_path / "a")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert loaded.config.n_positions == loaded.config.max_position_embeddings == 64
    pe_swap.swap_positional(loaded, "rope").save_pretrained(tmp_path / "b")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert again.config.n_positions == 2**20
    assert holder_of(again).max_length is None
    assert_same(loaded, again, token_ids(1, 90))


@pytest.mark.parametrize(
    "family", [name for name in ("llama", "gemma3_text", "modernbert", "dinov3_vit", "lfm2") if name in FAMILIES]
)
def test_a_loaded_rotary_model_swaps_on_and_back_to_its_own_rotation(family: str, tmp_path: Path) -> None:
    """A load leaves the model's own rotation without numbers, where no layer of the loaded model has it."""
    ids = token_ids(2, 9)
    expected = outputs(tiny(family), ids)
    pe_swap.swap_positional(tiny(family), "none").save_pretrained(tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path).eval()
    for scheme in ("rope", "hope", "rope"):
        found = outputs(pe_swap.swap_positional(loaded, scheme), ids)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("part", [None, "encoder", "decoder"])
def test_an_encoder_alone_comes_from_the_folder_of_the_whole(part: str | None, tmp_path: Path) -> None:
    """As transformers loads T5's; the decoder's scheme and its weights stay in the file."""
    model = pe_swap.swap_positional(tiny("t5"), "kerple", part=part)
    disturb(model)
    ids = token_ids(2, 12)
    with torch.no_grad():
        expected = model.encoder(ids).last_hidden_state
        for folder in ("whole", "encoder"):
            model.save_pretrained(tmp_path / folder)
            model = AutoModelForTextEncoding.from_pretrained(tmp_path / folder).eval()
            assert torch.equal(model(ids).last_hidden_state, expected)
