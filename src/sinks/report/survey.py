"""`survey`: measure a model and hold the result so that it can be looked at, saved, and shown in a notebook."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.survey import Survey, SurveySettings, measure
from sinks.errors import InvalidInput
from sinks.reading.provenance import machine, now, versions
from sinks.report.document import to_json
from sinks.report.files import results_folder, write_together
from sinks.report.scan.page import html_card, page
from sinks.report.scan.saved import TABLES, tables, to_plain
from sinks.types import Stage, unwatched

PAGE, PLAIN = "scan.html", "survey.json"
TABLE_FILES = tuple(f"{name}.parquet" for name in TABLES)


@dataclass(frozen=True, eq=False)
class SurveyReport:
    """A survey, and what can be made of it. In a notebook it shows itself as a card."""

    survey: Survey

    @property
    def page(self) -> str:
        """One HTML page that needs no network and no JavaScript."""
        return page(self.survey)

    def save(self, folder: str | Path) -> list[Path]:
        """Write scan.html, survey.json and a Parquet file a table into `folder`, and return the paths.

        An earlier survey of the same model that lies there is replaced, and those of its tables that this one lacks go.
        Raises InvalidInput if nothing can be written there, or if the survey of another model lies there.
        """
        with survey_folder(folder, measured_model(self.survey.about)) as place:
            files = self.files
            paths = write_together(place.folder, files)
            if place.before is not None:
                for name in set(TABLE_FILES) - files.keys():
                    (place.folder / name).unlink(missing_ok=True)
            return paths

    @property
    def files(self) -> dict[str, bytes]:
        """What `save` writes, by name."""
        from pyarrow import parquet  # heavy, and only needed here

        found = {PAGE: self.page.encode(), PLAIN: to_json(to_plain(self.survey)).encode()}
        for name, table in tables(self.survey).items():
            buffer = io.BytesIO()
            parquet.write_table(table, buffer)
            found[f"{name}.parquet"] = buffer.getvalue()
        return found

    def _repr_html_(self) -> str:
        return html_card(self.survey)


@dataclass(frozen=True)
class Place:
    """Where the files of a survey go. `before` is when the survey that lies there was made; None where none does."""

    folder: Path
    before: str | None


@contextmanager
def survey_folder(folder: str | Path, model: str) -> Iterator[Place]:
    """Make `folder` if need be, and prove that a survey of `model` may be saved there, before the work inside begins.

    Files of two models never lie in one folder: some would be of the one, and some of the other. Raises InvalidInput if
    the survey of another model lies there, or a survey.json that is none, or if no file can be made there.
    """
    with results_folder(Path(folder), (PAGE, PLAIN, *TABLE_FILES)) as place:
        about = earlier(place / PLAIN)
        if about is not None and (there := measured_model(about)) != model:
            raise InvalidInput(
                f"{place} holds the survey of {there}, and the files of {model} would lie between its files: choose "
                f"another folder, or delete {place} first"
            )
        yield Place(place, None if about is None else str(about.get("created", "an earlier time")))


def earlier(path: Path) -> Mapping[str, Any] | None:
    """What a saved survey says about itself, or None where there is no file, or an empty one."""
    try:
        content = path.read_bytes() if path.exists() else b""
        found = json.loads(content)["about"] if content else None
    except OSError as error:
        raise InvalidInput(f"{path} cannot be looked at ({error.strerror}): choose another folder") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        found = ""
    if found is None or isinstance(found, dict):
        return found
    raise InvalidInput(f"{path} is no survey, and stays as it is: choose another folder, or delete it")


def measured_model(about: Mapping[str, Any]) -> str:
    """The whole name of the model that a survey is of; two folders of one name are two models."""
    model = about.get("model", "")
    return str(model.get("name", "")) if isinstance(model, Mapping) else str(model)


def survey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, str] | Sequence[str],
    settings: SurveySettings | None = None,
    *,
    stage: Stage = unwatched,
) -> SurveyReport:
    """Measure a causal language model on `texts` (by name, or in order): where its sinks are, and what they do.

    Attaches the model if it can stream. `SurveySettings().quick()` takes a fifth of the time.

    Raises TextTooShort where the texts do not fill the settings, InvalidInput for settings that make no sense.
    """
    name = getattr(model, "name_or_path", "") or model.config.model_type
    about = about_model(model, {"name": str(name)})
    return SurveyReport(measure(model, tokenizer, texts, settings, about=about, stage=stage))


def about_model(model: PreTrainedModel, source: Mapping[str, Any], command: str = "") -> dict[str, Any]:
    """What stands beside the numbers: where the model comes from, on what and with what it was measured, and when."""
    return {
        "created": now(),
        "command": command,
        "model": dict(source) | {"dtype": str(model.dtype).removeprefix("torch."), "device": str(model.device)},
        "machine": machine(model.device),
        "versions": versions(),
    }
