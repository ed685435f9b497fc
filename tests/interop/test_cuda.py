"""A GPU: every scheme computes there what it computes on a CPU, and all that transformers does there alone works.

Skipped where there is none. The other tests run on a CPU wherever they are, so this file is what shows that the code runs on CUDA.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import pe_swap
from pe_swap.commands.evaluate import evaluate
from pe_swap.commands.finetune import finetune
from pe_swap.evaluation.evaluator import Evaluator
from pe_swap.families import FAMILIES
from pe_swap.patching.layer_cache import CACHE_ARGUMENTS, parameters_of
from pe_swap.runs.config import EvalConfig
from pe_swap.runs.records import read_record
from tests.support.covering import COVERING, covering, read, ways_in
from tests.support.families import PAD, auto_class, difference, looks_back_only, outputs, tiny, token_ids
from tests.support.finetuning import config as finetune_config
from tests.support.models import CASES, LENGTH_DEPENDENT, disturb, left_padded
from tests.support.models import swapped_tiny as swapped

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:The scheme 'none' on an encoder"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers' own call
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # PyTorch's own advice, where it compiles
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # PyTorch's own, where it compiles
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # PyTorch's own import
]

GPU = torch.device("cuda")
ROUNDING = 2e-5
"""Largest difference over the largest value: float32 on two devices, whose kernels add in other orders."""

FAMILIES_HERE = ("gpt2", "llama", "gemma3_text", "gpt_neox", "bert", "t5", "bloom")
"""A table, a rotation, windows with two of them, part of a head, both ways, two stacks, attention written by hand."""


def pairs(cases: list[str]) -> list[tuple[str, str]]:
    """Return cases in every family here that can have them, as `(family, case)`."""
    one_way = [case for case in CASES if pe_swap.schemes.SCHEMES[CASES[case][0]].causal_only]
    return [(family, case) for family in FAMILIES_HERE for case in cases if looks_back_only(family) or case not in one_way]


def is_its_own(family: str, case: str) -> bool:
    """Tell whether a case is what the family has by itself, so that a swap to it changes nothing."""
    return (family, case) == ("bloom", "alibi") or (case == "rope" and FAMILIES[family].stacks[0].native.kind == "rotary")


CACHED = [case for case in COVERING if case not in LENGTH_DEPENDENT]
"""The covering cases that give with a cache what they give without."""


def on_gpu(model: PreTrainedModel, ids: Tensor, **kwargs: Any) -> Tensor:
    """Return what a model on the GPU gives for rows of tokens, on the CPU; the rows go there."""
    found = outputs(model, ids.to(GPU), **kwargs)
    assert found.device.type == "cuda"
    return found.cpu()


@functools.cache
def rounding(family: str) -> float:
    """Return what counts as rounding in a family: ten times what an unswapped model differs by, on either device and backend."""
    model, ids = tiny(family), token_ids(2, 20)
    expected, found = outputs(model, ids), [on_gpu(model.to(GPU), ids)]
    if model._supports_sdpa:
        model.set_attn_implementation("eager")
        found.append(on_gpu(model, ids))
    return max(ROUNDING, 10 * max(difference(each, expected) for each in found))


def gradients(model: PreTrainedModel, ids: Tensor) -> dict[str, Tensor]:
    """Return the gradients of a training step by the parameters' names, on the CPU."""
    model.zero_grad(set_to_none=True)
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    model(ids, **more).logits.float().square().mean().backward()
    return {name: weight.grad.detach().cpu().clone() for name, weight in model.named_parameters() if weight.grad is not None}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of gradients over the largest of all gradients."""
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    return max(float((found[name] - gradient).abs().max()) for name, gradient in expected.items()) / largest


@functools.cache
def unswapped_gradients_apart(family: str) -> float:
    """Return by how much the gradients of an unswapped model differ on the two devices."""
    model, ids = tiny(family).train(), token_ids(2, 20)
    expected = gradients(model, ids)
    return apart(gradients(model.to(GPU), ids.to(GPU)), expected)


@pytest.mark.parametrize(("family", "case"), pairs(list(CASES)))
def test_logits_are_those_of_the_cpu_and_a_restore_is_exact(family: str, case: str) -> None:
    model, ids = swapped(family, case), token_ids(2, 20)
    expected, own = outputs(model, ids), on_gpu(tiny(family).to(GPU), ids)
    model.to(GPU)
    found = on_gpu(model, ids)
    assert difference(found, expected) <= rounding(family)
    assert difference(found, own) > 100 * ROUNDING or is_its_own(family, case), "the swap did nothing"
    if model._supports_sdpa:
        model.set_attn_implementation("eager")
        assert difference(on_gpu(model, ids), expected) <= rounding(family), "eager"
        model.set_attn_implementation("sdpa")
    assert torch.equal(on_gpu(pe_swap.restore_positional(model), ids), own)


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_is_on_the_gpu_is_swapped_there(case: str) -> None:
    name, options = CASES[case]
    models = [pe_swap.swap_positional(tiny("gpt2").to(device), name, **options) for device in ("cpu", GPU)]
    assert {weight.device.type for weight in models[1].parameters()} == {"cuda"}
    ids = token_ids(2, 20)
    first = {key: value.cpu() for key, value in models[1].state_dict().items()}
    others = {key for key, value in models[0].state_dict().items() if not torch.allclose(first[key], value, atol=1e-6)}
    drawn = {f"transformer.wpe.schemes.0.{name}" for name in ("table", "position_weight")} if case == "concat-learned" else set()
    assert others <= drawn, "a GPU draws other random numbers; all else is the same"
    models[1].load_state_dict(models[0].state_dict())
    assert difference(on_gpu(models[1], ids), outputs(models[0], ids)) <= ROUNDING


@pytest.mark.parametrize(("family", "case"), pairs(COVERING))
def test_gradients_are_those_of_the_cpu(family: str, case: str) -> None:
    model, ids = swapped(family, case).train(), token_ids(2, 20)
    expected = gradients(model, ids)
    found = gradients(model.to(GPU), ids.to(GPU))
    assert apart(found, expected) <= max(5 * ROUNDING, 10 * unswapped_gradients_apart(family))


@pytest.mark.parametrize(("family", "case"), [(family, case) for family, case in pairs(CACHED) if looks_back_only(family)])
def test_chunks_with_a_cache_are_one_pass(family: str, case: str) -> None:
    model, ids = swapped(family, case).to(GPU), token_ids(2, 20)
    name = next(name for name in CACHE_ARGUMENTS if name in parameters_of(model))
    cache = DynamicCache(config=model.config)
    found = [on_gpu(model, part, use_cache=True, **{name: cache}) for part in ids.split((9, 6, 1, 4), dim=1)]
    assert difference(torch.cat(found, dim=1), on_gpu(model, ids)) <= rounding(family)


WAYS = [
    {},
    {"num_beams": 3},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "static"},  # transformers compiles the steps by itself, on a GPU alone
]


GENERATED = [
    (case, how)
    for case in dict.fromkeys([*covering(of=ways_in), "alibi", "rope-yarn"])
    for how in WAYS
    if case not in LENGTH_DEPENDENT and not (case.startswith("fox") and how.get("cache_implementation") == "static")
]
"""The keys of fox are wider than a static cache of the model's own sizes."""


