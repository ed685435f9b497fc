"""The benchmark's bookkeeping, on models of a few numbers: no time is asserted."""

from __future__ import annotations

import itertools
import json
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel

from pe_swap.commands import benchmark as measuring
from pe_swap.commands.benchmark import benchmark, build, build_pair, memory_rows, sizes
from pe_swap.errors import ConfigError, UnknownNameError
from pe_swap.patching.install import holder_of
from pe_swap.runs.command_line import parse
from pe_swap.runs.config import BenchmarkConfig

TINY = {"layers": 1, "hidden_size": 24, "heads": 2, "vocab_size": 32, "pairs": 3, "seconds": 0.01, "threads": 1, "peer_length": 8}
TINY |= {"device": "cpu"}


@pytest.fixture(autouse=True)
def _threads_as_before() -> object:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_row_for_every_scheme_length_and_task(tmp_path: Path) -> None:
    config = BenchmarkConfig(
        **TINY,
        schemes=["rope", "t5"],
        tasks=["forward", "train", "decode"],
        lengths=[8, 16],
        train_lengths=[8],
        out=str(tmp_path),
    )
    benchmark(config)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "done"
    found = [(row["task"], row["model"], row["length"]) for row in record["results"] if row["reference"] == "original"]
    expected = [(task, name, length) for task in ("forward", "decode") for length in (8, 16) for name in ("rope", "t5")]
    assert sorted(found) == sorted([*expected, ("train", "rope", 8), ("train", "t5", 8)])
    peers = [(row["task"], row["model"]) for row in record["results"] if row["reference"] != "original"]
    assert sorted(peers) == sorted((task, peer) for task in ("forward", "train") for peer in measuring.PEERS)
    for row in record["results"]:
        assert row["pairs"] == 3
        assert row["low"] <= row["ratio"] <= row["high"]
    report = (tmp_path / "report.md").read_text()
    assert "| rope |" in report
    assert "| bloom" in report
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stops(config: BenchmarkConfig, schemes: object) -> object:
        yield {"task": "forward", "model": "rope", "reference": "original", "length": 8, "ratio": 1.0}
        raise KeyboardInterrupt

    monkeypatch.setattr(measuring, "all_rows", stops)
    with pytest.raises(KeyboardInterrupt):
        benchmark(BenchmarkConfig(**TINY, schemes=["rope"], out=str(tmp_path)))
    record = json.loads((tmp_path / "record.json").read_text())
    assert (record["status"], len(record["results"])) == ("running", 1)


def test_contestants_are_one_model_with_and_without_the_swap() -> None:
    config = BenchmarkConfig(**TINY)
    plain, swapped = (build(config, name, 16) for name in ("original", "rope"))
    assert holder_of(plain) is None
    assert holder_of(swapped).scheme_at(0).name == "rope"
    own = plain.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in swapped.state_dict().items() if not name.startswith("wpe."))


def test_a_pair_reads_the_same_weights_and_has_gradients_of_its_own() -> None:
    config = BenchmarkConfig(**TINY, family="llama")
    swapped, unswapped = build_pair(config, "t5", 16)
    weights = {name: parameter.data_ptr() for name, parameter in unswapped.named_parameters()}
    found = {name: parameter.data_ptr() for name, parameter in swapped.named_parameters()}
    assert {name for name in found if found[name] == weights.get(name)} == weights.keys() < found.keys()
    swapped(inputs_embeds=torch.ones(1, 4, 24)).last_hidden_state.sum().backward()
    assert all(parameter.grad is None for parameter in unswapped.parameters())
    assert swapped.get_input_embeddings().weight is not unswapped.get_input_embeddings().weight


