"""`scripts/benchmark.py`: what a scheme costs in time and memory.

Times are ratios of paired runs: the model and its reference run in turn, the order swapped each time, in one process and on the same
weights, so that what slows the machine slows both. Each memory figure comes from a process of its own: on a CPU what the process held,
on a GPU what torch held there.

In a family of images, sizes are resolutions in pixels. The model is built for that resolution, so that the unswapped one adds its table as
it is.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]  # its stubs are a package of their own
from transformers import AutoConfig, AutoModel, DynamicCache, PreTrainedModel

from pe_swap.commands.benchmark_report import BenchmarkRow, benchmark_plot, benchmark_table
from pe_swap.errors import ConfigError
from pe_swap.evaluation.plots import png
from pe_swap.families import FAMILIES
from pe_swap.patching.layer_cache import cache_argument
from pe_swap.runs.config import BenchmarkConfig, Task, resolved
from pe_swap.runs.files import write_whole
from pe_swap.runs.records import Stopwatch, environment, write_record
from pe_swap.schemes import SCHEMES
from pe_swap.swap import swap_positional

ORIGINAL = "original"

PEERS = {"bloom": "alibi", "mpt": "alibi", "gpt_neox": "rope", "t5": "t5"}
"""Families of transformers with a scheme built in, and the scheme."""

DECODED = 24
"""Tokens timed together in decoding: one alone is too short to time."""

RETURNED_BYTES = 65536
"""Where memory is measured, what a freed tensor of this size or more took goes back to the system at once."""

Run = Callable[[], object]


def benchmark(config: BenchmarkConfig) -> dict[str, Any]:
    """Measure everything and write record, table and plot; return the record, which is also written after every row.

    Raises:
        ConfigError: options of a scheme that is not measured, lengths for memory on a system without peak figures, or a GPU that is
            not there.
        UnsupportedModelError: a scheme that the family cannot have.
        UnknownNameError: no scheme or family has that name.
    """
    watch, out, device = Stopwatch(), Path(config.out), device_of(config)
    torch.set_num_threads(config.threads)
    causal = is_causal(config)
    of_images = FAMILIES[config.family].takes_images
    known = [name for name in SCHEMES.names() if SCHEMES[name].on_a_grid or not of_images]
    schemes = config.schemes or [name for name in known if causal or not SCHEMES[name].causal_only]
    for name in (*schemes, *config.options):
        SCHEMES[name]
    if unused := [name for name in config.options if name not in schemes]:
        raise ConfigError(
            f"options names {', '.join(unused)}, but schemes does not; options are of a scheme that is measured. Add it."
        )
    require_whole_patches(config)
    rows: list[BenchmarkRow] = []
    record = {
        "kind": "benchmark",
        "unit": "pixels" if of_images else "tokens",
        "status": "running",
        "config": resolved(config),
        **environment(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "processor": processor(),
        "results": rows,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The scheme 'none' on an encoder")
        for row in all_rows(config, schemes):
            rows.append(row)
            write_record(out, {**record, "seconds": watch.seconds})
    record |= {"status": "done", "seconds": watch.seconds}
    write_record(out, record)
    table = benchmark_table(record)
    write_whole(out / "report.md", table)
    write_whole(out / "benchmark.png", png(benchmark_plot(rows, str(record["unit"]))))
    print(table)
    return record


def device_of(config: BenchmarkConfig) -> torch.device:
    """Return the device that models run on.

    Raises:
        ConfigError: a GPU is asked for, and torch finds none.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but torch finds no GPU. Use 'cpu', or a torch that is built for this machine's GPU.")
    return torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's architecture, as records name them: `x86_64 cpu`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine() + " cpu"


def require_whole_patches(config: BenchmarkConfig) -> None:
    """Refuse resolutions of which patches leave pixels over.

    Raises:
        ConfigError: there is one.
    """
    odd = [resolution for resolution in config.resolutions if resolution % config.patch_size]
    if odd and FAMILIES[config.family].takes_images:
        raise ConfigError(
            f"resolutions names {odd[0]} pixels, which patches of {config.patch_size} do not divide. Name multiples of it, or another "
            "patch_size."
        )


