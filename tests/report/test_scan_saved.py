"""A survey on disk: plain data that comes back exactly, and tidy tables."""

import io
import json
import math
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as files
import pytest

from sinks.analysis.survey import Survey
from sinks.errors import InvalidInput
from sinks.reading.estimate import Estimate
from sinks.report.scan.saved import TABLES, from_plain, tables, to_plain
from sinks.report.survey import SurveyReport
from tests.report.fake_survey import bare_survey, fake_advice, fake_survey


def same(one: Any, other: Any, path: str = "survey") -> None:
    """Raise unless both are equal in every part: types, keys, dtypes, shapes, and NaN where there is NaN."""
    assert type(one) is type(other), path
    if is_dataclass(one):
        for field in fields(one):
            same(getattr(one, field.name), getattr(other, field.name), f"{path}.{field.name}")
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            same(one[key], other[key], f"{path}[{key}]")
    elif isinstance(one, tuple | list):
        assert len(one) == len(other), path
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            same(left, right, f"{path}[{index}]")
    elif isinstance(one, np.ndarray):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), path
        np.testing.assert_array_equal(one, other, path)
    else:
        assert one == other or (one != one and other != other), path


def through_json(survey: Survey) -> Survey:
    return from_plain(json.loads(json.dumps(to_plain(survey), allow_nan=False)))


@pytest.mark.parametrize("survey", [fake_survey(), bare_survey()], ids=["whole", "bare"])
def test_a_survey_comes_back_exactly(survey: Survey):
    same(through_json(survey), survey)


def test_the_comparison_of_this_file_sees_a_difference():
    with pytest.raises(AssertionError, match="advice.ratio"):
        same(fake_survey(advice=replace(fake_advice(), ratio=1.850001)), fake_survey())


def test_what_json_cannot_say_comes_back_too():
    effects = fake_survey().interventions
    assert effects is not None
    endless = replace(effects, base=Estimate(math.inf, -math.inf, math.nan, 0), heads=None, effects=())
    rates = fake_survey().sink_rates
    assert rates is not None
    nothing = np.zeros((0, 0))
    empty = replace(rates.conditions[0], importance=np.zeros((0, 0, 0)), heads=nothing, rate_at=np.zeros(0),
                    mass_by_layer=np.zeros(0))  # fmt: skip
    unknown = replace(rates.conditions[0], heads=np.full((30, 9), np.nan))
    survey = fake_survey(interventions=endless, sink_rates=replace(rates, conditions=(empty, unknown)))
    same(through_json(survey), survey)


def test_keys_that_are_numbers_come_back_as_numbers():
    found = through_json(fake_survey())
    assert found.advice is not None and found.sink_rates is not None
    assert list(found.advice.perplexity) == [0, 1, 2, 4, 8, 16]
    assert list(found.sink_rates.conditions[0].curve) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.8]


def test_every_table_is_tidy_and_names_the_model():
    survey = fake_survey()
    found = tables(survey)
    assert set(found) == set(TABLES)
    for name, table in found.items():
        assert table.column_names[0] == "model", name
        assert set(table["model"].to_pylist()) == {"smollm2-135m-instruct"}, name
        rows = [tuple(map(str, row.values())) for row in table.to_pylist()]
        assert len(rows) == len(set(rows)), f"{name} says something twice"


def test_tables_have_a_row_an_observation():
    found = tables(fake_survey(layers=5, heads=3))
    counts = {name: found[name].num_rows for name in ("conditions", "heads", "kinds", "head_effects", "effects")}
    assert counts == {"conditions": 7, "heads": 7 * 5 * 3, "kinds": 15, "head_effects": 15, "effects": 8}
    assert found["entropy"].num_rows == 3 * 5 * 3 * 16
    assert found["advice"].num_rows == 6 + 4


def test_table_values_are_those_of_the_survey():
    survey = fake_survey()
    assert survey.sink_rates is not None and survey.interventions is not None
    one = survey.sink_rates.conditions[1]
    rows = [row for row in tables(survey)["heads"].to_pylist() if row["condition"] == one.condition.name]
    row = next(row for row in rows if (row["layer"], row["head"]) == (7, 4))
    assert row["passes"] == one.heads[7, 4] and row["importance"] == one.importance[7, 4, 0]
    edit = tables(survey)["effects"].to_pylist()[3]
    effect = survey.interventions.effects[3]
    assert (edit["name"], edit["loss_value"], edit["ratio_high"]) == (effect.name, effect.loss.value, effect.ratio.high)


def test_what_was_not_measured_has_no_table():
    assert set(tables(bare_survey())) == {"conditions", "thresholds", "lengths", "heads", "layers"}


def test_parquet_reads_back():
    for name, expected in tables(fake_survey(layers=4, heads=2)).items():
        buffer = io.BytesIO()
        files.write_table(expected, buffer)
        table = files.read_table(io.BytesIO(buffer.getvalue()))
        assert table.schema == expected.schema, name
        assert str(table.to_pylist()) == str(expected.to_pylist()), name  # as text, for NaN is not equal to NaN


def test_arrow_is_imported_only_when_a_table_is_made():
    program = "import sys; import sinks.report.scan.page; sys.exit('pyarrow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_a_folder_holds_the_survey_of_one_model(tmp_path: Path):
    ours = fake_survey()
    SurveyReport(ours).save(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    theirs = replace(ours, about={**ours.about, "model": {"name": "another"}})
    with pytest.raises(InvalidInput, match="holds the survey of .*, and the files of another would lie between"):
        SurveyReport(theirs).save(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "other.parquet").touch()
    SurveyReport(replace(ours, advice=None)).save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before.keys() - {"advice.parquet"} | {"other.parquet"}


def test_tables_of_nobody_knows_whom_are_not_taken_away(tmp_path: Path):
    (tmp_path / "advice.parquet").write_text("mine")
    SurveyReport(replace(fake_survey(), advice=None)).save(tmp_path)
    assert (tmp_path / "advice.parquet").read_text() == "mine"
