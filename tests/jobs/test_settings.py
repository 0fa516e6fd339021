"""Settings are checked at the door: what cannot work is named, with its value and what is allowed."""

import dataclasses

import pytest

from jobs.settings import (
    CurateJob,
    Faults,
    ModelSettings,
    PretrainJob,
    SearchDimension,
    SettingsError,
    TuneJob,
    checked,
    with_setting,
)
from models.config import PRESETS, OptimizerConfig
from pipelines.sources import Source

REFUSED = [
    ({"steps": 0}, "steps is 0; it has to be at least 1"),
    ({"max_failures": -2}, "max_failures is -2; it has to be at least 0, or -1 for no limit"),
    ({"name": "a/b"}, "name is 'a/b'; it has to be a folder's name without a slash"),
    ({"name": ""}, "name is ''"),
    ({"microbatch": 0}, "microbatch is 0; it has to be at least 1, or null"),
    ({"workers": 2, "min_workers": 3}, "min_workers is 3; it has to be null, or from 1 to workers, 2"),
    ({"max_preemptions": -2}, "max_preemptions is -2; it has to be at least 0, or -1 for no limit"),
    ({"start_timeout_seconds": 0}, "start_timeout_seconds is 0; it has to be above 0"),
    ({"validation": "beside", "checkpoint_every": 60}, "validate_every is 200; it has to be a multiple of check"),
    ({"sequence_length": 1}, "sequence_length is 1; it has to be at least 2"),
    ({"faults": Faults(poison_data_steps=(9, 9))}, r"faults.poison_data_steps is \(9, 9\); it has to be a range"),
    ({"model": ModelSettings(n_heads=3)}, "model.n_heads is 3, but must be a divisor of d_model 128"),
    ({"model": ModelSettings(n_kv_heads=3)}, "model.n_kv_heads is 3, but must be a divisor of n_heads 4"),
    ({"optimizer": OptimizerConfig(lr=0.0)}, "optimizer.lr is 0.0, but must be above 0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_trained_is_named_with_its_value_and_what_is_allowed(changes, message):
    with pytest.raises(SettingsError, match=message):
        checked(dataclasses.replace(PretrainJob(), **changes))


def test_what_lies_in_a_list_is_checked_too():
    with pytest.raises(SettingsError, match="path of the source web is empty"):
        checked(CurateJob(sources=[Source("books", "texts"), Source("warc", "", name="web")]))


def test_defaults_of_pretraining_and_search_can_run_as_they_are():
    checked(PretrainJob())
    checked(TuneJob())


def test_a_vocabulary_smaller_than_the_tokenizers_is_refused_and_the_default_is_rounded_up():
    assert ModelSettings().config(1001).vocab_size == 1024
    assert ModelSettings(vocab_size=1001).config(1001).vocab_size == 1001
    with pytest.raises(SettingsError, match="model.vocab_size is 1000; it has to be at least the tokenizer's 1001"):
        ModelSettings(vocab_size=1000).config(1001)


def test_a_preset_keeps_what_is_not_changed():
    changed = ModelSettings(preset="124m", n_layers=2).config(50304, 128)
    assert changed == dataclasses.replace(PRESETS["124m"], n_layers=2, max_seq_len=128)


def test_a_setting_is_changed_by_its_dotted_name_and_keeps_its_type():
    settings = PretrainJob()
    changed = with_setting(with_setting(settings, "optimizer.lr", 1), "model.d_model", 96.4)
    assert (changed.optimizer.lr, changed.model.d_model) == (1.0, 96)
    assert type(changed.optimizer.lr) is float
    assert with_setting(settings, "optimizer.betas", [0.8, 0.9]).optimizer.betas == (0.8, 0.9)
    assert with_setting(settings, "optimizer.lr", "1e-3").optimizer.lr == 0.001
    assert settings == PretrainJob()


SPACES = [
    ({"optimizer.speed": SearchDimension([1])}, "space is 'optimizer.speed'.* go on with kind, lr, betas"),
    ({"optimizer": SearchDimension([1])}, "space is 'optimizer'; it has to be a single setting"),
    ({"seed.x": SearchDimension([1])}, "space is 'seed.x'.*seed has no parts"),
    ({"steps": SearchDimension([1, 2])}, "space is 'steps'; it has to be none of workspace, name"),
    ({}, "space is {}; it has to be at least one setting"),
    ({"optimizer.lr": SearchDimension()}, "space of optimizer.lr is .* values, or low below high"),
    ({"optimizer.lr": SearchDimension(low=2, high=1)}, "space of optimizer.lr is .* values, or low below high"),
    ({"optimizer.lr": SearchDimension([])}, "space of optimizer.lr is .* either values, or low and high"),
    ({"optimizer.lr": SearchDimension([1], low=1)}, "space of optimizer.lr is .* either values, or low and high"),
    ({"optimizer.lr": SearchDimension(low=0, high=1)}, "low in the space of optimizer.lr is 0; .* above 0 on a log"),
    ({"optimizer.lr": SearchDimension([0.1, "fast"])}, "optimizer.lr is 'fast'; it has to be of type float"),
    ({"optimizer.lr": SearchDimension([0.1, -3])}, "optimizer.lr is -3.0, but must be above 0"),
    ({"schedule.kind": SearchDimension(["line"])}, "schedule.kind is 'line'; it has to be one of cosine, wsd"),
    ({"compile": SearchDimension([1])}, "compile is 1; it has to be of type bool"),
    ({"seed": SearchDimension([True])}, "seed is True; it has to be of type int"),
    ({"model.d_model": SearchDimension([62])}, "model.n_heads is 4, but must be a divisor of d_model 62"),
]


@pytest.mark.parametrize(("space", "message"), SPACES)
def test_a_search_space_is_tried_on_the_settings_before_the_search(space, message):
    with pytest.raises(SettingsError, match=message):
        checked(TuneJob(space=space))
