"""What `sinks bench gpu` measures by: shapes, ceilings, an open stream; on a GPU, the whole of it in small."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from sinks.cache.cache import SinkCache
from sinks.cache.plan import Plan
from sinks.errors import InvalidInput
from sinks.evals.speed.gpu import bench, clock
from sinks.evals.speed.gpu.absent import NO_ROOM, reason
from sinks.evals.speed.gpu.band import Attended, Text
from sinks.evals.speed.gpu.bench import Candidate, GpuBench, measure
from sinks.evals.speed.gpu.clock import Burst, bursts
from sinks.evals.speed.gpu.decode import Case, Decoded, Entrant, Flatness, Packed, Seated, Writer
from sinks.evals.speed.gpu.ring import OpenStream
from sinks.evals.speed.gpu.shapes import SHAPES, ceiling, ring_bytes, weight_bytes
from sinks.models.attach import attach
from sinks.models.step.device.step import DeviceModel
from tests.families.tiny import build, tokens
from tests.kernels.interpreted import DEVICE, HAS_GPU, needs_triton

PUBLISHED = {"SmolLM2-135M": 134_515_008, "Llama-3.2-1B": 1_235_814_400, "Llama-3-8B": 8_030_261_248}
"""Parameters, as the model cards state them."""


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_has_the_parameters_of_its_model(name: str):
    assert sum(each.numel() for each in SHAPES[name].build("meta").parameters()) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        ("SmolLM2-135M", 1, 14_350),
        ("SmolLM2-135M", 64, 151_000),
        ("Llama-3.2-1B", 1, 1_677),
        ("Llama-3.2-1B", 64, 58_200),
        ("Llama-3-8B", 1, 277),
        ("Llama-3-8B", 64, 11_400),
    ],
)
def test_ceilings_are_those_worked_out_by_hand(name: str, rows: int, expected: float):
    """At 4.2 TB/s and 1,024 keys, from sizes alone; an untied input table is not read."""
    model = SHAPES[name].build("meta")
    read = weight_bytes(model) + ring_bytes(model, Plan(4, 1020), rows)
    assert ceiling(read, rows, 4.2) == pytest.approx(expected, rel=0.005)


def test_bytes_are_those_that_a_cache_holds():
    model = attach(build("qwen2", layers=3, dtype=torch.float32))
    cache = SinkCache.for_model(model, sinks=3, window=9)
    model(input_ids=tokens(4, batch=2), past_key_values=cache)
    model.config.head_dim = cache.rings[0].held[0].shape[-1]
    assert ring_bytes(model, Plan(3, 9), 2) == cache.nbytes
    tied = build("qwen2", tie_word_embeddings=True)
    assert weight_bytes(tied) == sum(each.nbytes for each in tied.parameters())


@needs_triton
def test_an_open_stream_gives_what_a_sink_cache_gives():
    """Past eviction, two rows; float32, so a band of sums in another order."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    model = attach(build("llama", layers=2, dtype=torch.float32, **sizes)).to(DEVICE)
    plan, ids = Plan(2, 5), tokens(12, batch=2).to(DEVICE)
    cache, stream = SinkCache.for_model(model, sinks=2, window=5), OpenStream(model, plan, 2, position=0)
    with torch.no_grad():
        for column in ids.split(1, dim=1):
            expected = model(input_ids=column, past_key_values=cache, use_cache=True).logits
            found = model(input_ids=column, past_key_values=stream, use_cache=True).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=2e-4 * float(expected.abs().max()))
    assert stream.positions.tolist() == [12, 12]