def is_causal(config: BenchmarkConfig) -> bool:
    """Tell whether the family's models look back only, so that they decode and peers can be set beside them."""
    return FAMILIES[config.family].is_causal(AutoConfig.for_model(config.family))


def all_rows(config: BenchmarkConfig, schemes: Sequence[str]) -> Iterator[BenchmarkRow]:
    """Yield the rows of every task, then those of the peers."""
    causal = is_causal(config)
    for task in config.tasks:
        if task == "memory":
            yield from memory_rows(config, schemes)
        elif task != "decode" or causal:
            yield from timed_rows(config, schemes, task)
    if config.peers and causal:
        yield from peer_rows(config)


def processor() -> str:
    """Return the processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def build(config: BenchmarkConfig, contestant: str, longest: int) -> PreTrainedModel:
    """Return a model without a head, on the device and in the dtype of `config`, dropout off.

    Args:
        config: the sizes, device and dtype.
        contestant: `original`, or a scheme.
        longest: positions that a model with a table gets, or the resolution, in pixels; a swapped one starts from the same.
    """
    torch.manual_seed(0)
    model = _unswapped(config, config.family, longest)
    if contestant != ORIGINAL:
        swap_positional(model, contestant, **config.options.get(contestant, {}))
    return model.eval().to(device_of(config))


def _unswapped(config: BenchmarkConfig, model_type: str, longest: int) -> PreTrainedModel:
    """Return a new model of any family of transformers, in the dtype of `config`, on the CPU."""
    shape = AutoConfig.for_model(model_type, **sizes(config, model_type, longest))
    model: PreTrainedModel = AutoModel.from_config(shape, dtype=getattr(torch, config.dtype))
    return model


def build_pair(config: BenchmarkConfig, scheme: str, longest: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Return a swapped model and the unswapped one, whose weights are the same numbers at the same place in memory.

    A token decoded reads every weight from memory, at a speed that differs by several percent between two copies of them.
    """
    swapped, unswapped = build(config, scheme, longest), build(config, ORIGINAL, longest)
    shared = dict(unswapped.named_parameters())
    for name, parameter in swapped.named_parameters():
        if name in shared and shared[name].shape == parameter.shape:
            parameter.data = shared[name].data
    return swapped, unswapped


def label(config: BenchmarkConfig, scheme: str) -> str:
    """Return a scheme's name in tables, with the options that are not its defaults."""
    options = config.options.get(scheme, {})
    return f"{scheme} ({', '.join(f'{name}={value}' for name, value in options.items())})" if options else scheme


FEED_FORWARD = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim")
"""Names of the width between the two dense layers of a block; transformers has no common one."""

MOST_POSITIONS = ("max_position_embeddings", "max_seq_len")


def sizes(config: BenchmarkConfig, model_type: str, longest: int) -> dict[str, Any]:
    """Return the arguments of a configuration: one shape, under each family's names, every dropout 0.

    transformers' names (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, ...) become a family's own by its
    `attribute_map`; what a family does not have is left out.

    Args:
        config: the shape.
        model_type: the family, any of transformers.
        longest: positions; a table gets as many, and those rows before its first where ids count from the padding. Of images, the
            resolution, in pixels.
    """
    default = AutoConfig.for_model(model_type)
    heads, padding = config.heads, getattr(default, "pad_token_id", None) or 0
    wanted: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.key_value_heads or heads,
        "vocab_size": config.vocab_size,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "word_embed_proj_dim": config.hidden_size,
        "embedding_size": config.hidden_size,
        "image_size": longest,
        "patch_size": config.patch_size,
        **dict.fromkeys(("head_dim", "d_kv"), config.hidden_size // heads),
        **dict.fromkeys(FEED_FORWARD, 4 * config.hidden_size),
        **dict.fromkeys(MOST_POSITIONS, longest + (padding + 1 if padding else 0)),
    }
    names, fields = default.attribute_map, default.to_dict()
    if config.key_value_heads and config.key_value_heads != heads and "num_key_value_heads" not in fields:
        raise ConfigError(
            f"key_value_heads is {config.key_value_heads}, but models of the family '{model_type}' have as many key heads as query heads. "
            "Leave it out, or name a family with grouped heads."
        )
    if padding >= config.vocab_size:
        wanted["pad_token_id"] = 0
    found = {names.get(name, name): value for name, value in wanted.items() if names.get(name, name) in fields}
    dropouts = [name for name in fields if "dropout" in name or name.endswith("pdrop")]
    return {**found, **{name: 0.0 for name in dropouts if isinstance(getattr(default, name), float)}}


