"""`sinks scan`: where a model's attention sinks are, what carries them, and what happens when they are taken away."""

import functools
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinks.cli.flags import AcceptTerms, Device, Dtype
from sinks.cli.terminal.progress import progress_bars, table_console
from sinks.files import expanded

if TYPE_CHECKING:
    from sinks.analysis.survey import Survey, SurveySettings
    from sinks.report.survey import Place
    from sinks.types import Stage

SAVED = "survey.json"
ATLAS = "atlas.html"

KINDS = {
    "saved": "a saved survey",
    "causal": "a causal language model",
    "encoder": "an encoder of text",
    "vision": "a vision transformer",
}
"""What can be scanned."""

READERS = ({"causal", "encoder"}, "models that read text")
MEASURED = ({"causal", "encoder", "vision"}, "models that are measured")
HEEDED = {
    "text": READERS,
    "picture": ({"vision"}, "vision transformers, such as dinov2-small"),
    "quick": READERS,
    "parts": MEASURED,
    "epsilon": MEASURED,
    "texts": READERS,
    "context": ({"causal"}, "causal language models"),
    "seed": MEASURED,
    "device": MEASURED,
    "dtype": MEASURED,
}
"""Which options change what is done with which kinds of model."""


@dataclass(frozen=True)
class Flags:
    """What can be asked of `sinks scan`."""

    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="Names, Hub ids, folders or GGUF files; by default the built-in model. Encoders (minilm-l6) and "
            "vision transformers (dinov2-small) too. A survey.json, or its folder, is read and not measured again.",
            show_default=False,
        ),
    ] = None
    text: Annotated[
        list[str] | None,
        typer.Option(help="Name of a text, or a file; may be given more than once. By default Python's reference."),
    ] = None
    picture: Annotated[
        list[str] | None,
        typer.Option(help="A picture for vision transformers; may be given more than once. By default photographs."),
    ] = None
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer texts, and no heads one by one: a fifth of the time.")
    ] = False
    parts: Annotated[
        str | None,
        typer.Option(
            help="Which of sink_rates, massive, entropy, mixing, semantics, repetition, interventions, advice, with "
            "commas between; by default all."
        ),
    ] = None
    epsilon: Annotated[
        float | None,
        typer.Option(help="Share of attention above which a key counts as a head's sink; by default 0.3."),
    ] = None
    texts: Annotated[int | None, typer.Option(help="Windows of text for the sink rates; by default 100.")] = None
    context: Annotated[
        int | None, typer.Option(help="Longest text for the dependence on length, in tokens; by default 1024.")
    ] = None
    seed: Annotated[int | None, typer.Option(help="Draws windows, random tokens and controls; by default 0.")] = None
    out: Annotated[
        Path,
        typer.Option(
            help="Folder for the page, survey.json and the tables. It may hold an earlier survey of the same model, "
            "which is replaced, and none of another model."
        ),
    ] = Path("sinks-scan")
    json: Annotated[bool, typer.Option("--json", help="Print survey.json, and the summary on standard error.")] = False
    device: Device = "cpu"
    dtype: Dtype = "float32"
    accept_terms: AcceptTerms = False


def register(app: typer.Typer) -> None:
    """Add `scan` to `app`."""

    @app.command("scan")
    @functools.wraps(Flags, assigned=("__annotations__",), updated=())  # typer reads the flags from the class's fields
    def command(**flags: Any) -> None:
        """Measure the attention sinks of one model, or of several, and draw what was found.

        Writes scan.html (one page that needs nothing else), survey.json and Parquet tables; for several models each has
        a folder of its own, and atlas.html sets them side by side. An option that none of them could heed is refused.
        """
        run(Flags(**flags))


