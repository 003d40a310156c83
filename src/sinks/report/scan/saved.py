"""A survey as plain data and back, and as tidy tables: one row an observation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

from sinks.analysis.measures.entropy import KINDS
from sinks.analysis.survey import Survey
from sinks.reading.estimate import Estimate

if TYPE_CHECKING:
    from pyarrow import Table

KINDS_OF_ARRAY = {"Float": np.float64, "Int": np.int64, "Bool": np.bool_}
INFINITIES = {"Infinity": math.inf, "-Infinity": -math.inf}
"""JSON has no such number, and null means that nothing was measured."""

Row = dict[str, Any]


# Plain data


def to_plain(survey: Survey) -> dict[str, Any]:
    """Everything as what strict JSON can say: arrays as lists, NaN as null, keys as text. `from_plain` undoes it."""
    return plain(survey)


def plain(value: Any) -> Any:
    """One value of a survey as plain data."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def from_plain(content: Mapping[str, Any]) -> Survey:
    """The survey that `to_plain` made `content` of."""
    return rebuilt(content, Survey)


def rebuilt(content: Any, kind: Any) -> Any:
    """`content` as a value of the annotated `kind`: a dataclass, tuple, mapping or array, or an optional one."""
    if getattr(kind, "array_type", None) is np.ndarray:
        return array(content, KINDS_OF_ARRAY[kind.dtype.__name__], len(kind.dims))
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{field.name: rebuilt(content[field.name], hints[field.name]) for field in fields(kind)})
    inner = get_args(kind)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        known = [one for one in inner if one is not NoneType]
        return None if content is None else rebuilt(content, known[0])
    if origin is tuple:
        kinds = [inner[0]] * len(content) if inner[1:] == (...,) else inner
        return tuple(rebuilt(item, one) for item, one in zip(content, kinds, strict=True))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {scalar(key, inner[0]): rebuilt(item, inner[1]) for key, item in content.items()}
    return scalar(content, kind)


def scalar(content: Any, kind: Any) -> Any:
    """A number, a word, or whatever stands in a mapping of anything."""
    if kind is float:
        return math.nan if content is None else INFINITIES[content] if content in INFINITIES else float(content)
    return kind(content) if kind in (int, str) else content


def array(content: list[Any], kind: Any, dims: int) -> np.ndarray:
    """Nested lists as an array of `dims` axes, null as NaN."""
    if kind is np.float64:
        content = [_numbers(item) for item in content]
    found = np.array(content, dtype=kind)
    return found if found.ndim == dims else found.reshape((0,) * dims)  # an empty array forgets its inner axes


def _numbers(item: Any) -> Any:
    return [_numbers(inner) for inner in item] if isinstance(item, list) else scalar(item, float)


# Tidy tables


def tables(survey: Survey) -> dict[str, Table]:
    """Every observation as a row, by what it is of: one Arrow table each, all with the model's name in front.

    Tables without a row are left out. Write one with `pyarrow.parquet.write_table`.
    """
    import pyarrow  # a tenth of a second that nobody pays who wants no table

    model = model_name(survey)
    found = {name: [{"model": model, **row} for row in rows(survey)] for name, rows in TABLES.items()}
    return {name: pyarrow.Table.from_pylist(rows) for name, rows in found.items() if rows}


def model_name(survey: Survey) -> str:
    """How the model is called: `about["model"]`, or its `name`; of a folder, its last part."""
    model = survey.about.get("model", "a model")
    name = str(model.get("name", "a model")) if isinstance(model, Mapping) else str(model)
    return name.rstrip("/").rpartition("/")[2] if name.startswith(("/", ".", "~")) else name


def ends(of: Estimate, prefix: str = "") -> Row:
    """An estimate as columns."""
    return {f"{prefix}value": of.value, f"{prefix}low": of.low, f"{prefix}high": of.high, f"{prefix}texts": of.texts}


def conditions(survey: Survey) -> Iterator[Row]:
    """A row a condition."""
    for one in survey.sink_rates.conditions if survey.sink_rates else ():
        yield {
            "condition": one.condition.name, "tokens": one.tokens, "epsilon": one.epsilon, "sink": one.sink,
            "floor": one.floor, "aggregated": one.aggregated, **ends(one.rate, "rate_"),
            **ends(one.anywhere, "anywhere_"), **ends(one.first_mass, "first_mass_"),
            **ends(one.first_four_mass, "first_four_mass_"), **ends(one.sink_mass, "sink_mass_"),
            **ends(one.argmax, "argmax_"), "sinks": list(one.sinks),
        }  # fmt: skip


def thresholds(survey: Survey) -> Iterator[Row]:
    """A row a condition and epsilon."""
    for one in survey.sink_rates.conditions if survey.sink_rates else ():
        for epsilon, rate in one.curve.items():
            yield {"condition": one.condition.name, "epsilon": epsilon, **ends(rate)}


def lengths(survey: Survey) -> Iterator[Row]:
    """A row a condition and length."""
    for one in survey.sink_rates.lengths if survey.sink_rates else ():
        for length, rate in one.rate.items():
            row = {"condition": one.condition.name, "epsilon": one.epsilon, "tokens": length}
            yield row | ends(rate, "rate_") | ends(one.mass[length], "mass_")