@pytest.mark.parametrize(
    ("case", "how"), GENERATED, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part.values())) or "greedy"
)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_generation_from_left_padding_with_every_cache_is_generation_without(family: str, case: str, how: dict[str, Any]) -> None:
    model, rows = swapped(family, case).to(GPU), token_ids(2, 9)
    ids, mask = (x.to(GPU) for x in left_padded([rows[:1, 4:], rows[1:]]))
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": PAD}
    beams = {name: value for name, value in how.items() if name == "num_beams"}
    torch._dynamo.reset()
    expected = model.generate(ids, use_cache=False, **beams, **settings)
    assert torch.equal(model.generate(ids, **how, **settings), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "case"), [pair for pair in pairs(COVERING) if pair[0] in ("gpt2", "llama", "bert")])
def test_a_narrow_model_and_mixed_precision_are_as_close_as_on_a_cpu(family: str, case: str, dtype: torch.dtype) -> None:
    """Half as much again is allowed: roundings are other draws."""
    model, ids = swapped(family, case), token_ids(2, 300)
    if model.config.max_position_embeddings < 300 and case.startswith(("learned", "concat-learned")):
        ids = ids[:, :30]
    wide = outputs(model, ids)

    def error(found: Tensor) -> float:
        return float((found.float() - wide).norm() / wide.norm())

    on_cpu = error(outputs(copy.deepcopy(model).to(dtype), ids))
    model.to(GPU)
    with torch.autocast("cuda", dtype=dtype):
        mixed = error(on_gpu(model, ids))
    narrow = error(on_gpu(model.to(dtype), ids))
    assert mixed <= 1.5 * on_cpu
    assert narrow <= 1.5 * on_cpu


@pytest.mark.parametrize("case", covering(of=read))
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_compiled_training_step_gives_the_same_gradients(family: str, case: str) -> None:
    model, ids = swapped(family, case).to(GPU).train(), token_ids(2, 20).to(GPU)
    expected = gradients(model, ids)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True)
    found = gradients(model, ids)
    assert apart(found, expected) <= 5 * ROUNDING


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
@pytest.mark.parametrize(
    ("family", "case"), [("llama", "alibi"), ("llama", "alibi-trained"), ("llama", "t5"), ("llama", "rope"), ("bert", "t5")]
)
def test_flex_attention_compiled_is_sdpa_with_its_gradients(family: str, case: str) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4} | ({"num_key_value_heads": 2} if family == "llama" else {})
    model = pe_swap.swap_positional(tiny(family, **sizes), CASES[case][0], **CASES[case][1])
    disturb(model)
    model.to(GPU).train()
    ids = token_ids(2, 140).to(GPU)
    mask = torch.ones_like(ids)
    mask[0, 120:] = 0
    kept = mask.bool()

    def step(backend: str) -> tuple[Tensor, dict[str, Tensor]]:
        model.set_attn_implementation(backend)
        model.zero_grad(set_to_none=True)
        logits = model(ids, attention_mask=mask).logits[kept]
        logits.square().mean().backward()
        return logits.detach(), {
            name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None
        }

    expected, expected_gradients = step("sdpa")
    torch._dynamo.reset()
    found, found_gradients = step("flex_attention")
    assert difference(found, expected) <= ROUNDING
    assert apart(found_gradients, expected_gradients) <= 5 * ROUNDING


