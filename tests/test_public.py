"""What `import pe_swap` gives: every scheme by name, with its options class, without a list that someone has to keep."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest
from peft import LoraConfig, get_peft_model

import pe_swap
from pe_swap.schemes import SCHEMES
from tests.support.composites import tiny_composite
from tests.support.models import swapped


@pytest.mark.parametrize("name", SCHEMES.names())
def test_every_scheme_s_options_are_found_at_the_top(name: str) -> None:
    options = SCHEMES[name].Options
    assert getattr(pe_swap, options.__name__) is options
    assert options.__name__ in dir(pe_swap)
    assert issubclass(options, pe_swap.SchemeOptions)
    assert issubclass(SCHEMES[name], pe_swap.Scheme)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'pe_swap' has no attribute 'AlibiOption'"):
        _ = pe_swap.AlibiOption


def test_schemes_are_listed_with_one_line_each() -> None:
    described = pe_swap.list_schemes(with_description=True)
    assert list(described) == pe_swap.list_schemes() == SCHEMES.names()
    assert described["alibi"] == SCHEMES["alibi"].summary
    assert all(described.values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's own call
def test_positional_parameters_are_found_in_a_model_of_models_and_in_a_wrapper_of_peft() -> None:
    model = swapped("gpt2", "t5")
    brought = dict(pe_swap.positional_parameters(model))
    assert brought
    assert all(name.startswith("transformer.wpe.") for name in brought)
    wrapped = get_peft_model(model, LoraConfig(r=2, task_type="CAUSAL_LM", fan_in_fan_out=True, modules_to_save=["wpe"]))
    found = dict(pe_swap.positional_parameters(wrapped))
    trained = [name for name, parameter in found.items() if parameter.requires_grad]
    assert len(trained) == len(brought) == len(found) / 2
    assert all("wpe.modules_to_save" in name for name in trained)

    composite = tiny_composite("llava")
    assert pe_swap.positional_parameters(composite) == []
    pe_swap.swap_positional(composite, "t5")
    assert [name for name, _ in pe_swap.positional_parameters(composite)]
    pe_swap.restore_positional(composite)
    assert pe_swap.positional_parameters(composite) == []


def test_the_version_is_the_installed_one() -> None:
    assert pe_swap.__version__ == version("pe-swap")


def test_an_import_loads_no_model_of_transformers() -> None:
    program = (
        "import sys, pe_swap;"
        "print([name for name in sys.modules if name.startswith('transformers.models.') and '.modeling_' in name])"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "['transformers.models.auto.modeling_auto']"  # names of classes, and no model
