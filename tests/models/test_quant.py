"""Linear layers in int8 and int4 against the arithmetic of their grids, and what cannot be quantised."""

import pytest
import torch
from torch import nn

from sinks.errors import InvalidInput, UnsupportedModel
from sinks.models.attach import attach
from sinks.models.load import Loaded, Source, quantized
from sinks.models.step.hasten import is_hastened
from sinks.models.weights.packed import GROUP, Int4Linear, Int4Rows, Int8Linear, PackedLinear, grid
from sinks.models.weights.quantize import is_quantized, quantize
from tests.families.tiny import build
from tests.reading.tiny import tiny_model, tiny_tokenizer

BAND = 2.0**-8
"""One rounding to bfloat16 of the input and one of the output, 2^-9 each."""


def weight(rows: int = 128, columns: int = 96) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear])
@pytest.mark.parametrize("rows", [128, 64, 37, 1])
@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_product_is_that_of_the_widened_weight(kind: type[PackedLinear], rows: int, count: int):
    """A sum of n products, each off by the input's rounding, and the result's own: |x||w| 2^-9 and |y| 2^-9."""
    layer, given = kind.of(weight(rows), torch.randn(rows)), torch.randn(2, count, 96)
    wide = layer.weight_widened()
    exact = given @ wide.T + layer.bias
    allowed = BAND * (given.abs() @ wide.abs().T + exact.abs() + layer.bias.abs()) + 1e-6
    assert layer(given).shape == (2, count, rows)
    assert bool(((layer(given) - exact).abs() <= allowed).all())


def test_rows_of_int4_are_the_same_grid_and_multiply_by_it():
    """What the kernels of a GPU read: every number of the grid itself, not asked through a kernel that rounds."""
    given, bias = weight(37), torch.randn(37)
    layer, (q, scales) = Int4Rows.of(given, bias), grid(given)
    scale, centre = scales.float().permute(2, 1, 0).unsqueeze(-1)
    wide = ((q.float().unflatten(1, (-1, GROUP)) - 8) * scale + centre).flatten(1)
    assert torch.equal(layer.weight_widened(), wide)
    rows = torch.randn(2, 3, 96)
    torch.testing.assert_close(layer(rows), rows @ wide.T + bias, rtol=1e-5, atol=1e-5)
    assert layer.packed.shape == (37, 48)
    assert layer.packed.nbytes + layer.scales.nbytes == 37 * 96 * 5 // 8


def test_int8_is_off_by_half_a_step():
    given = weight()
    layer = Int8Linear.of(given, None)
    step = layer.scales.float().unsqueeze(1)
    assert bool(((layer.weight_widened() - given).abs() <= 0.5 * step * (1 + 1e-5)).all())
    assert bool((step <= given.abs().amax(dim=1, keepdim=True) / 127 * (1 + 2**-6)).all())


def test_int4_is_off_by_half_a_step_and_the_rounding_of_scale_and_centre():
    given = weight()
    q, scales = grid(given)
    scale, centre = scales.float().permute(2, 1, 0).unsqueeze(-1)
    wide = ((q.float().unflatten(1, (-1, GROUP)) - 8) * scale + centre).flatten(1)
    exact = given.unflatten(1, (-1, GROUP))
    step = (exact.amax(dim=2, keepdim=True) - exact.amin(dim=2, keepdim=True)) / 15
    allowed = (step * (0.5 + 8 * 2**-8 + 2**-7) + centre.abs() * 2**-8).expand_as(exact).flatten(1)
    assert bool(((wide - given).abs() <= allowed).all())
    # asked through the kernel, the same weights, rounded to bfloat16 on the way out
    asked = Int4Linear.of(given, None).weight_widened()
    torch.testing.assert_close(asked, wide, rtol=2**-8, atol=1e-6)


