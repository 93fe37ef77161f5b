"""Model sizes: every shipped file adds up to the published model, and a bad one is refused."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sim.hardware import model_spec
from traces.errors import InputError
from traces.trace import ModelSpec

ROOT = Path(__file__).parent.parent
MODELS = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "trace")

# Parameters in total as the models' makers state them.
PUBLISHED = {
    "deepseek_moe_16b": 16.4e9,
    "deepseek_v2_lite": 15.7e9,
    "gpt_oss_20b": 20.9e9,
    "mixtral_8x7b": 46.7e9,
    "olmoe_1b_7b": 6.9e9,
    "qwen1_5_moe_a2_7b": 14.3e9,
    "qwen3_30b_a3b": 30.5e9,
    "reference_16x64_top8": 428.4e6,
    "reference_24x32_top4": 366.4e6,
}


def load_sizes(name):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.to_container(compose(overrides=[f"+model={name}"]).model, resolve=True)


def load_model(name):
    return model_spec(load_sizes(name))


def attention(hidden, heads, key_value_heads, head):
    """Return the parameters of queries, keys, values and output without biases."""
    return 2 * hidden * heads * head + 2 * hidden * key_value_heads * head


def ends(hidden, vocabulary, tied=False):
    """Return the parameters of embedding, last norm and head."""
    return (1 if tied else 2) * vocabulary * hidden + hidden


# Everything but routed experts, from the models' configurations: (parameters, KV values that a token adds).
OTHER = {
    "olmoe_1b_7b": (
        16 * (attention(2048, 16, 16, 128) + 64 * 2048 + 4 * 2048) + ends(2048, 50304),
        16 * 2 * 16 * 128,
    ),
    "reference_16x64_top8": (
        16 * (attention(512, 8, 8, 64) + 64 * 512 + 4 * 512) + ends(512, 16384, tied=True),
        16 * 2 * 8 * 64,
    ),
    "reference_24x32_top4": (
        24 * (attention(384, 6, 2, 64) + (6 + 2 * 2) * 64 + 3 * 384 * 384 + 384 + 32 * 384 + 2 * 384)
        + ends(384, 16384, tied=True),
        24 * 2 * 2 * 64,
    ),
    "qwen3_30b_a3b": (
        48 * (attention(2048, 32, 4, 128) + 128 * 2048 + 2 * 2048 + 2 * 128) + ends(2048, 151936),
        48 * 2 * 4 * 128,
    ),
    "qwen1_5_moe_a2_7b": (
        24 * (attention(2048, 16, 16, 128) + 3 * 2048 + 3 * 2048 * 5632 + 2048 + 60 * 2048 + 2 * 2048) + ends(2048, 151936),
        24 * 2 * 16 * 128,
    ),
    "deepseek_v2_lite": (
        27 * (2048 * 16 * 192 + 2048 * (512 + 64) + 512 + 512 * 16 * 256 + 16 * 128 * 2048 + 2 * 2048)
        + 3 * 2048 * 10944
        + 26 * (2 * 3 * 2048 * 1408 + 64 * 2048)
        + ends(2048, 102400),
        27 * (512 + 64),
    ),
    "deepseek_moe_16b": (
        28 * (attention(2048, 16, 16, 128) + 2 * 2048)
        + 3 * 2048 * 10944
        + 27 * (2 * 3 * 2048 * 1408 + 64 * 2048)
        + ends(2048, 102400),
        28 * 2 * 16 * 128,
    ),
    "mixtral_8x7b": (
        32 * (attention(4096, 32, 8, 128) + 8 * 4096 + 2 * 4096) + ends(4096, 32000),
        32 * 2 * 8 * 128,
    ),
    "gpt_oss_20b": (
        24
        * (
            attention(2880, 64, 8, 64)
            + (64 * 64 + 2 * 8 * 64 + 2880)  # biases
            + 64  # sinks
            + (32 * 2880 + 32)
            + 2 * 2880
        )
        + ends(2880, 201088),
        24 * 2 * 8 * 64,
    ),
}


def test_every_model_is_checked():
    assert set(MODELS) == set(PUBLISHED) == set(OTHER)


@pytest.mark.parametrize("name", MODELS)
def test_an_expert_is_three_matrices(name):
    model = load_model(name)
    biases = 2 * model.expert_width + model.hidden_size if name == "gpt_oss_20b" else 0
    assert model.expert_bytes["bf16"] == 2 * (3 * model.hidden_size * model.expert_width + biases)


@pytest.mark.parametrize("name", MODELS)
def test_quantised_experts_carry_their_group_data(name):
    model = load_model(name)
    weights = 3 * model.hidden_size * model.expert_width
    biases = 2 * (2 * model.expert_width + model.hidden_size)
    expected = {
        "int4": weights // 2 + weights // 64 * 8,
        "int2": weights // 4 + weights // 32 * 8,
        "mxfp4": weights // 2 + weights // 32 + biases,
    }
    for precision, size in model.expert_bytes.items():
        assert precision == "bf16" or size == expected[precision]


@pytest.mark.parametrize("name", MODELS)
def test_everything_else_follows_from_the_configuration(name):
    model = load_model(name)
    parameters, key_values = OTHER[name]
    assert (model.other_bytes, model.kv_bytes_per_token) == (2 * parameters, 2 * key_values)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_add_up_to_the_published_total(name):
    model = load_model(name)
    total = (model.other_bytes + model.layers * model.experts * model.expert_bytes["bf16"]) / 2
    assert total == pytest.approx(PUBLISHED[name], rel=0.005)


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_called_as_its_model(name):
    assert load_model(name).name == name


def test_trace_stands_for_the_model_that_was_recorded():
    recorded = ModelSpec("any", layers=1, experts=2, top_k=1)
    assert model_spec(load_sizes("trace"), recorded) is recorded


def test_trace_needs_a_trace():
    with pytest.raises(InputError, match=r"model\.name is 'trace', but there is no trace to ask"):
        model_spec({"name": "trace"})


def test_sizes_may_be_left_out():
    sizes = {"name": "any", "layers": 1, "experts": 2, "top_k": 1, "hidden_size": None}
    assert model_spec(sizes) == ModelSpec("any", layers=1, experts=2, top_k=1)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("layers", 0, "model.layers is 0: it must be a whole number, at least 1"),
        ("layers", True, "model.layers is True: it must be a whole number, at least 1"),
        ("experts", "8", "model.experts is '8': it must be a whole number, at least 1"),
        ("shared_experts", -1, "model.shared_experts is -1: it must be a whole number, at least 0"),
        ("top_k", 9, "model.top_k is 9: it must be at most the 8 experts of a layer"),
        ("name", 7, "model.name is 7: it must be a text that is not empty"),
        ("expert_bytes", 7, "model.expert_bytes is 7: it must be a mapping"),
        (
            "expert_bytes",
            {"bf16": 0},
            "model.expert_bytes.bf16 is 0: it must be a whole number of bytes, at least 1",
        ),
        (
            "other_byte",
            3,
            "model has no field 'other_byte': did you mean 'other_bytes'? "
            "known: expert_bytes, expert_width, experts, hidden_size, kv_bytes_per_token, layers, name, "
            "other_bytes, shared_experts, top_k",
        ),
    ],
)
def test_bad_sizes_are_refused_in_one_sentence(key, value, sentence):
    sizes = {"name": "any", "layers": 2, "experts": 8, "top_k": 2}
    with pytest.raises(InputError) as error:
        model_spec({**sizes, key: value})
    assert str(error.value) == sentence


def test_a_field_that_is_missing_is_named():
    with pytest.raises(InputError, match=r"^model\.top_k is missing: model needs name, layers, experts, top_k$"):
        model_spec({"name": "any", "layers": 2, "experts": 8})
