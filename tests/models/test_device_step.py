"""A decode step as one graph of kernels against the model's own modules over a `SinkCache`."""

import copy

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.errors import InvalidInput, UnsupportedModel
from sinks.models.attach import attach
from sinks.models.families import describe
from sinks.models.step.device.choice.draws import Drawing
from sinks.models.step.device.step import CHOSEN, DeviceModel
from sinks.models.step.device.weights import why_no_device_step
from sinks.models.step.hasten import hasten, steps_of
from sinks.models.step.slots import Seating, Seats
from sinks.models.weights.packed import Int4Rows, Int8Linear
from tests.families.tiny import build, tokens
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

pytestmark = needs_triton

WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
STEPS = 40 if HAS_GPU else 11
SINKS, WINDOW = 2, 6
HALF = torch.bfloat16 if HAS_GPU else torch.float16
"""Triton's interpreter takes bfloat16 for integers where a scalar meets it (3.6)."""


def made(name: str, dtype: torch.dtype = torch.float32, **more: int):
    """A tiny model with heads that the kernels take."""
    return attach(build(name, layers=2, dtype=dtype, **WIDE, **more).to(DEVICE))


def seats_of(model, count: int, *, start: int = 0) -> Seats:
    """Empty rings for `count` streams."""
    cache = SinkCache.for_model(model, sinks=SINKS, window=WINDOW, start=start)
    plans, base = [ring.plan for ring in cache.rings], model.base_model
    heads, dim = base.config.num_key_value_heads, base.layers[0].self_attn.head_dim
    rotaries = describe(model).rotaries(SINKS + WINDOW)
    made = {kind: rotary for kind, rotary in rotaries.items()}
    kinds = [layer.rotary for layer in describe(model).layers]
    return Seats(
        rings=[
            tuple(torch.zeros(count, heads, p.capacity, dim, dtype=model.dtype, device=DEVICE) for _ in range(2))
            for p in plans
        ],
        sizes=[(plan.sinks, plan.window) for plan in plans],
        rotaries=[None if kind is None else made[kind] for kind in kinds],
        start=start,
    )


def plain(model, ids, *, start: int = 0):
    """Logits behind every token, by the model's own modules."""
    cache, made = SinkCache.for_model(model, sinks=SINKS, window=WINDOW, start=start), []
    with torch.inference_mode():
        for at in range(ids.shape[1]):
            given = ids[:, at : at + 1].to(DEVICE)
            made.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(made, dim=1)