@pytest.mark.parametrize("device_map", ["cuda", "auto"])
@pytest.mark.parametrize(
    ("family", "case"), [("gpt2", "learned"), ("gpt2", "shaw-all"), ("llama", "t5"), ("llama", "rope-yarn"), ("llama", "fox")]
)
def test_a_folder_is_loaded_onto_the_gpu(family: str, case: str, device_map: str, tmp_path: Path) -> None:
    model, ids = swapped(family, case), token_ids(2, 20)
    model.save_pretrained(tmp_path)
    loaded = auto_class(family).from_pretrained(tmp_path, device_map=device_map).eval()
    assert all(torch.equal(value.cpu(), model.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert difference(on_gpu(loaded, ids), on_gpu(model.to(GPU), ids)) <= ROUNDING


@pytest.mark.parametrize(
    ("family", "case"),
    [("gpt2", "learned"), ("gpt2", "rope"), ("gpt2", "shaw-all"), ("llama", "t5"), ("llama", "rope"), ("llama", "fox")],
)
def test_layers_that_wait_on_the_cpu_give_the_same(family: str, case: str, tmp_path: Path) -> None:
    """The weights of a layer are moved to the GPU while it computes, and the holder's with them."""
    model, ids = swapped(family, case), token_ids(2, 20)
    model.save_pretrained(tmp_path)
    layers = {"gpt2": "transformer.h", "llama": "model.layers"}[family]
    names = {"gpt2": ["transformer.wte", "transformer.wpe", "transformer.drop", "transformer.ln_f", "lm_head"],
             "llama": ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]}[family]  # fmt: skip
    holder = {"gpt2": "transformer", "llama": "model"}[family]
    held = [f"{holder}.{name}" for name, _ in getattr(model, holder).named_children() if "positional" in name]
    placed = {**dict.fromkeys([*names, *held], 0), f"{layers}.0": 0, f"{layers}.1": "cpu", f"{layers}.2": "cpu"}
    loaded = auto_class(family).from_pretrained(tmp_path, device_map=placed).eval()
    assert any(weight.is_meta for weight in loaded.parameters())
    assert difference(outputs(loaded, ids.to(GPU)).cpu(), outputs(model, ids)) <= ROUNDING


@pytest.mark.parametrize("case", COVERING)
def test_every_claim_is_checked_there(case: str) -> None:
    report = pe_swap.check_positional(swapped("gpt2", case).to(GPU))
    assert report.passed, str(report)


def test_a_training_and_an_evaluation_take_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, devices = finetune_config(tmp_path), set()
    measured = Evaluator.measured

    def on_device(self: Evaluator, model: PreTrainedModel, *args: Any) -> Any:
        devices.add(model.device.type)
        return measured(self, model, *args)

    monkeypatch.setattr(Evaluator, "measured", on_device)
    finetune(config)
    assert devices == {"cuda"}, "perplexity before the training too"
    record = read_record(tmp_path / "run") or {}
    assert record["device"] == torch.cuda.get_device_name()
    models, text = (
        [str(tmp_path / "run")],
        {"text_files": [str(tmp_path / "a.txt")], "eval_text_files": [str(tmp_path / "b.txt")]},
    )
    evaluate(
        EvalConfig(models=models, data=text, lengths=[16, 32], protocols=["nonoverlapping", "sliding"], out=str(tmp_path / "out"))
    )
    rows = (read_record(tmp_path / "out") or {})["results"]
    assert all(row["perplexity"] and row["perplexity"] < 1000 for row in rows)


@pytest.mark.parametrize("match", ["attention", "hidden", "logits"])
def test_matching_the_unswapped_model_trains_there(match: str, tmp_path: Path) -> None:
    trained = finetune_config(tmp_path, scheme={"name": "original"}, out=str(tmp_path / "trained"))
    finetune(trained)
    steps = {**trained.train.model_dump(), "transition": {"match": match, "match_share": 0.5}}
    finetune(finetune_config(tmp_path, model=trained.out, vocab_size=None, train=steps))
    assert (read_record(tmp_path / "run") or {})["status"] == "done"


def test_the_script_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    code = (
        "import torch, pe_swap; from tests.support.models import swapped_tiny\n"
        "torch.set_default_device('cuda'); model = swapped_tiny('llama', 'alibi')\n"
        "print(model(torch.arange(5, 25)[None]).logits.device)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "cuda:0", done.stderr
