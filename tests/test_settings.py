"""config.yaml: each mistake stops with one message that names the setting, the value and what is allowed."""

import json

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from cuepoint.errors import ConfigError
from cuepoint.settings import load_settings
from cuepoint.settings.generate import config_yaml, generated, json_schema


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"shard_sise": 3}, "shard_sise: no such setting; did you mean 'shard_size'?"),
        ({"download": {"paralel": 3}}, "download.paralel: no such setting; did you mean 'parallel'?"),
        ({"embedding": {"models": {"mine": {"model": "x", "querry_prompt": ""}}}}, "did you mean 'query_prompt'?"),
        ({"shard_size": 0}, "shard_size = 0: Input should be greater than or equal to 1"),
        ({"shard_size": "many"}, "shard_size = 'many': Input should be a valid integer"),
        ({"transcribe": {"language": "English"}}, "transcribe.language = 'English'"),
        ({"transcribe": {"device": "tpu"}}, "Input should be 'auto', 'cuda' or 'cpu'"),
        ({"transcribe": None}, "transcribe = None"),
        ({"embedding": {"use": ["MiniLM"]}}, "'MiniLM', which is not in embedding.models; did you mean 'all-MiniLM"),
        ({"embedding": {"models": {"mine": {}}}}, "embedding.models.mine.model"),
        ({"qdrant": {"collection": "a/b"}}, "qdrant.collection = 'a/b'"),
    ],
)
def test_a_wrong_setting_is_named_with_what_is_allowed(config, told):
    with pytest.raises(ConfigError) as error:
        load_settings(config)
    assert told in str(error.value)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        load_settings({"shard_size": 0, "download": {"paralel": 1}})
    assert len(str(error.value).splitlines()) == 3


def test_the_shipped_config_holds_every_setting_with_its_default():
    assert load_settings(yaml.safe_load(config_yaml())) == load_settings({})
    Draft202012Validator(json.loads(json_schema())).validate(yaml.safe_load(config_yaml()))


@pytest.mark.parametrize("path", generated(), ids=lambda path: path.name)
def test_generated_files_are_current(path):
    assert path.read_text(encoding="utf-8") == generated()[path], "run `make generate`"


def test_ready_made_models_stay_beside_own_ones():
    models = load_settings({"embedding": {"models": {"mine": {"model": "x"}}}}).embedding.models
    assert {"mine", "all-MiniLM-L6-v2", "bge-small-en-v1.5", "gte-Qwen2-1.5B-instruct"} <= models.keys()


def test_workers_and_politeness_never_trigger_a_rerun():
    busy = load_settings({"download": {"parallel": 9, "attempts": 9}, "transcribe": {"batch_size": 2, "device": "cpu"}})
    default = load_settings({})
    assert busy.download.result_settings() == default.download.result_settings()
    assert busy.transcribe.result_settings() == default.transcribe.result_settings()
    assert load_settings({"transcribe": {"beam_size": 1}}).transcribe.result_settings() != (
        default.transcribe.result_settings()
    )


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from([*load_settings({}).model_dump(), "nonsense"])


@given(st.dictionaries(names, values, max_size=4))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # on a busy machine
def test_any_config_is_valid_or_one_clear_error(config):
    try:
        load_settings(config)
    except ConfigError as error:
        assert str(error).startswith("config.yaml cannot be used:")
