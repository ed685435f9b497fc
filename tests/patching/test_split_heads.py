"""Tensor parallelism: schemes that act on heads are refused, at the swap and after a load; others are right."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import pe_swap
from tests.support.families import tiny


@pytest.fixture
def two_processes() -> Iterator[None]:
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    distributed.destroy_process_group()


REFUSED = r"heads of layer \d are split over processes .* the scheme '{}' has a bias .* Load the model without tensor parallelism"


@pytest.mark.parametrize("scheme", ["alibi", "fox", "shaw"])
def test_schemes_that_act_on_heads_are_refused(scheme: str, two_processes: None, tmp_path: Path) -> None:
    pe_swap.swap_positional(tiny("llama", vocab_size=90), scheme).save_pretrained(tmp_path)
    with pytest.raises(pe_swap.errors.UnsupportedModelError, match=REFUSED.format(scheme)):
        AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=2))
    for name, names, dimension in (("q_proj", ("tp",), 0), ("o_proj", None, 1)):
        model = tiny("llama", vocab_size=90)
        projection = getattr(model.model.layers[1].self_attn, name)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=names)
        projection.weight = nn.Parameter(distribute_tensor(projection.weight.detach(), mesh, [Shard(dimension)]))
        with pytest.raises(pe_swap.errors.UnsupportedModelError, match=REFUSED.format(scheme)):
            pe_swap.swap_positional(model, scheme)
        assert not hasattr(model.config, "pe_swap")


def test_schemes_that_treat_heads_alike_are_taken(two_processes: None, tmp_path: Path) -> None:
    pe_swap.swap_positional(tiny("llama", vocab_size=90), "xpos").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, distributed_config=DistributedConfig(tp_size=2))
    assert isinstance(model.model.layers[0].self_attn.q_proj.weight, DTensor)
    pe_swap.swap_positional(model, "hope")


def test_heads_that_were_split_by_hand_are_refused_where_something_is_carried() -> None:
    model = pe_swap.swap_positional(tiny("llama", vocab_size=90), "fox")
    attention = model.model.layers[0].self_attn
    halves = {name: projection.weight.chunk(2)[0] for name, projection in attention.named_children() if name != "o_proj"}
    halves["o_proj"] = attention.o_proj.weight.chunk(2, dim=1)[0]
    for name, half in halves.items():
        getattr(attention, name).weight = nn.Parameter(half)
    with pytest.raises(
        pe_swap.errors.UnsupportedModelError, match=r"Layer 0 has 6 heads in this process.* carries numbers for 12"
    ):
        model(torch.arange(3, 9)[None])
