"""Configurations: typed, unknown keys refused, the issue's command lines as written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pe_swap.errors import ConfigError
from pe_swap.runs.command_line import parse, run
from pe_swap.runs.config import CompareConfig, DataSection, EvalConfig, FinetuneConfig, Section, build, resolved


def finetune(*arguments: str) -> FinetuneConfig:
    return parse(FinetuneConfig, arguments, description="")


def test_the_finetune_command_line_of_the_readme() -> None:
    line = (
        "--config configs/gpt2_rope.yaml --model gpt2 --scheme.name rope --scheme.base 20000 --data.text_files a.txt b.txt "
        "--train.max_steps 200 --out runs/gpt2-rope"
    )
    config = finetune(*line.replace("configs/", f"{Path(__file__).parents[2]}/configs/").split())
    assert (config.model, config.scheme.name, config.scheme.options) == ("gpt2", "rope", {"base": 20000})
    assert (config.data.text_files, config.train.max_steps, config.out) == (["a.txt", "b.txt"], 200, "runs/gpt2-rope")
    assert config.data.dataset is None  # the file's source gives way
    assert config.train.gradient_accumulation_steps == 4  # from the file


def test_the_evaluation_command_line_of_the_readme() -> None:
    line = (
        "--models runs/gpt2-rope runs/gpt2-control --lengths 512 1024 2048 --protocols nonoverlapping sliding same_targets "
        "--data.text_files c.txt --out runs/eval"
    )
    config = parse(EvalConfig, line.split(), description="")
    assert config.models == ["runs/gpt2-rope", "runs/gpt2-control"]
    assert config.lengths == [512, 1024, 2048]
    assert config.protocols == ["nonoverlapping", "sliding", "same_targets"]
    assert config.data.text_files == ["c.txt"]


def test_one_value_for_a_list_is_a_list() -> None:
    assert finetune("--data.text_files", "a.txt").data.text_files == ["a.txt"]


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("0.5", 0.5), ("half", "half"), ("true", True), ("7", 7)])
def test_values_are_read_as_people_write_them(text: str, value: object) -> None:
    assert finetune("--scheme.some_option", text).scheme.options == {"some_option": value}


def test_another_scheme_on_the_command_line_drops_the_options_of_the_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("scheme: {name: rope, base: 500}\ntrain: {max_steps: 3}\n")
    assert finetune("--config", str(path), "--scheme.name", "original").scheme.options == {}
    assert finetune("--config", str(path), "--scheme.name", "rope").scheme.options == {"base": 500}
    assert finetune("--config", str(path), "--scheme.name", "t5", "--scheme.num_buckets", "8").scheme.options == {
        "num_buckets": 8
    }


def test_resume_is_a_switch() -> None:
    assert finetune("--resume").resume
    assert not finetune().resume


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.max_step", "3"], r"Unknown key 'train\.max_step'\. Did you mean 'max_steps'\?"),
        (["--modle", "x"], r"Unknown key 'modle'\. Did you mean 'model'\?"),
        (
            ["--train.max_steps", "-1"],
            r"'train\.max_steps' is -1: .*greater than or equal to 0.*Correct it in the YAML file or as --train\.max_steps",
        ),
        (["--train.learning_rate", "fast"], r"'train\.learning_rate' is 'fast'"),
        (["stray"], r"Unexpected argument 'stray'"),
        (["--config", "nowhere.yaml"], r"Cannot read the configuration 'nowhere\.yaml'.*Give the path"),
    ],
)
def test_errors_name_the_key_the_value_and_the_way_out(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(*arguments)


@pytest.mark.parametrize("length", ["0", "-5", "12.5", "long"])
def test_lengths_must_be_positive_integers(length: str) -> None:
    with pytest.raises(ConfigError, match=r"'lengths\.1' is .*Correct it in the YAML file or as --lengths"):
        parse(EvalConfig, ["--models", "x", "--lengths", "512", length], description="")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {max_stepps: 3}", r"Unknown key 'train\.max_stepps'\. Did you mean 'max_steps'\?"),
        ("- a\n- b", "holds list, where a mapping"),
        ("a: [", r"is not YAML that can be read: line 1, column \d+: "),
        ("seed: 1\ntrain: {max_steps: 2}\nseed: 3", r"line 3, column 1: the key 'seed' is given twice"),
        ("train: {max_steps: 2}\ntrain: {batch_size: 3}", r"line 2, column 1: the key 'train' is given twice"),
        ("train:\n  max_steps: 2\n  max_steps: 200", r"line 3, column 3: the key 'max_steps' is given twice"),
    ],
)
def test_bad_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        finetune("--config", str(path))


def test_a_missing_key_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'models' is missing.*--models"):
        parse(EvalConfig, [], description="")


def test_a_resolved_configuration_builds_the_same_one() -> None:
    config = CompareConfig(schemes={"a": {"name": "rope", "base": 3}})
    assert CompareConfig(**resolved(config)) == config


def test_an_error_of_ours_is_a_message_and_status_two(capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: object) -> None:
        raise ConfigError("It is wrong.")

    assert run(main, []) == 2
    assert capsys.readouterr().err == "error: It is wrong.\n"


@pytest.mark.parametrize("word", ["a #1.txt", "2024", "Null.txt", "yes", "1e3", "{a}.txt", "a: b.txt", "[x]"])
def test_words_are_taken_as_they_are_where_text_is_expected(word: str) -> None:
    config = finetune("--data.text_files", word, "b.txt", "--out", word, "--tokenizer", word, "--train.schedule", word)
    assert config.data.text_files == [word, "b.txt"]
    assert [config.out, config.tokenizer, config.train.schedule] == [word] * 3
    assert finetune("--out", word, "--scheme.name", word).scheme.name == word


def test_a_model_is_a_name_or_a_configuration_in_braces() -> None:
    assert finetune("--model", "2024").model == "2024"
    assert finetune("--model", "{model_type: gpt2, n_layer: 1}").model == {"model_type": "gpt2", "n_layer": 1}


@pytest.mark.parametrize("config", [[], ["--config", str(Path(__file__).parents[2] / "configs" / "gpt2_rope.yaml")]])
@pytest.mark.parametrize("key", ["scheme.name", "out", "train.max_steps", "data.dataset"])
def test_a_key_without_its_value_is_named(key: str, config: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(*config, f"--{key}")
    assert f"--{key} has no value" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "config_class"),
    [
        ("lengths.0", EvalConfig),
        ("stride", EvalConfig),
        ("seed", EvalConfig),
        ("data.eval_years.0", EvalConfig),
        ("train.max_steps", FinetuneConfig),
        ("train.batch_size", FinetuneConfig),
        ("train.positions.max_length", FinetuneConfig),
        ("data.block_size", FinetuneConfig),
        ("vocab_size", FinetuneConfig),
        ("scheme.layers.0", FinetuneConfig),
        ("seeds.0", CompareConfig),
    ],
)
@pytest.mark.parametrize(("word", "value"), [("true", True), ("512.0", 512.0), ("1e3", 1e3)])
def test_integers_are_integers_alone(key: str, config_class: type[Section], word: str, value: object) -> None:
    argument = key.removesuffix(".0")
    extra = ["--models", "x"] if config_class is EvalConfig else []
    extra += ["--schemes", "{a: {name: rope}}"] if config_class is CompareConfig else []
    extra += ["--train.positions.name", "pose"] if "positions" in key else []
    words = [word, "2000"] if "years" in key else [word]
    with pytest.raises(ConfigError) as caught:
        parse(config_class, [*extra, f"--{argument}", *words], description="")
    expected = f"'{key}' is {value!r}: input should be a valid integer. Correct it in the YAML file or as --{argument}."
    assert str(caught.value) == expected


@pytest.mark.parametrize(("words", "layers"), [(["0", "-1"], [0, -1]), (["2"], [2]), (["every:4"], "every:4"), (["null"], None)])
def test_layers_are_indices_or_words(words: list[str], layers: object) -> None:
    config = parse(FinetuneConfig, ["--scheme.name", "rope", "--scheme.layers", *words], description="")
    assert config.scheme.layers == layers


def test_the_schemes_of_a_comparison_are_one_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse(CompareConfig, ["--schemes", "{a: {name: rope, base: 3}}", "--schemes.a.base", "4"], description="")
    assert (list(config.schemes), config.schemes["a"].options) == (["a"], {"base": 4})
    with pytest.raises(SystemExit):
        parse(CompareConfig, ["--help"], description="")
    assert "--schemes.name" not in capsys.readouterr().out


def test_a_key_given_twice_in_braces_is_refused() -> None:
    with pytest.raises(ConfigError, match="the key 'a' is given twice"):
        parse(CompareConfig, ["--schemes", "{a: {name: rope}, a: {name: t5}}"], description="")


def test_a_key_of_yaml_may_override_what_is_merged_into_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {<<: {max_steps: 2, batch_size: 3}, max_steps: 5}")
    train = finetune("--config", str(path)).train
    assert (train.max_steps, train.batch_size) == (5, 3)


@pytest.mark.parametrize(("written", "value"), [("1e4", 1e4), ("-1e-4", -1e-4), (".5E+2", 50.0), ("1.e3", 1e3), ("1e4x", "1e4x")])
def test_a_file_and_the_command_line_read_the_same_numbers(written: str, value: object, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"scheme: {{name: rope, base: {written}}}")
    for config in (finetune("--config", str(path)), finetune("--scheme.name", "rope", "--scheme.base", written)):
        assert (config.scheme.options, type(config.scheme.options["base"])) == ({"base": value}, type(value))


def test_null_takes_back_what_a_file_gives(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {text_files: [a.txt], eval_text_files: [b.txt]}\ntokenizer: t\ntrain: {positional_learning_rate: 0.1}")
    config = finetune(
        "--config", str(path), "--data.eval_text_files", "null", "--tokenizer", "null", "--train.positional_learning_rate", "null"
    )
    assert (config.data.text_files, config.data.eval_text_files, config.tokenizer) == (["a.txt"], None, None)
    assert config.train.positional_learning_rate is None
    assert finetune("--config", str(path), "--data.text_files", "null").data.text_files is None


def test_a_slip_below_a_label_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("schemes: {a: {name: rope, transition: {macth: attention}}}")
    with pytest.raises(ConfigError, match=r"Unknown key 'schemes\.a\.transition\.macth'\. Did you mean 'match'"):
        parse(CompareConfig, ["--config", str(tmp_path / "c.yaml")], description="")


def test_a_section_under_two_names_is_changed_under_one(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("base: &both {max_steps: 9}\ntrain: *both\nschemes: {control: {name: original}}")
    found = parse(CompareConfig, ["--config", str(tmp_path / "c.yaml"), "--train.max_steps", "2"], description="")
    assert found.base is not None
    assert (found.base.max_steps, found.train.max_steps) == (9, 2)


def test_another_source_of_text_drops_what_belongs_to_the_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: {sotu: true, train_years: [1900, 1910], block_size: 16}")
    config = finetune("--config", str(path), "--data.text_files", "a.txt")
    assert config.data == DataSection(text_files=["a.txt"], block_size=16)


@pytest.mark.parametrize("config_class", [FinetuneConfig, EvalConfig, CompareConfig])
@pytest.mark.parametrize(("key", "value"), [("seed", 2**32), ("out", ""), ("out", "  ")])
def test_seeds_and_folders_that_nothing_could_use(config_class: type[Section], key: str, value: object) -> None:
    needed = {"models": ["x"]} if config_class is EvalConfig else {"schemes": {"a": {}}} if config_class is CompareConfig else {}
    good = {"seeds": [2**32 - 1]} if config_class is CompareConfig else {"seed": 2**32 - 1}
    bad = {"seeds": [value]} if (config_class, key) == (CompareConfig, "seed") else {key: value}
    with pytest.raises(ConfigError, match=rf"'{key}(s\.0)?' is .*--{key}"):
        build(config_class, {**needed, **bad})
    assert build(config_class, {**needed, **good, "out": "x"})


def test_help_names_one_value_for_a_scalar_and_several_for_a_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(FinetuneConfig, ["--help"], description="")
    shown = capsys.readouterr().out
    assert caught.value.code == 0
    assert "[VALUE" not in shown
    for line in ("--out VALUE ", "--data.text_files VALUE ...", "--resume true|false", "--data.block_size VALUE "):
        assert line in shown.replace("\n", " \n")


@pytest.mark.parametrize("number", [28, 30, 13])
def test_a_disk_that_cannot_be_written_is_a_message_and_status_two(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    def main(arguments: object) -> None:
        raise OSError(number, os.strerror(number), "record.json")

    assert run(main, []) == 2
    assert f"error: Cannot write 'record.json': {os.strerror(number)}. Free the disk" in capsys.readouterr().err


def test_another_error_of_the_system_is_not_hidden() -> None:
    def main(arguments: object) -> None:
        raise ConnectionResetError(104, "reset")

    with pytest.raises(ConnectionResetError):
        run(main, [])