def close(found, expected, share: float) -> None:
    """Within `share` of the largest of what is expected."""
    torch.testing.assert_close(found.to(expected.dtype), expected, rtol=0, atol=float(share * expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_models_own(name: str):
    """float32, filling and long past eviction; two streams in seats 2 and 0, one of them at a time now and then."""
    model = made(name)
    ids = tokens(STEPS, batch=2)
    expected = plain(model, ids)
    step = DeviceModel(model).step(seats := seats_of(model, 3))
    for at in range(STEPS):
        if at % 4 == 3:
            both = [step([int(ids[row, at])], [2 - 2 * row], [at]).clone() for row in (1, 0)]
            found = torch.cat(both[::-1])
        else:
            found = step(ids[:, at].tolist(), [2, 0], [at, at])
        close(found, expected[:, at], 3e-6)
        assert step.chosen.tolist() == found.argmax(dim=1).tolist() or at % 4 == 3
    assert seats.rings[0][0][1].abs().max() == 0, "nobody sits there"
    if HAS_GPU:
        assert step.captures == 2, "one for each number of rows"


def test_it_goes_on_by_itself():
    """Greedy steps that feed each other are those of the model's own modules; a row that rests stays where it is."""
    model = made("llama")
    ids = tokens(1, batch=2)
    step = DeviceModel(model).step(seats_of(model, 4))
    step([int(ids[0, 0]), int(ids[1, 0]), 0], [3, 1, 0], [0, 0, -1])
    step.run(5)
    cache, given, row = SinkCache.for_model(model, sinks=SINKS, window=WINDOW), ids[:1].to(DEVICE), None
    for _ in range(6):
        with torch.inference_mode():
            row = model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1]
        given = row.argmax(dim=1, keepdim=True)
    assert step.chosen[0] == given[0, 0]


def test_it_reads_what_its_seat_chose_before_the_host_has():
    """Also in another row, and in a step of another size; where nothing could be chosen, the row rests."""
    model = made("llama")
    step, other = (DeviceModel(model).step(seats_of(model, 4)) for _ in range(2))
    ids = [5, 9, 31]
    step(ids, [3, 1, 0], [0, 0, 0])
    told = step.told()
    found = step([CHOSEN, CHOSEN], [0, 3], [1, 1]).clone()
    tokens = told.wait()[:3]
    other(ids, [3, 1, 0], [0, 0, 0])
    close(found, other([tokens[2], tokens[0]], [0, 3], [1, 1]), 1e-6)
    nothing = Drawing(bias=dict.fromkeys(range(71), -float("inf")))
    step.install([0], [nothing], [[]], [2])
    step([CHOSEN, CHOSEN], [3, 0], [2, 2])
    assert (step.told().wait()[1], step.draws.newest[0]) == (None, -1)
    ring = step.rings[0][0].clone()
    step([CHOSEN, CHOSEN], [3, 0], [3, 3])
    assert torch.equal(step.rings[0][0][0], ring[0]) and not torch.equal(step.rings[0][0][3], ring[3])


@pytest.mark.parametrize("drawing", [Drawing(), Drawing(0.9, 20, 0.9, 0.01, 1.2, 0.1, 5, 11, {3: 2.0})])
def test_steps_by_themselves_are_steps_that_the_host_feeds(drawing: Drawing):
    """Rows with settings and rows without, moved on by the graph or placed anew for every token."""
    model = made("llama")
    one, other = (DeviceModel(model).step(seats_of(model, 2)) for _ in range(2))
    for step in (one, other):
        step.install([1], [drawing], [[]], [0])
        step([7, 8], [1, 0], [0, 0])
    said = []
    for at in range(1, 9):
        tokens = one.told().wait()
        said.append(tokens)
        one(tokens, [1, 0], [at, at])
    other.run(8)
    assert other.told().wait() == one.told().wait()
    assert len({tuple(each) for each in said}) > 1
    if HAS_GPU:
        assert one.captures == 1


@pytest.mark.parametrize("start", [10_000_000, 2**40])
def test_a_far_stream_is_the_near_one(start: int):
    """Phases are integers that wrap: the same logits wherever a stream begins, 1e-4 of the scale in float32."""
    model = made("llama_llama3")
    ids = tokens(10)
    near, far = (DeviceModel(model).step(seats_of(model, 1, start=begin)) for begin in (0, start))
    for at in range(10):
        one = [int(ids[0, at])], [0], [at]
        close(far(*one), near(*one), 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_half_precision_is_as_near_to_float64_as_the_models_own(name: str):
    """Rounding alone stands between it and float64, and the step rounds less: its residual is float32."""
    exact, model = build(name, layers=2, **WIDE), build(name, layers=2, dtype=HALF, **WIDE)
    for own, other in zip(exact.parameters(), model.parameters(), strict=True):
        own.data = other.data.double()  # the same weights
    exact, model = attach(exact.to(DEVICE)), attach(model.to(DEVICE))
    ids = tokens(10)
    expected, theirs = plain(exact, ids)[0], plain(model, ids)[0].double()
    step = DeviceModel(model).step(seats_of(model, 1))
    ours = torch.cat([step([int(ids[0, at])], [0], [at]).double() for at in range(10)])
    error, allowed = (float((each - expected).norm() / expected.norm()) for each in (ours, theirs))
    assert 0 < error < 1.25 * allowed < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", [Int8Linear, Int4Rows])
def test_packed_weights_multiply_as_the_widened_ones(name: str, kind: type):
    """Against float32 layers of the same grid; one row and three."""
    model = build(name, layers=2, dtype=torch.float32, **WIDE, intermediate_size=96)
    wide = copy.deepcopy(model)
    for key, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear:
            packed = kind.of(module.weight, module.bias)
            model.set_submodule(key, packed)
            wide.get_submodule(key).weight = torch.nn.Parameter(packed.weight_widened(), requires_grad=False)
    model, wide = model.to(DEVICE), attach(wide.to(DEVICE))
    ids = tokens(8, batch=3)
    expected = plain(wide, ids)
    if HAS_GPU:
        close(plain(attach(model), ids), expected, 1e-5)  # the general path, which widens
    step = DeviceModel(attach(model)).step(seats_of(wide, 4))
    for at in range(8):
        close(step(ids[:, at].tolist(), [0, 1, 2], [at] * 3), expected[:, at], 1e-5)
    close(step([5], [3], [0]), plain(wide, torch.tensor([[5]]))[:, 0], 1e-5)


class Seated(SinkCache):
    """A cache that lays open one seat a row, beside its own rings: a stand-in that takes single tokens only."""

    laid: Seats

    def step_seats(self) -> Seating | None:
        """Row i sits in seat i."""
        if self._arrival is None:
            return None
        rows = len(self._arrival.seen)
        return Seating(self.laid, range(rows), self._arrival.seen)


def test_a_hastened_model_takes_the_seats_of_its_cache():
    model = made("llama")
    ids = tokens(9, batch=2)
    expected = plain(model, ids)
    hasten(model).forward.device = DeviceModel(model)
    cache = Seated.for_model(model, sinks=SINKS, window=WINDOW)
    cache.laid = seats_of(model, 2)
    kept = []
    with torch.inference_mode():
        for at in range(9):
            given = ids[:, at : at + 1].to(DEVICE)
            kept.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits[:, -1])
    close(torch.stack(kept, dim=1), expected, 3e-6)
    assert cache.seen == [9, 9]
    assert not cache.rings[0].is_initialized, "the step took all of them"
    assert len(model.forward.device._steps) == 1
    del cache
    assert len(model.forward.device._steps) == 0, "a step goes with its seats"


def test_what_it_cannot_do_is_said():
    small = build("llama", layers=1, dtype=torch.float32).to(DEVICE)
    assert "heads have 8 dimensions" in str(why_no_device_step(small))
    with pytest.raises(UnsupportedModel, match="8 dimensions"):
        DeviceModel(small)
    assert "float64" in str(why_no_device_step(made("llama", torch.float64)))
    assert "not among llama" in str(why_no_device_step(build("gemma2").to(DEVICE)))
    model = made("llama")
    assert why_no_device_step(model) is None
    if HAS_GPU:
        assert steps_of(hasten(model)) == "decode steps in one CUDA graph"
        assert "no CUDA graph, since its heads have 8" in steps_of(hasten(small))
    step = DeviceModel(model).step(seats_of(model, 2))
    with pytest.raises(InvalidInput, match="goes on from a step"):
        step.run(1)
    with pytest.raises(InvalidInput, match="3 rows and 3 positions for 2 seats"):
        step([1, 2, 3], [0, 1, 2], [0, 0, 0])