def test_options_of_a_scheme(tmp_path: Path) -> None:
    given = {"lengths": [8], "tasks": ["forward"], "peers": False, "out": str(tmp_path)}
    config = parse(BenchmarkConfig, ["--options.alibi.trainable", "true", "--schemes", "alibi", "t5"], description="x")
    config = config.model_copy(update={**TINY, **given})
    assert holder_of(build(config, "alibi", 8)).scheme_at(0).options.trainable is True
    rows = benchmark(config)["results"]
    assert [row["model"] for row in rows] == ["alibi (trainable=True)", "t5"]
    assert "| alibi (trainable=True) |" in (tmp_path / "report.md").read_text()
    with pytest.raises(ConfigError, match=r"options names alibi, but schemes does not; .* Add it\."):
        benchmark(config.model_copy(update={"schemes": ["t5"]}))
    with pytest.raises(UnknownNameError, match="alibbi"):
        benchmark(config.model_copy(update={"options": {"alibbi": {}}}))


def test_a_peak_is_the_processs_own() -> None:
    """A process started by one that holds 1.6 GB has not held them."""
    held = torch.ones(400_000_000)
    (row,) = memory_rows(BenchmarkConfig(**TINY, lengths=[8], options={"alibi": {"trainable": True}}), ["alibi"])
    assert (row["task"], row["model"]) == ("memory", "alibi (trainable=True)")
    assert held.nbytes / 2**20 > 1500
    assert 50 < row["reference_megabytes"] < 1200
    assert 50 < row["megabytes"] < 1200


@pytest.mark.parametrize(
    "model_type", ["gpt2", "bert", "roberta", "distilbert", "electra", "llama", "opt", "bloom", "mpt", "gpt_neox", "t5", "falcon"]
)
def test_every_family_gets_the_same_shape_without_dropout(model_type: str) -> None:
    """By transformers' own names, so that a family nobody thought of has the sizes asked for, and takes the longest length."""
    found = AutoConfig.for_model(model_type, **sizes(BenchmarkConfig(**{**TINY, "layers": 3}), model_type, 40))
    assert (found.hidden_size, found.num_hidden_layers, found.num_attention_heads) == (24, 3, 2)
    model = AutoModel.from_config(found)
    model = model.decoder if found.is_encoder_decoder else model
    assert [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout) and module.p] == []
    with torch.no_grad():
        assert model(torch.full((1, 40), 5)).last_hidden_state.shape == (1, 40, 24)
    inner = {"n_inner", "intermediate_size", "ffn_dim", "d_ff", "hidden_dim"} & found.to_dict().keys()
    assert all(getattr(found, name) == 96 for name in inner)


def test_grouped_heads() -> None:
    config = BenchmarkConfig(**{**TINY, "heads": 4, "key_value_heads": 2})
    model = AutoModel.from_config(AutoConfig.for_model("llama", **sizes(config, "llama", 16)))
    assert model.layers[0].self_attn.k_proj.weight.shape == (2 * 6, 24)
    with pytest.raises(ConfigError, match="key_value_heads is 2, but models of the family 'gpt2' have as many key heads"):
        sizes(config, "gpt2", 16)


def test_an_encoder_is_not_decoded_and_has_no_peers(tmp_path: Path) -> None:
    tasks = ["forward", "train", "decode"]
    config = BenchmarkConfig(
        **TINY, family="bert", schemes=["rope"], tasks=tasks, lengths=[8], train_lengths=[8], out=str(tmp_path)
    )
    assert [row["task"] for row in benchmark(config)["results"]] == ["forward", "train"]


def test_a_scheme_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'rope'"):
        benchmark(BenchmarkConfig(**TINY, schemes=["rop"], out=str(tmp_path)))


