"""`torch.export` and ONNX: the exported program gives the model's own logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from tests.support.models import swapped, token_ids

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of the exporters' own making


class Logits(nn.Module):
    """A model as a function from token ids to logits, which is what exporters take."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.arguments = {"use_cache": False} if model.config.use_cache else {}

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.model(input_ids, **self.arguments).logits
        return logits


@pytest.mark.parametrize("case", ["rope", "alibi", "t5", "shaw-all", "sinusoidal", "fire"])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_torch_export_gives_the_same_logits(case: str, family: str) -> None:
    model, ids = Logits(swapped(family, case)).eval(), token_ids(2, 12)
    with torch.no_grad():
        program = torch.export.export(model, (ids,), strict=False)
        other = token_ids(2, 12, seed=5)
        assert torch.equal(program.module()(other), model(other))


def test_torch_export_with_gradients_of_a_trained_bias() -> None:
    """As PyTorch's pages call it, outside `no_grad`; the program trains the bias too."""
    model, ids = Logits(swapped("gpt2", "t5")).eval(), token_ids(2, 12)
    program = torch.export.export(model, (ids,), strict=False).module()
    found, expected = program(ids), model(ids)
    torch.testing.assert_close(found, expected)
    (name,) = (name for name, _ in model.named_parameters() if name.endswith("wpe.schemes.0.table"))
    gradients = [
        torch.autograd.grad(x.square().sum(), of.get_parameter(name))[0] for x, of in ((found, program), (expected, model))
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("case", "family", "lengths"), [("rope", "gpt2", (12, 40)), ("t5", "bert", (12,))])
def test_onnx_gives_the_same_logits(case: str, family: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Of any length where attention is the library's own; with a bias inside it, of the length of the example."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="no wheel for this Python")
    model = Logits(swapped(family, case)).eval()
    shapes = {"input_ids": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}} if len(lengths) > 1 else None
    with torch.no_grad():
        program = torch.onnx.export(model, (token_ids(2, 12),), dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    for length in lengths:
        ids = token_ids(2, length, seed=length)
        (found,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(ids), atol=1e-5, rtol=1e-4)