def run(flags: Flags) -> None:
    """Measure every model, write its files, then the atlas, then print."""
    from sinks.assets.catalogue import DEFAULT_MODEL
    from sinks.errors import InvalidInput
    from sinks.report.files import results_folder, write_together
    from sinks.report.scan.page import atlas, slug
    from sinks.report.survey import SurveyReport, survey_folder

    names = flags.models or [DEFAULT_MODEL]
    folders = [slug(Path(name).name if Path(name).exists() else name) for name in names]
    if len(set(folders)) < len(folders):
        raise InvalidInput(f"{', '.join(names)}: two of these would be written to one folder; scan them one by one")
    settings, console = settings_of(flags), table_console(stderr=flags.json, least=1)
    reports: list[SurveyReport] = []
    with ExitStack() as stack:  # every mistake before the first minute of measuring
        several = stack.enter_context(results_folder(flags.out, [ATLAS])) if len(names) > 1 else None
        subjects = [subject_of(name, flags) for name in names]
        refuse_unheeded(flags, settings, subjects)
        outs = [several / folder for folder in folders] if several else [flags.out]
        places = [
            stack.enter_context(survey_folder(out, subject.model)) for out, subject in zip(outs, subjects, strict=True)
        ]
        for subject, place in zip(subjects, places, strict=True):
            report = SurveyReport(subject.saved or scanned(subject.name, flags, settings))
            paths = report.save(place.folder)
            show(console, report.survey, paths[0], place)
            reports.append(report)
        if several:
            links = [f"{folder}/scan.html" for folder in folders]
            page = atlas([report.survey for report in reports], links)
            console.print(f"Wrote {write_together(several, {ATLAS: page.encode()})[0]}", soft_wrap=True, markup=False)
    if flags.json:
        from sinks.report.document import to_json
        from sinks.report.scan.saved import to_plain

        plain = [to_plain(report.survey) for report in reports]
        typer.echo(to_json(plain[0]) if len(plain) == 1 else json.dumps(plain, allow_nan=False), nl=False)


def settings_of(flags: Flags) -> "SurveySettings":
    """The settings that the flags ask for, checked. Raises InvalidInput."""
    from sinks.analysis.survey import LEAST, PARTS, SurveySettings
    from sinks.errors import InvalidInput

    least = LEAST["long_tokens"]
    if flags.context is not None and flags.context < least:
        raise InvalidInput(f"--context {flags.context}: give at least {least} tokens")
    asked = PARTS if flags.parts is None else tuple(part.strip() for part in flags.parts.split(",") if part.strip())
    settings = SurveySettings(parts=asked)
    if flags.quick:
        settings = settings.quick()
    given = {"epsilon": flags.epsilon, "seed": flags.seed, "texts": flags.texts, "long_tokens": flags.context}
    if flags.context is not None:  # as many tokens in all, but at least one text
        given["long_texts"] = max(1, settings.long_texts * settings.long_tokens // flags.context)
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True)
class Subject:
    """What is scanned: the name as given, its kind, the whole name of the model, and what was saved of it before."""

    name: str
    kind: str
    model: str
    saved: "Survey | None" = None


def subject_of(name: str, flags: Flags) -> Subject:
    """What a name stands for, once it is known to be here."""
    from sinks.assets.catalogue import find_model
    from sinks.models.encoders import is_encoder, look_up_encoder
    from sinks.models.load import look_up
    from sinks.report.survey import measured_model

    path = expanded(name)
    saved = path / SAVED if path.is_dir() else path
    if find_model(name) is None and saved.is_file() and saved.suffix == ".json":
        survey = read_saved(saved)
        return Subject(name, "saved", measured_model(survey.about), survey)
    if is_encoder(name):
        _, source, kind = look_up_encoder(name)
        return Subject(name, kind, source.name)
    _, source = look_up(name, accept_terms=flags.accept_terms)
    return Subject(name, "causal", source.name)


def refuse_unheeded(flags: Flags, settings: "SurveySettings", subjects: Sequence[Subject]) -> None:
    """Raises InvalidInput for an option that would change nothing for any of these models."""
    from sinks.errors import InvalidInput

    unset, kinds = Flags(), {subject.kind for subject in subjects}
    for option, (heeding, whom) in HEEDED.items():
        if getattr(flags, option) == getattr(unset, option):
            continue
        heeded = heeding & kinds
        if not heeded:
            they = ", ".join(f"{subject.name} is {KINDS[subject.kind]}" for subject in subjects)
            raise InvalidInput(f"--{option} would change nothing: it is for {whom}, and {they}; leave it out")
        windows = option == "texts" and "encoder" in heeded  # whatever is measured of an encoder is measured on them
        if option in {"epsilon", "texts", "context"} and "sink_rates" not in settings.parts and not windows:
            raise InvalidInput(f"--{option} would change nothing: it is for sink_rates, which --parts leaves out")


