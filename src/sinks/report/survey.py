"""`survey`: measure a model and hold the result so that it can be looked at, saved, and shown in a notebook."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sinks.analysis.survey import Survey, SurveySettings, measure
from sinks.reading.provenance import machine, now, versions
from sinks.report.document import to_json
from sinks.report.files import results_folder, write_together
from sinks.report.scan.page import html_card, page
from sinks.report.scan.saved import tables, to_plain
from sinks.types import Stage, unwatched

PAGE, PLAIN = "scan.html", "survey.json"


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

        Raises InvalidInput if nothing can be written there.
        """
        with results_folder(Path(folder)) as place:
            return write_together(place, self.files)

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