def _peer(config: BenchmarkConfig, model_type: str, longest: int) -> PreTrainedModel:
    """Return a model of another family; of an encoder-decoder its decoder alone, without cross-attention."""
    model = _unswapped(config, model_type, longest)
    return (model.decoder if model.config.is_encoder_decoder else model).eval().to(device_of(config))


def forward_run(model: PreTrainedModel, ids: Tensor) -> Run:
    """Return one forward pass without gradients."""
    given = _without_cache(model)

    def run() -> None:
        with torch.no_grad():
            model(ids, **given)

    return run


def train_run(model: PreTrainedModel, ids: Tensor) -> Run:
    """Return one training step without the optimizer: forward, loss over the tied vocabulary (of images on the states), backward."""

    def loss_of(hidden: Tensor) -> Tensor:
        if ids.is_floating_point():
            return hidden.square().mean()
        table: Tensor = model.get_input_embeddings().weight
        return F.cross_entropy((hidden @ table.T)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    given = _without_cache(model)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss_of(model(ids, **given).last_hidden_state))

    return run


def decode_run(model: PreTrainedModel, ids: Tensor) -> Run:
    """Return the decoding of `DECODED` tokens after `ids`; the cache is cut back each time."""
    cache = DynamicCache(config=model.config)
    cached = {cache_argument(model): cache, "use_cache": True}
    with torch.no_grad():
        for chunk in torch.split(ids, 1024, dim=1):
            model(chunk, **cached)

    def run() -> None:
        with torch.no_grad():
            for _ in range(DECODED):
                model(ids[:, :1], **cached)
        cache.crop(-DECODED)

    return run


def _without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the argument that turns the cache off, for models that have one."""
    return {"use_cache": False} if "use_cache" in inspect.signature(type(model).forward).parameters else {}


RUNS = {"forward": forward_run, "train": train_run, "decode": decode_run}


def timed_rows(config: BenchmarkConfig, schemes: Sequence[str], task: Task) -> Iterator[BenchmarkRow]:
    """Yield one row a scheme and length: its time over the unswapped model's."""
    lengths = config.train_lengths if task == "train" else config.lengths
    room = DECODED
    if FAMILIES[config.family].takes_images:
        lengths, room = config.resolutions, 0
    cases = [(length, name) for length in lengths for name in schemes]
    for length, name in tqdm(cases, desc=f"{config.family} {task}"):
        ids = inputs(config, length)
        runs = [RUNS[task](model, ids) for model in build_pair(config, name, length + room)]
        yield {"task": task, "model": label(config, name), "reference": ORIGINAL, "length": length, **ratio(config, *runs)}


def peer_rows(config: BenchmarkConfig) -> Iterator[BenchmarkRow]:
    """Yield one row a peer: its time over that of the unswapped family with the same scheme."""
    ids = token_ids(config, config.peer_length)
    for task in ("forward", "train"):
        if task not in config.tasks:
            continue
        for family, scheme in tqdm(PEERS.items(), desc=f"peers {task}"):
            peer = _peer(config, family, config.peer_length)
            ours = build(config, scheme, config.peer_length)
            found = ratio(config, RUNS[task](peer, ids), RUNS[task](ours, ids))
            reference = f"{config.family} with {label(config, scheme)}"
            yield {"task": task, "model": family, "reference": reference, "length": config.peer_length, **found}