def heads(survey: Survey) -> Iterator[Row]:
    """A row a condition and head."""
    for one in survey.sink_rates.conditions if survey.sink_rates else ():
        for layer, head in np.ndindex(*one.heads.shape):
            importance = one.importance[layer, head]
            at = importance[one.sink] if one.sink < len(importance) else math.nan
            yield {
                "condition": one.condition.name, "layer": layer, "head": head, "sink": one.sink,
                "passes": float(one.heads[layer, head]), "importance": float(at),
            }  # fmt: skip


def kinds(survey: Survey) -> Iterator[Row]:
    """A row a head: what it does."""
    if survey.entropy is None:
        return
    of = survey.entropy.heads
    measures = [field.name for field in fields(of) if field.name != "kind"]
    for layer, head in np.ndindex(*of.kind.shape):
        row = {"layer": layer, "head": head, "kind": KINDS[of.kind[layer, head]]}
        yield row | {name: float(getattr(of, name)[layer, head]) for name in measures}


def entropies(survey: Survey) -> Iterator[Row]:
    """A row a way of reading, head and bin of positions."""
    measures = ("entropy", "normalised", "without_sink", "sink_mass")
    for one in survey.entropy.profiles if survey.entropy else ():
        for layer, head, part in np.ndindex(*one.entropy.shape):
            row = {"reading": one.name, "layer": layer, "head": head, "end": int(one.ends[part])}
            yield row | {name: float(getattr(one, name)[layer, head, part]) for name in measures}


def layers(survey: Survey) -> Iterator[Row]:
    """A row a condition and layer, and one a kind of input and depth: a value each, with its measure's name."""
    for one in survey.sink_rates.conditions if survey.sink_rates else ():
        for layer, mass in enumerate(one.mass_by_layer.tolist()):
            yield {"condition": one.condition.name, "layer": layer, "measure": "first mass", "value": mass}
    for name, one in survey.massive.items():
        for measure in ("value_ratio", "key_ratio"):
            for (layer, head), value in np.ndenumerate(getattr(one, measure)):
                yield {"condition": name, "layer": layer, "measure": f"{measure} {head}", "value": float(value)}


def depths(survey: Survey) -> Iterator[Row]:
    """A row a kind of input (or condition) and depth: a value each, with its measure's name."""
    for name, one in survey.massive.items():
        found = {"largest": np.median(one.largest, axis=0), "median": np.median(one.median, axis=0)}
        found |= {
            key: getattr(one, key) for key in ("flagged", "first_norm", "kurtosis_first", "kurtosis_rest", "outliers")
        }
        yield from _by_depth(name, found)
    if survey.mixing:
        for one in survey.mixing.spreads:
            yield from _by_depth(one.condition, {f"spread from token {one.changed}": one.overall})
        geometry = survey.mixing.geometry
        shapes = {field.name: getattr(geometry, field.name) for field in fields(geometry) if field.name != "condition"}
        yield from _by_depth(geometry.condition, shapes)


def _by_depth(condition: str, measures: Mapping[str, np.ndarray]) -> Iterator[Row]:
    for measure, values in measures.items():
        for depth, value in enumerate(values.tolist()):
            yield {"condition": condition, "depth": depth, "measure": measure, "value": value}


def peaks(survey: Survey) -> Iterator[Row]:
    """A row a massive activation."""
    for name, one in survey.massive.items():
        yield from ({"condition": name, **vars(peak)} for peak in one.peaks)


def effects(survey: Survey) -> Iterator[Row]:
    """A row an edit."""
    for one in survey.interventions.effects if survey.interventions else ():
        yield _flat(one)


def head_effects(survey: Survey) -> Iterator[Row]:
    """A row a head from which the sink was taken."""
    of = survey.interventions.heads if survey.interventions else None
    if of:
        for layer, head in np.ndindex(*of.removed.shape):
            row = {"layer": layer, "head": head}
            yield row | {name: float(getattr(of, name)[layer, head]) for name in ("removed", "low", "high", "control")}


def readings(survey: Survey) -> Iterator[Row]:
    """A row a source of meaning."""
    yield from (_flat(one) for one in (survey.semantics.readings if survey.semantics else ()))


def doses(survey: Survey) -> Iterator[Row]:
    """A row a kind of repetition and number of repeats."""
    for one in survey.repetition.doses if survey.repetition else ():
        found = zip(one.repeats.tolist(), one.attention.tolist(), one.log_odds.tolist(), strict=True)
        for repeats, attention, odds in found:
            row = {"kind": one.kind, "sink": one.sink, "repeats": repeats, "attention": attention, "log_odds": odds}
            yield row


def advice(survey: Survey) -> Iterator[Row]:
    """A row a number of kept sinks, and a capacity."""
    if survey.advice:
        for kept, value in survey.advice.perplexity.items():
            yield {"sinks": kept, "capacity": survey.advice.capacity, "perplexity": value}
        for capacity, value in survey.advice.by_capacity.items():
            if capacity != survey.advice.capacity:
                yield {"sinks": survey.advice.sinks, "capacity": capacity, "perplexity": value}


def _flat(one: Any) -> Row:
    row: Row = {}
    for field in fields(one):
        value = getattr(one, field.name)
        row |= ends(value, f"{field.name}_") if isinstance(value, Estimate) else {field.name: value}
    return row


TABLES: dict[str, Callable[[Survey], Iterator[Row]]] = {
    "conditions": conditions, "thresholds": thresholds, "lengths": lengths, "heads": heads, "kinds": kinds,
    "entropy": entropies, "layers": layers, "depths": depths, "peaks": peaks, "effects": effects,
    "head_effects": head_effects, "readings": readings, "doses": doses, "advice": advice,
}  # fmt: skip
"""What each table is made of."""