def test_what_times_come_to():
    decoded = Decoded("m", 64, 1020, "sinks", (2.0, 4.0, 3.0), 64_000.0)
    assert decoded.tokens_per_second == pytest.approx(64 / 0.003)
    assert decoded.share == pytest.approx(1 / 3)
    assert Flatness("m", 1, 1020, (1.0, 2.0, 4.0), (1.1, 2.0, 4.0)).ratio == 1
    text = Text(8, 3, 16)  # 4 sinks are assumed: 8 * 7 - 9 / 2 pairs
    assert Attended(text, "w", 1.0, 7.0).rates == pytest.approx((51.5 * 4 * 16 * 32 / 1e9, 51.5 * 2 * 16 * 32 / 1e9))


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A clock that needs no GPU: who made how many steps, each of which takes as many milliseconds as a name says."""
    asked: list[tuple[str, int]] = []

    def burst(run: Callable[[int], str], steps: int) -> float:
        asked.append((run(steps), steps))
        return float(asked[-1][0])

    monkeypatch.setattr(clock, "_burst", burst)
    return asked


def test_writers_take_turns_in_bursts_of_a_length_in_time(clocked: list[tuple[str, int]]):
    """Two steps to find the length; 150 ms or `most`, or `least`; the time of those two counts for nothing."""
    writers = {"fast": Burst(lambda steps: "1", 64), "slow": Burst(lambda steps: "100", 64)}
    writers |= {"call": Burst(lambda steps: "100", 8, 8), "middle": Burst(lambda steps: "15", 64)}
    times = bursts(writers, 2)
    assert times == {"fast": [1.0, 1.0], "slow": [100.0, 100.0], "call": [100.0, 100.0], "middle": [15.0, 15.0]}
    assert clocked == [(each, 2) for each in ("1", "100", "100", "15")] + 2 * [
        ("1", 64), ("100", 2), ("100", 8), ("15", 10),
    ]  # fmt: skip


def test_who_fails_on_the_way_is_lost_and_the_others_go_on(clocked: list[tuple[str, int]]):
    def keeper(steps: int) -> str:
        if len(clocked) > 4:
            raise torch.cuda.OutOfMemoryError
        return "150"

    writers, lost = {"keeper": Burst(keeper, 64), "sinks": Burst(lambda steps: "3", 64)}, dict[str, Exception]()
    assert bursts(writers, 3, lost) == {"sinks": [3.0, 3.0, 3.0]}
    assert [*lost] == ["keeper"] and reason(lost["keeper"]) == NO_ROOM
    with pytest.raises(torch.cuda.OutOfMemoryError):
        bursts(writers, 3)


def test_what_failed_is_said_in_a_line():
    assert reason(ValueError("one\ntwo")) == "ValueError: one" and reason(KeyError()) == "KeyError: "


def test_a_case_is_measured_by_those_who_can(monkeypatch: pytest.MonkeyPatch, clocked: list[tuple[str, int]]):
    """Writers that are made up: one cannot come, one fails once everybody is there; ours is timed far away as well."""

    def entrants(case: Case, ours: Sequence[Packed], steps: int) -> list[Entrant]:
        def hungry() -> Writer:
            raise torch.cuda.OutOfMemoryError

        def keeper(steps: int) -> str:
            if clocked:
                raise RuntimeError("no more\nof this")
            return "2"

        own = Writer(Burst(lambda steps: "2", steps), 10**9)
        return [("sinks", lambda: own), ("hungry", hungry), ("keeper", lambda: Writer(Burst(keeper, steps), 1))]

    def flatness(case: Case, ours: Packed, steps: int, rounds: int) -> Flatness:
        if case.plan.window > 8:
            raise torch.cuda.OutOfMemoryError
        return Flatness(case.name, case.rows, case.plan.window, (1.0,), (1.0,))

    def candidates(settings: GpuBench, absent: list[str]) -> list[Candidate]:
        return [Candidate("m", lambda: build("llama"))]

    made = {"entrants": entrants, "candidates": candidates, "flatness": flatness, "need_gpu": lambda what: None}
    made |= {"copy_rate": lambda: 4.0, "product_rate": lambda: 1.0, "DeviceModel": lambda model: no_weights}
    no_weights = object.__new__(DeviceModel)
    for name, stand_in in made.items():
        monkeypatch.setattr(bench, name, stand_in)
    plans = (Plan(4, 8), Plan(4, 16))
    found = measure(GpuBench(models=(), rows=(1,), plans=plans, quants=("none",), parts=("decode",), rounds=2))
    assert [(each.writer, each.window, each.milliseconds) for each in found.decoded] == [
        ("sinks", 8, (2.0, 2.0)),
        ("sinks", 16, (2.0, 2.0)),
    ]
    assert found.decoded[0].share == pytest.approx(0.125)  # 500 tokens a second of 4,000 a gigabyte
    assert [each.window for each in found.flat] == [8] and found.whole
    told = [f"hungry on m, 1 row, window {{}}: {NO_ROOM}", "keeper on m, 1 row, window {}: RuntimeError: no more"]
    expected = [line.format(window) for window in (8, 16) for line in told]
    assert found.absent == [*expected, f"position 10,000,000 on m, 1 row, window 16: {NO_ROOM}"]


def test_writing_at_a_position_makes_as_many_steps_as_it_says():
    made: list[str] = []

    class Step:
        def __call__(self, ids: torch.Tensor, rows: list[int], positions: list[int]) -> None:
            made.append(f"fed at {positions}")

        def run(self, steps: int) -> None:
            made.extend(["by itself"] * steps)

    seated = object.__new__(Seated)
    seated._step, seated._rows, seated._ids = Step(), [0, 1], torch.zeros(2)  # type: ignore[assignment]
    seated.run_at(7)(4)
    assert made == ["fed at [7, 7]", *["by itself"] * 3]


@pytest.mark.skipif(HAS_GPU, reason="for machines without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(InvalidInput, match="bench gpu needs a CUDA GPU"):
        measure(GpuBench())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of flash-attn-4 and FlexAttention, about themselves
def test_everybody_takes_part_on_a_gpu():
    text = Text(2_048, 256, 64)
    settings = GpuBench(
        models=("SmolLM2-135M",), rows=(1, 8), plans=(Plan(4, 252),), steps=4, rounds=2, texts=(text,), watched=(text,)
    )
    found = measure(settings)
    shape = [each for each in found.decoded if each.model == "SmolLM2-135M shape"]
    assert not [line for line in found.absent if line.startswith(("sinks", "its modules", "transformers"))]
    names = ("sinks", "sinks, int8", "sinks, int4", "its modules over our rings, one graph")
    writers = {*names, "transformers, one graph", "transformers generate()"}
    assert {(each.rows, each.writer) for each in shape} == {(rows, name) for rows in (1, 8) for name in writers}
    assert all(0 < each.share < 1 for each in shape)
    assert {"FlexAttention", "dense SDPA", "sinks, triton"} <= {each.way for each in found.attended}
    assert {each.rows for each in found.flat if each.model == "SmolLM2-135M shape"} == {1, 8}
    assert all(each.ratio == pytest.approx(1, rel=0.5) for each in found.flat)
    assert len(found.statistics) == 1