def inputs(config: BenchmarkConfig, size: int) -> Tensor:
    """Return `size` random token ids, or random images of `size` by `size` pixels, `[images, 3, size, size]`, on the device."""
    if not FAMILIES[config.family].takes_images:
        return token_ids(config, size)
    images = torch.randn(config.images, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images.to(device_of(config), getattr(torch, config.dtype))


def token_ids(config: BenchmarkConfig, length: int) -> Tensor:
    """Return random token ids, `[1, length]`, on the device."""
    return torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(1)).to(device_of(config))


def ratio(config: BenchmarkConfig, run: Run, reference: Run) -> BenchmarkRow:
    """Return the median ratio of paired runs, its quartiles, and both median times in seconds."""
    device = device_of(config)
    run(), reference()  # the first calls allocate
    gc.collect()
    times: list[tuple[float, float]] = []
    watch = Stopwatch()
    while len(times) < config.pairs and (len(times) < 3 or watch.seconds < config.seconds):
        if len(times) % 2:
            second, first = timed(reference, device), timed(run, device)
        else:
            first, second = timed(run, device), timed(reference, device)
        times.append((first, second))
    ratios = sorted(first / second for first, second in times)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "ratio": quartiles[1],
        "low": quartiles[0],
        "high": quartiles[2],
        "pairs": len(times),
        "seconds": statistics.median(first for first, _ in times),
        "reference_seconds": statistics.median(second for _, second in times),
    }


def timed(run: Run, device: torch.device) -> float:
    """Return the seconds of one run, from an idle device to an idle device."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what was called: on a GPU a call returns before its work is done, on a CPU after."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def memory_rows(config: BenchmarkConfig, schemes: Sequence[str]) -> Iterator[BenchmarkRow]:
    """Yield one row a scheme and length: the peak of a forward pass over the unswapped model's, each in its own process."""
    lengths = config.resolutions if FAMILIES[config.family].takes_images else config.lengths
    gc.collect()
    torch.cuda.empty_cache()  # what this process keeps of a GPU for later, the others could not use
    for length in tqdm(lengths, desc=f"{config.family} memory"):
        peaks = {name: _in_a_process(peak_bytes, config.model_dump_json(), name, length) for name in (ORIGINAL, *schemes)}
        for name in schemes:
            yield {
                "task": "memory",
                "model": label(config, name),
                "reference": ORIGINAL,
                "length": length,
                "ratio": peaks[name] / peaks[ORIGINAL],
                "megabytes": peaks[name] / 2**20,
                "reference_megabytes": peaks[ORIGINAL] / 2**20,
            }


def _in_a_process(function: Callable[..., int], *arguments: object) -> int:
    """Return what `function` gives in a new process that hands freed memory back.

    Else glibc keeps freed tensors for later, or not, by what was freed before: one pass peaks at 0.84 to 1.09 of the very same another.
    """
    variable = "MALLOC_MMAP_THRESHOLD_"  # read when a process starts
    before = os.environ.get(variable)
    os.environ[variable] = str(RETURNED_BYTES)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


def peak_bytes(config_json: str, contestant: str, length: int) -> int:
    """Return the most memory this process has ever held, in bytes, after one forward pass: weights, activations and libraries.

    On a GPU it is the most that torch's allocator has given out there: weights, activations, and what libraries take through it, such as
    the workspace of cuBLAS. For a process that was just started, nothing was given out before.

    Raises:
        ConfigError: a system that does not tell.
    """
    config = BenchmarkConfig(**json.loads(config_json))
    device = device_of(config)
    if device.type == "cpu" and sys.platform != "linux":
        raise ConfigError(f"tasks names 'memory', whose peak is read as on Linux; this is {sys.platform}. Leave it out.")
    torch.set_num_threads(config.threads)
    warnings.simplefilter("ignore")
    forward_run(build(config, contestant, length), inputs(config, length))()
    if device.type == "cuda":
        wait_for(device)  # raises what went wrong there
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage's figure: on Linux a new process starts that one from its parent's peak.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024