def scanned(name: str, flags: Flags, settings: "SurveySettings") -> "Survey":
    """Measure one model."""
    from sinks.models.encoders import is_encoder

    with progress_bars() as stage:
        if is_encoder(name):
            return scan_encoder(name, flags, settings, stage)
        return scan_language_model(name, flags, settings, stage)


def read_saved(path: Path) -> "Survey":
    """A survey that was saved before. Raises InvalidInput if the file holds none."""
    from sinks.errors import InvalidInput
    from sinks.report.scan.saved import from_plain

    try:
        return from_plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InvalidInput(
            f"{path} holds no survey that this version can read ({what}): scan the model again"
        ) from error


def scan_language_model(name: str, flags: Flags, settings: "SurveySettings", stage: "Stage") -> "Survey":
    """Load and survey a causal language model."""
    from sinks.analysis.survey import measure
    from sinks.models.load import load
    from sinks.report.survey import about_model

    texts = read_texts(flags)
    loaded = load(name, dtype=flags.dtype, device=flags.device, accept_terms=flags.accept_terms)
    about = about_model(loaded.model, asdict(loaded.source), command_line()) | {"sources": texts.sources}
    return measure(loaded.model, loaded.tokenizer, texts.by_name, settings, about=about, stage=stage)


def scan_encoder(name: str, flags: Flags, settings: "SurveySettings", stage: "Stage") -> "Survey":
    """Load and survey an encoder of text, or a vision transformer."""
    from sinks.analysis.inputs import Condition
    from sinks.analysis.survey import encoder_texts, measure_encoder
    from sinks.assets.pictures import read_pictures
    from sinks.models.encoders import load_encoder, picture_inputs
    from sinks.report.survey import about_model

    encoder = load_encoder(name, dtype=flags.dtype, device=flags.device)
    about = about_model(encoder.model, asdict(encoder.source), command_line())
    if encoder.tokenizer is None:
        pictures = read_pictures(flags.picture, encoder.image_size or 224)
        about["sources"] = [title for title, _ in pictures]
        shown = picture_inputs(encoder, [picture for _, picture in pictures])
        inputs: Mapping[Any, Any] = {Condition("pictures", "none"): shown}
    else:
        texts = read_texts(flags)
        about["sources"] = texts.sources
        inputs = encoder_texts(encoder.model, encoder.tokenizer, list(texts.by_name.values()), settings)
    return measure_encoder(encoder.model, inputs, settings, tokenizer=encoder.tokenizer, about=about, stage=stage)


@dataclass(frozen=True)
class Texts:
    """The texts by name, and where each comes from."""

    by_name: dict[str, str] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)


def read_texts(flags: Flags) -> Texts:
    """Every text that was asked for."""
    from sinks.assets.catalogue import DEFAULT_TEXT
    from sinks.assets.texts import read_text

    found = Texts()
    for name in flags.text or [DEFAULT_TEXT]:
        text = read_text(name)
        found.by_name[text.name] = text.text
        found.sources.append({key: value for key, value in asdict(text).items() if key != "text"})
    return found


def command_line() -> str:
    """The command that gives these numbers again."""
    import shlex

    return shlex.join(["sinks", *sys.argv[1:]])


def show(console: Any, survey: "Survey", page: Path, place: "Place") -> None:
    """The headline, what was found, where the page is, and what it replaced."""
    from rich.text import Text

    from sinks.report.scan.words import dependence, headline, signatures, title

    console.print(Text(title(survey), style="bold"))
    console.print(Text(headline(survey)))
    for one in signatures(survey):
        console.print(Text.assemble(f"  {one.name}: ", (one.value, "bold"), f"  {one.text}"))
    for finding in survey.findings:
        console.print(Text.assemble("  - ", (finding.title, "bold"), ". ", finding.text))
    if survey.advice is not None:
        console.print(Text(" ".join(dependence(survey)), style="bold"))
    for reason in dict.fromkeys(survey.left_out.values()):
        parts = ", ".join(part for part, why in survey.left_out.items() if why == reason)
        console.print(Text(f"  left out: {parts} ({reason})", style="dim"))
    other = place.before is not None and place.before != survey.about.get("created")
    replaced = f", in place of the survey of {place.before}" if other else ""
    console.print(f"Wrote {page}{replaced}", soft_wrap=True, highlight=False, markup=False)
    console.print()
