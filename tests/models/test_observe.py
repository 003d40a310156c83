"""A lens sees what a model attends to, changes nothing by looking, and is gone afterwards."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache, GPT2Config, GPT2LMHeadModel, ViTConfig, ViTModel

from sinks import SinkCache, attach, detach
from sinks.errors import CacheError, UnsupportedModel, UnsupportedOption
from sinks.kernels.lens import ADDED, Lens, Sight
from sinks.models.observe import observe
from tests.families.cases import CASES
from tests.families.tiny import build, exactly, tokens

DENSE = [name for name, case in CASES.items() if case.model_type not in {"falcon", "bloom", "gptj", "mpt"}]
OWN_ATTENTION = ["falcon", "bloom", "gptj", "mpt"]
EXACT = 1e-9
"""Inside `exactly`, transformers' own code computes in float64."""
ROUNDED = 2e-6
"""But some families round queries and keys to float32 whatever one does."""


class Whole:
    """Puts the blocks of a pass together again: by layer `[batch, heads, T, T]`, zeros where nothing was seen."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.weights: dict[int, torch.Tensor] = {}
        self.blocks = 0

    def see(self, sight: Sight) -> None:
        self.blocks += 1
        view, heads = sight.view, slice(sight.view.heads.start, sight.view.heads.stop)
        batch = len(view.queries)
        whole = self.weights.setdefault(view.layer, torch.zeros(batch, 64, self.tokens, self.tokens).double())
        for row in range(batch):
            queries, keys = view.queries[row] >= 0, view.keys[row] >= 0
            part = sight.weights[row][:, queries][:, :, keys].double()
            whole[row, heads, view.queries[row][queries][:, None], view.keys[row][keys]] += part


@pytest.mark.parametrize("name", DENSE)
def test_dense_weights_are_those_of_transformers(name: str):
    model = build(name, layers=2)
    ids = tokens(17, batch=2)
    with torch.no_grad(), exactly():
        expected = model(ids, output_attentions=True)
        seen = Whole(17)
        with observe(model, Lens(see=seen.see)):
            found = model(ids)
    within = ROUNDED if CASES[name].rounds else EXACT
    scale = expected.logits.abs().max()
    assert (found.logits - expected.logits).abs().max() <= within * max(1, scale)
    for layer, weights in enumerate(expected.attentions):
        content = weights[..., :17].double()
        assert (seen.weights[layer][:, : content.shape[1]] - content).abs().max() <= within


def test_chunks_with_a_cache_of_transformers_and_pads_are_seen_as_they_stand():
    model = build("llama", layers=2)
    ids, mask = tokens(12, batch=2), torch.ones(2, 12, dtype=torch.int64)
    mask[1, :4] = 0
    whole, parts = Whole(12), Whole(12)
    with torch.no_grad():
        with observe(model, Lens(see=whole.see)):
            expected = model(ids, attention_mask=mask).logits
        cache, found = DynamicCache(config=model.config), []
        with observe(model, Lens(see=parts.see)):
            for begin, end in ((0, 5), (5, 6), (6, 12)):
                found.append(model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    assert torch.allclose(torch.cat(found, dim=1)[mask.bool()], expected[mask.bool()], atol=1e-6)
    assert torch.allclose(parts.weights[1], whole.weights[1], atol=1e-6)
    assert whole.weights[1][1, 0, :8, :8].sum(dim=-1).allclose(torch.ones(8).double(), atol=1e-6)
    assert whole.weights[1][1, 0, 8:].abs().max() == 0, "the row of 8 tokens counts them from 0"


@pytest.mark.parametrize("name", ["llama", "bloom", "gptj", "gemma2"])
def test_looking_at_a_stream_changes_nothing(name: str):
    model = attach(build(name, layers=2))
    ids = tokens(40)
    looked = 0

    def see(sight: Sight) -> None:
        nonlocal looked
        looked += 1
        assert torch.allclose(sight.weights.sum(dim=-1), torch.ones(()).to(sight.weights), atol=1e-9)

    def stream() -> torch.Tensor:
        cache = SinkCache.for_model(model, sinks=2, window=9)
        with torch.no_grad():
            return torch.cat([model(part, past_key_values=cache).logits for part in ids.split([25, 1, 14], 1)], dim=1)

    expected = stream()
    with observe(model, Lens(see=see)):
        found = stream()
    assert looked and torch.allclose(found, expected, atol=1e-9 * float(expected.abs().max()))
    assert torch.equal(stream(), expected), "and afterwards all is as before"


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_a_model_with_attention_of_its_own_is_observed_as_a_stream_only(name: str):
    model = build(name, layers=1)
    with pytest.raises(UnsupportedModel, match="SinkCache"), observe(model, Lens()):
        pass
    attach(model)
    with observe(model, Lens(see=lambda _: None)), pytest.raises(UnsupportedOption, match="SinkCache"):
        model(tokens(5))
    model(tokens(5))


def test_encoders_and_pictures_are_observed():
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = BertModel(BertConfig(vocab_size=50, **small, attn_implementation="eager")).eval()
    vit = ViTModel(ViTConfig(image_size=8, patch_size=4, **small, attn_implementation="eager")).eval()
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    for model, inputs, count in (
        (bert, {"input_ids": tokens(6, batch=2) % 50, "attention_mask": mask}, 6),
        (vit, {"pixel_values": torch.randn(2, 3, 8, 8)}, 5),
    ):
        seen = Whole(count)
        with torch.no_grad():
            expected = model(**inputs, output_attentions=True)
            with observe(model, Lens(see=seen.see)):
                found = model(**inputs)
        rows = torch.ones(2, count).bool() if model is vit else mask.bool()
        assert torch.allclose(found.last_hidden_state[rows], expected.last_hidden_state[rows], atol=1e-5)
        for layer in range(2):
            real = expected.attentions[layer].transpose(1, 2)[rows].double()
            assert torch.allclose(seen.weights[layer][:, :2].transpose(1, 2)[rows], real, atol=1e-6)


def test_a_model_that_cannot_stream_is_observed():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    model.set_attn_implementation("eager")
    seen, ids = Whole(9), tokens(9) % 60
    with torch.no_grad():
        expected = model(ids, output_attentions=True)
        with observe(model, Lens(see=seen.see)):
            model(ids)
    assert torch.allclose(seen.weights[1][:, :2], expected.attentions[1].double(), atol=1e-6)


def test_long_texts_come_in_blocks_that_reach_no_further_than_they_must(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sinks.kernels.written.QUERIES", {kind: (4, 4) for kind in ("cpu", "cuda")})
    monkeypatch.setitem(vars(__import__("sinks.kernels.written", fromlist=["ELEMENTS"]))["ELEMENTS"], "cpu", 100)
    model, ids = build("gemma2", layers=2), tokens(19, batch=2)
    widths: dict[int, list[int]] = {0: [], 1: []}
    seen = Whole(19)

    def see(sight: Sight) -> None:
        seen.see(sight)
        widths[sight.view.layer].append(sight.weights.shape[-1])
        assert sight.weights.shape[1] == len(sight.view.heads) < 4

    with torch.no_grad(), exactly():
        expected = model(ids, output_attentions=True)
        with observe(model, Lens(see=see)):
            assert torch.allclose(model(ids).logits, expected.logits, atol=1e-5)
    for layer in range(2):
        assert torch.allclose(seen.weights[layer][:, :4], expected.attentions[layer].double(), atol=EXACT)
    own = model.config.sliding_window
    sliding = model.config.layer_types.index("sliding_attention")
    assert max(widths[sliding]) <= own + 3 and max(widths[1 - sliding]) == 19


def test_lenses_stack_bend_and_add():
    """A bias of -inf on key 0, and an added zero key with a zero value: softmax-off-by-one over the other keys."""
    model, ids = build("llama", layers=1), tokens(6)
    kv_heads, head_dim = model.config.num_key_value_heads, 8

    def hide(view, scores):
        hidden = (view.keys == 0)[:, None, None, :] & (view.queries > 0)[:, None, :, None]
        return scores.masked_fill(hidden, -torch.inf)

    added = Lens(add=lambda layer: (torch.zeros(kv_heads, 1, head_dim), torch.zeros(kv_heads, 1, head_dim)))
    rows: list[Sight] = []
    with torch.no_grad(), observe(model, Lens(bend_scores=hide)), observe(model, added):
        with observe(model, Lens(see=rows.append)):
            model(ids)
    sight = rows[0]
    assert sight.view.keys[0].tolist() == [0, 1, 2, 3, 4, 5, ADDED]
    assert sight.weights[0, :, 1:, 0].abs().max() == 0
    scores = sight.scores[0, :, 3, 1:4]
    expected = scores.exp() / (1 + scores.exp().sum(dim=-1, keepdim=True))
    assert torch.allclose(sight.weights[0, :, 3, 1:4], expected, atol=1e-12)


def test_everything_is_undone_after_an_error_too():
    model, ids = build("llama", layers=1), tokens(6)
    before = model.config._attn_implementation
    expected = model(ids).logits

    def fail(sight: Sight) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"), observe(model, Lens(see=fail)):
        model(ids)
    assert model.config._attn_implementation == before
    assert torch.equal(model(ids).logits, expected)
    attach(model)
    assert torch.equal(model(ids).logits, expected)
    detach(model)


def test_attaching_under_observation_is_noticed():
    model = build("llama", layers=1)
    with observe(model, Lens(see=lambda _: None)):
        attach(model)
        with pytest.raises(CacheError, match="before observing"):
            model(tokens(4))
    detach(model)
