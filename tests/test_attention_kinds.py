"""Kinds of attention beside the plain one, in architectures of transformers that have them."""

import pytest

import tempo
from benchmarks.architectures import build


def test_the_budget_of_latent_attention_counts_what_it_caches():
    with tempo.wrap_model(build("deepseek_v3")) as lm:
        assert (lm.num_key_value_heads, lm.head_dim, lm.value_dim) == (4, 16, 12)
        run = tempo.generate(lm, [3, 4, 5], threshold=0.02, max_steps=3, stop_at_eos=False)
        heads, keys, values = lm.key_value_sizes[0]
    assert heads * (keys + values) < 4 * (16 + 12), (
        "a latent cache is smaller than the keys and values made from it"
    )
    distributions = sum(step.distribution.nbytes for step in run.steps)
    cache = lm.num_layers * run.num_slots * heads * (keys + values) * 4
    links = sum(step.links.nbytes for step in run.steps[:-1])
    assert run.peak_bytes == distributions + links + cache


def test_differential_attention_asks_twice_a_layer_and_is_recorded_once():
    with tempo.wrap_model(build("diffllama")) as lm:
        assert (len(lm.attention_calls), lm.num_layers) == (8, 4)
        run = tempo.generate(lm, [3, 4, 5], max_steps=2, capture="attention")
        assert run.steps[0].attention.shape[0] == 4


@pytest.mark.parametrize("name", ["gemma4_text", "gemma3n_text", "deepseek_v3"])
def test_where_layers_do_not_cache_plain_keys_they_cannot_be_captured(name):
    with (
        tempo.wrap_model(build(name)) as lm,
        pytest.raises(tempo.SpecError, match="leave 'kv' out of capture"),
    ):
        tempo.generate(lm, [3, 4, 5], max_steps=2, capture="kv")
