"""Golden logits of transformers 4's relative BERTs, for `test_legacy.py`; run once, in an environment of its own.

    python -m venv old && old/bin/pip install "transformers==4.57.*" "torch==2.13.0"
    old/bin/python tests/saving/make_relative_key_golden.py

Weights are a formula of their names, so that only names, shapes and logits are kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).with_name("relative_key_golden.json")

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 13,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "pad_token_id": 0,
}

CASES: dict[str, dict[str, Any]] = {
    "key": {"head": "BertForMaskedLM", "position_embedding_type": "relative_key"},
    "key_query": {"head": "BertForMaskedLM", "position_embedding_type": "relative_key_query"},
    "decoder": {"head": "BertLMHeadModel", "position_embedding_type": "relative_key_query", "is_decoder": True},
    "classifier": {"head": "BertForSequenceClassification", "position_embedding_type": "relative_key", "num_labels": 4},
}


def weight(name: str, shape: list[int]) -> Tensor:
    """Return a weight as a formula of its name: float32, waves of unit size, large enough in matrices for positions to show."""
    numbers = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    phase = sum(place * ord(letter) for place, letter in enumerate(name, start=1)) % 1009
    waves = torch.sin(phase + numbers * (1.3 + phase / 1009) + 0.011 * numbers**2).reshape(shape)
    if name.endswith("LayerNorm.weight"):
        return (1 + 0.1 * waves).float()
    return (waves * (0.1 if len(shape) == 1 else 0.5)).float()


def inputs() -> dict[str, Tensor]:
    """Return token ids, `[2, 12]`, the second row padded on the right."""
    ids = (torch.arange(24).reshape(2, 12) * 7) % 12 + 1
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def main() -> None:
    """Write the golden file."""
    import transformers

    assert transformers.__version__.startswith("4.57."), transformers.__version__
    golden: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__, "cases": {}}
    for case, settings in CASES.items():
        settings = dict(settings)
        head = getattr(transformers, settings.pop("head"))
        model = head(transformers.BertConfig(**{**CONFIG, **settings})).eval()
        state = {name: weight(name, list(value.shape)) for name, value in model.state_dict().items()}
        for tied, source in (
            ("decoder.weight", "bert.embeddings.word_embeddings.weight"),
            ("decoder.bias", "cls.predictions.bias"),
        ):
            state |= {name: state[source] for name in state if name.endswith(tied)}
        model.load_state_dict(state)
        with torch.no_grad():
            logits = model(**inputs(), **({"use_cache": False} if settings.get("is_decoder") else {})).logits
        shapes = {
            name: list(value.shape) for name, value in state.items() if not name.endswith(("decoder.weight", "decoder.bias"))
        }
        golden["cases"][case] = {"shapes": shapes, "logits": [round(value, 7) for value in logits.flatten().tolist()]}
    GOLDEN.write_text(json.dumps(golden, indent=None) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