def test_a_model_of_images_is_measured_by_resolution(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["forward", "train", "decode"]
    config = BenchmarkConfig(
        **TINY, family="vit", schemes=["rope"], tasks=tasks, resolutions=[8, 16], patch_size=4, images=2, out=str(tmp_path)
    )
    rows = benchmark(config)["results"]
    assert [(row["task"], row["length"]) for row in rows] == [("forward", 8), ("forward", 16), ("train", 8), ("train", 16)]
    assert "2 images; columns are heights and widths in pixels" in capsys.readouterr().out
    assert measuring.inputs(config, 16).shape == (2, 3, 16, 16)
    unswapped = build(config, measuring.ORIGINAL, 16)
    assert unswapped.embeddings.position_embeddings.shape == (1, 17, 24), "the table is the resolution's own"
    with pytest.raises(ConfigError, match=r"resolutions names 10 pixels, which patches of 4 do not divide\. Name multiples"):
        benchmark(config.model_copy(update={"resolutions": [10]}))


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_every_task_runs_in_bfloat16_where_there_is_a_gpu_on_it(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_in_a_process", lambda function, *arguments: function(*arguments))
    lengths = {"lengths": [8], "train_lengths": [8], "resolutions": [8], "patch_size": 4}
    given = TINY | lengths | {"family": family, "device": "auto", "dtype": "bfloat16", "schemes": ["rope"], "out": str(tmp_path)}
    config = BenchmarkConfig(**given)
    model, device = build(config, "rope", 8), measuring.device_of(config)
    found = {(tensor.device.type, tensor.dtype) for tensor in model.parameters()}
    assert found == {(device.type, torch.bfloat16)}
    record = benchmark(config)
    tasks = [row["task"] for row in record["results"] if row["reference"] == "original"]
    assert tasks == ["forward", "train", *(["decode"] if family == "gpt2" else []), "memory"]
    assert record["config"]["dtype"] == "bfloat16"
    assert f"bfloat16 on {record['device']}, " in (tmp_path / "report.md").read_text()


def test_images_are_the_same_in_every_precision() -> None:
    images = {
        dtype: measuring.inputs(BenchmarkConfig(**TINY, family="vit", dtype=dtype), 8)
        for dtype in ("float32", "bfloat16", "float16")
    }
    for dtype, found in images.items():
        assert torch.equal(found, images["float32"].to(getattr(torch, dtype)))


def test_a_gpu_that_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = BenchmarkConfig(**TINY | {"device": "cuda", "out": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"device is 'cuda', but torch finds no GPU\. Use 'cpu'"):
        benchmark(config)
    assert list(tmp_path.iterdir()) == []
    assert measuring.device_of(config.model_copy(update={"device": "auto"})) == torch.device("cpu")


def test_auto_is_the_gpu_and_cpu_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {name: measuring.device_of(BenchmarkConfig(**TINY | {"device": name})).type for name in ("auto", "cuda", "cpu")}
    assert found == {"auto": "cuda", "cuda": "cuda", "cpu": "cpu"}


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_names_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = measuring.environment()
    monkeypatch.setattr(measuring, "environment", lambda: {**there, "device": "NVIDIA H100 80GB HBM3"})
    config = BenchmarkConfig(**TINY, schemes=["rope"], tasks=["forward"], lengths=[8], peers=False, out=str(tmp_path))
    assert benchmark(config)["device"] == f"{platform.machine()} cpu"
    assert f"float32 on {platform.machine()} cpu, batch 1" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_clock_is_read_when_a_gpu_is_idle(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work is waited for before either reading, so that no run's time holds another's work or misses its own."""
    events: list[str] = []
    clock = itertools.count()

    def perf_counter() -> float:
        events.append("clock")
        return float(next(clock))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append("wait"))
    monkeypatch.setattr(measuring, "time", SimpleNamespace(perf_counter=perf_counter))
    config = BenchmarkConfig(**TINY | {"device": device})
    found = measuring.ratio(config, lambda: events.append("run"), lambda: events.append("reference"))
    assert found["pairs"] == 3
    wait = ["wait"] if device == "cuda" else []
    order = ["run", "reference", "reference", "run", "run", "reference"]
    assert events == ["run", "reference", *(event for name in order for event in (*wait, "clock", name, *wait, "clock"))]