def test_a_grid_of_q4_1_is_kept():
    """Weights q d + m with every group using 0 and 15, as GGUF makes them: 1/16 of a step at most."""
    made = torch.Generator().manual_seed(1)
    q = torch.randint(0, 16, (64, 3, GROUP), generator=made).float()
    q[..., 0], q[..., 1] = 0, 15
    step = torch.rand(64, 3, 1, generator=made) + 0.5
    given = (q * step - 7.5 * step).flatten(1)
    off = (Int4Linear.of(given, None).weight_widened() - given).unflatten(1, (-1, GROUP)).abs()
    assert float((off / step).max()) < 1 / 16
    assert torch.equal(grid(given)[0].float(), q.flatten(1))


def test_zeros_and_constant_rows_stay_finite():
    for kind in (Int8Linear, Int4Linear):
        layer = kind.of(torch.cat((torch.zeros(16, 32), torch.full((16, 32), 2.0))), None)
        made = layer(torch.ones(1, 32))
        torch.testing.assert_close(made, torch.cat((torch.zeros(16), torch.full((16,), 64.0)))[None], rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", [Int8Linear, Int4Linear, Int4Rows])
def test_layers_beside_each_other_share_their_memory(kind: type[PackedLinear]):
    parts = [kind.of(weight(64), None), kind.of(weight(128) * 2, None)]
    given = torch.randn(1, 96)
    apart = torch.cat([part(given) for part in parts], dim=1)
    whole = kind.beside(parts)
    assert whole is not None
    torch.testing.assert_close(whole(given), apart, rtol=0, atol=0)
    torch.testing.assert_close(torch.cat([part(given) for part in parts], dim=1), apart, rtol=0, atol=0)
    name = "values" if kind is Int8Linear else "packed"
    assert getattr(parts[0], name).untyped_storage().data_ptr() == getattr(whole, name).untyped_storage().data_ptr()


def test_int4_rows_that_do_not_fill_blocks_stay_apart():
    assert Int4Linear.beside([Int4Linear.of(weight(48), None), Int4Linear.of(weight(64), None)]) is None


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_every_linear_layer_is_replaced_and_the_head_is_int8(quant: str):
    model = quantize(tiny_model(dtype=torch.float32, layers=1), "none")
    fresh = build("llama", dtype=torch.float32, intermediate_size=64)
    quantize(fresh, quant)  # type: ignore[arg-type]
    assert is_quantized(fresh) and not is_quantized(model)
    assert not any(type(module) is nn.Linear for module in fresh.modules())
    assert type(fresh.get_output_embeddings()) is Int8Linear
    inside = {type(module) for module in fresh.model.modules() if isinstance(module, PackedLinear)}
    assert inside == {Int8Linear if quant == "int8" else Int4Linear}


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_quantised_is_refused_by_name():
    with pytest.raises(InvalidInput, match="choose one of none, int8, int4"):
        quantize(build("llama", dtype=torch.float32), "int3")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="float64.*dtype='float32'"):
        quantize(build("llama"), "int8")
    with pytest.raises(InvalidInput, match="quantise first, then attach"):
        quantize(attach(build("llama", dtype=torch.float32)), "int8")
    with pytest.raises(InvalidInput, match="quantised already"):
        quantize(quantize(build("llama", dtype=torch.float32), "int8"), "int8")
    with pytest.raises(UnsupportedModel, match="cannot be quantised"):
        quantize(build("mixtral", dtype=torch.float32), "int8")
    odd = build("llama", dtype=torch.float32, intermediate_size=40)
    with pytest.raises(UnsupportedModel, match="rows of 40 weights"):
        quantize(odd, "int4")
    assert not is_quantized(odd), "nothing was changed"


def test_the_source_says_what_was_done():
    model = build("llama", dtype=torch.float32)
    loaded = Loaded(model, tiny_tokenizer(), Source("tiny", "folder", "none", "", "widened"))
    assert quantized(loaded, "none") is loaded
    made = quantized(loaded, "int8")
    assert made.source.note.startswith("widened; linear weights int8 by row; ")
    assert "decode steps" in made.source.note and is_hastened(made.model)
    gemma = Loaded(build("gemma2", dtype=torch.float32), tiny_tokenizer(), loaded.source)
    assert "ordinary decode steps, since gemma2 is not among" in quantized(gemma, "int8").source.note
