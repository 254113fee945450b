"""The memory of a language model: what decoding keeps of it, and what it costs."""

import pytest
import torch
from tiny_model import SIZES, tiny_model
from transformers import DynamicCache, StaticCache

import graphmoe
from graphmoe.errors import ConfigError
from graphmoe.models import GraphMoEConfig, GraphMoEForSequenceClassification
from graphmoe.models.cost import forward_flops
from graphmoe.nn import edge_form

VOCABULARY = SIZES["vocab_size"]


def build(**options):
    options = {"num_memory_slots": 5, "num_memory_heads": 2, "num_experts_per_tok": 2, **options}
    model = tiny_model(**options).double().eval()
    for parameter in model.parameters():  # large weights: a difference must not hide in small numbers
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def ids(*shape):
    return torch.randint(VOCABULARY, shape)


@torch.no_grad()
def logits(model, tokens, **options):
    return model(tokens, **options).logits


def test_tokens_read_what_was_written():
    """Without it a model of one block whose attention is 0 would not know the tokens before."""
    model = build(num_hidden_layers=1)
    block = model.model.layers[0]
    torch.nn.init.zeros_(block.attend.lin_out.weight)
    tokens = ids(2, 9)
    changed = torch.cat([(tokens[:, :1] + 1) % VOCABULARY, tokens[:, 1:]], dim=1)
    moved = (logits(model, changed) - logits(model, tokens)).abs().amax(dim=(0, 2))
    assert moved[1:].max() > 1e-3
    torch.nn.init.zeros_(block.memory.lin_out.weight)
    moved = (logits(model, changed) - logits(model, tokens)).abs().amax(dim=(0, 2))
    assert moved[1:].max() == 0


def test_left_padding_and_batch_mates_do_not_matter():
    model = build()
    tokens = ids(3, 9)
    alone = logits(model, tokens[:1])
    assert (logits(model, tokens)[:1] - alone).abs().max() <= 1e-10
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), tokens], dim=1)
    mask = torch.cat([torch.zeros(3, 4), torch.ones(3, 9)], dim=1).long()
    assert (logits(model, padded, attention_mask=mask)[:1, 4:] - alone).abs().max() <= 1e-10
    generated = model.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False)
    plain = model.generate(tokens, max_new_tokens=8, do_sample=False)
    assert torch.equal(generated[:, 4:], plain)


@pytest.mark.parametrize(
    "knobs", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_decoding_with_and_without_cache(knobs):
    """Beams are copied and reordered, and their memories with them."""
    model = build()
    knobs = {"max_new_tokens": 12, "do_sample": False, **knobs}
    tokens = ids(3, 4)
    cached = model.generate(tokens, use_cache=True, **knobs)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **knobs))


def test_batches_of_a_cache_are_chosen_with_their_memories():
    model = build()
    tokens, rest = ids(3, 6), ids(3, 4)
    whole = logits(model, torch.cat([tokens, rest], dim=1))[:, 6:]
    chosen = torch.tensor([2, 0])
    for change in ("batch_select_indices", "reorder_cache"):
        cache = model(tokens, use_cache=True).cache
        getattr(cache, change)(chosen)
        torch.testing.assert_close(
            logits(model, rest[chosen], cache=cache), whole[chosen], rtol=0, atol=1e-10
        )
    cache = model(tokens, use_cache=True).cache
    cache.batch_repeat_interleave(2)
    twice = rest.repeat_interleave(2, dim=0)
    torch.testing.assert_close(
        logits(model, twice, cache=cache), whole.repeat_interleave(2, dim=0), rtol=0, atol=1e-10
    )
    cache.reset()
    again = logits(model, tokens, cache=cache)
    torch.testing.assert_close(again, logits(model, tokens), rtol=0, atol=1e-10)


def test_caches_without_room_for_memories():
    model = build()
    tokens = ids(2, 4)
    config = model.config
    for cache in (DynamicCache(), DynamicCache(config=config)):  # empty ones get it
        assert logits(model, tokens, cache=cache).shape == (2, 4, VOCABULARY)
        assert all(layer.memory.steps.tolist() == [4, 4] for layer in cache.layers)
    filled = tiny_model(num_experts_per_tok=2).eval()(tokens, use_cache=True).cache
    for cache in (filled, StaticCache(config=config, max_cache_len=8)):
        with pytest.raises(ConfigError, match="cache: no room for memories"):
            model(tokens, cache=cache)
    cache = model(tokens, use_cache=True).cache
    cache.crop(0)
    assert not cache.is_croppable
    with pytest.raises(ConfigError, match="crop: a memory does not forget its last tokens"):
        cache.crop(-1)


@pytest.mark.parametrize("policy", ["ffn", "block"])
def test_gradient_checkpointing_gives_the_same_gradients(policy):
    model = build(dropout=0.1).train()
    tokens = ids(2, 9)
    found = []
    for chosen in ("none", policy):
        model.config.checkpoint_policy = chosen
        torch.manual_seed(3)
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert any("memory" in name for name in found[0])
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, found[0][name], rtol=1e-10, atol=1e-12)


def test_edge_form_equals_fast_form():
    model = build()
    tokens = ids(2, 9)
    fast = logits(model, tokens)
    with edge_form(model):
        assert (logits(model, tokens) - fast).abs().max() <= 1e-12


@pytest.mark.slow
def test_compiles_whole():
    model = build().train()
    tokens = ids(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)
    loss.backward()


def test_saves_and_loads(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    loaded = graphmoe.load(tmp_path)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    tokens = ids(2, 9)
    torch.testing.assert_close(logits(loaded, tokens), logits(model, tokens), rtol=0, atol=1e-12)


def test_initial_sizes():
    model = tiny_model(num_memory_slots=40, hidden_size=64, num_hidden_layers=8)
    for block in model.model.layers:
        memory = block.memory
        assert abs(memory.lin_out.weight.std() / 0.02 * 4 - 1) < 0.1
        assert (memory.lin_gate.bias == 1).all() and (memory.lin_gate.weight.std() < 0.05)
        assert abs(memory.bank.slots.std() / 0.02 - 1) < 0.1


def test_cost_of_a_memory():
    plain, model = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1, num_memory_slots=5)
    channels, slots, k = SIZES["hidden_size"], 5, 2
    maps = 3 + 2 * k  # query, update, erase; key and value of each slot; lin_out below
    want = 2 * (maps + 1) * channels**2 + 2 * channels  # and the gate
    want += 2 * (channels // 2) * (channels + slots)  # the router
    want += 4 * k * channels  # scores and weighted sums
    assert forward_flops(model, 8) - forward_flops(plain, 8) == want
    sizes = [sum(p.numel() for p in m.parameters()) - m.num_active_parameters() for m in (plain, model)]
    assert sizes[0] == sizes[1]  # all of a memory is active


@pytest.mark.parametrize(
    "options, match",
    [
        ({"num_memory_slots": -1}, "num_memory_slots: negative number"),
        ({"num_memory_slots_per_tok": 6}, "k: k must not exceed the number of slots"),
        ({"num_memory_heads": 3}, "heads: heads must divide"),
    ],
)
def test_wrong_sizes(options, match):
    with pytest.raises(ConfigError, match=match):
        build(**options)


def test_an_encoder_has_no_memory():
    with pytest.raises(ConfigError, match="num_memory_slots: a memory is written from the first"):
        GraphMoEForSequenceClassification(
            GraphMoEConfig(num_memory_slots=4, is_causal=False, num_labels=2, **SIZES)
        )
