"""`sinks compare`: one real model reads one real text in several ways, side by side."""

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinks.cli.flags import AcceptTerms, Device, Dtype, Quant, kind_of
from sinks.cli.terminal.progress import progress_bars, table_console

if TYPE_CHECKING:
    from sinks.evals.arms import Settings
    from sinks.evals.compare import Comparison

TOKENS = 8192
"""Tokens read unless asked otherwise: what the built-in model was trained on, so dense attention is at its best."""

FILES = ("compare.json", "compare.png")


@dataclass(frozen=True)
class Flags:
    """What can be asked of `sinks compare`."""

    model: Annotated[
        str | None, typer.Option(help="Name, Hub id, folder or GGUF file; by default the built-in model.")
    ] = None
    text: Annotated[
        str | None, typer.Option(help="Name of a text, or a file; by default Python's language reference.")
    ] = None
    tokens: Annotated[
        int | None, typer.Option(help=f"Tokens to read; by default {TOKENS}, or all if there are fewer.")
    ] = None
    sinks: Annotated[int | None, typer.Option(help="First tokens kept for ever; by default 4.")] = None
    window: Annotated[
        int | None, typer.Option(help="Most recent tokens kept, the current one included; by default 1020.")
    ] = None
    arms: Annotated[
        str | None,
        typer.Option(
            help="Which of dense, window, recompute, sinks, sweep, newlines, with commas between; by default all."
        ),
    ] = None
    cache: Annotated[
        str, typer.Option(help="full, or int8: measures the sinks a second time, with 8 bits a number.")
    ] = "full"
    seed: Annotated[int, typer.Option(help="Draws the positions at which re-computation is measured.")] = 0
    samples: Annotated[int, typer.Option(help="At how many positions re-computation is measured.")] = 128
    chunk: Annotated[int, typer.Option(help="Tokens read in one forward pass: changes speed and memory only.")] = 256
    beyond_trained_length: Annotated[
        bool, typer.Option("--beyond-trained-length", help="Let dense attention read past its trained length.")
    ] = False
    out: Annotated[Path, typer.Option(help="Folder for compare.png and compare.json.")] = Path("sinks-compare")
    json: Annotated[bool, typer.Option("--json", help="Print compare.json, and the table on standard error.")] = False
    device: Device = "cpu"
    dtype: Dtype = "float32"
    quant: Quant = "none"
    accept_terms: AcceptTerms = False


def register(app: typer.Typer) -> None:
    """Add `compare` to `app`."""

    @app.command("compare")
    @functools.wraps(Flags, assigned=("__annotations__",), updated=())  # typer reads the flags from the class's fields
    def command(**flags: Any) -> None:
        """Read a text with dense attention, a plain window, re-computation and sinks, and compare them.

        Prints a table and writes compare.png and compare.json. Every bounded reader holds the same number of keys.
        """
        run(Flags(**flags))


def run(flags: Flags) -> None:
    """Measure, then write both files, then print."""
    from sinks.report.document import document, to_json
    from sinks.report.files import results_folder, write_together
    from sinks.report.plots import comparison_figure, png
    from sinks.report.tables import summary
    from sinks.report.words import reading

    settings = settings_of(flags)
    with results_folder(flags.out, FILES) as folder:
        comparison, about = measure(flags, settings)
        title = title_of(comparison, about)
        text = to_json(document(comparison, about, reading(comparison)))
        picture = png(comparison_figure(comparison, title))
        paths = write_together(folder, dict(zip(FILES, (text.encode(), picture), strict=True)))
    console = table_console(stderr=flags.json)
    console.print(summary(comparison, title))
    written = " and ".join(str(path) for path in paths)
    console.print(f"\nWrote {written}", soft_wrap=True, highlight=False, markup=False)
    if flags.json:
        typer.echo(text, nl=False)


def settings_of(flags: Flags) -> "Settings":
    """The settings that the flags ask for, checked. Raises InvalidInput."""
    from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW
    from sinks.errors import InvalidInput
    from sinks.evals.arms import ARMS, Settings

    if flags.tokens is not None and flags.tokens < 1:
        raise InvalidInput(f"tokens must be at least 1, got {flags.tokens}")
    asked = ARMS if flags.arms is None else tuple(arm.strip() for arm in flags.arms.split(",") if arm.strip())
    return Settings(
        sinks=DEFAULT_SINKS if flags.sinks is None else flags.sinks,
        window=DEFAULT_WINDOW if flags.window is None else flags.window,
        arms=asked,
        seed=flags.seed,
        samples=flags.samples,
        chunk=flags.chunk,
        beyond_trained_length=flags.beyond_trained_length,
        cache=kind_of(flags.cache),
    )


def measure(flags: Flags, settings: "Settings") -> tuple["Comparison", dict[str, Any]]:
    """Load, check everything that can be wrong, and only then work. Returns the comparison and where it comes from."""
    from sinks.assets.catalogue import DEFAULT_TEXT
    from sinks.assets.texts import read_text
    from sinks.cache.cache import SinkCache
    from sinks.evals.arms import contenders
    from sinks.evals.compare import compare
    from sinks.models.attach import attach
    from sinks.models.load import load
    from sinks.reading.memory import meter_for
    from sinks.reading.provenance import machine, now, versions
    from sinks.reading.tokens import cut, stream_ids

    text = read_text(flags.text or DEFAULT_TEXT)
    loaded = load(
        flags.model, dtype=flags.dtype, device=flags.device, accept_terms=flags.accept_terms, quant=flags.quant
    )
    model = attach(loaded.model)
    SinkCache.for_model(model, sinks=settings.sinks, window=settings.window)  # raises if they do not fit the model
    every_id, bos = stream_ids(loaded.tokenizer, text.text)
    ids = cut(every_id, flags.tokens, TOKENS, settings.needed).to(model.device)
    arms = contenders(settings, model, loaded.tokenizer, bos)
    with progress_bars() as stage:
        comparison = compare(model, ids, settings, arms, meter_for(model.device), stage)
    source = {key: value for key, value in asdict(text).items() if key != "text"}
    return comparison, {
        "created": now(),
        "model": asdict(loaded.source) | {"dtype": flags.dtype, "quant": flags.quant, "device": str(model.device)},
        "text": source | {"tokens": len(every_id), "bos": bos},
        "machine": machine(model.device),
        "versions": versions(),
    }


def title_of(comparison: "Comparison", about: Mapping[str, Any]) -> str:
    """What was read by which model within how many keys, in one line."""
    from sinks.report.words import bounded

    model, text = about["model"], about["text"]
    held = f"; every bounded reader holds {comparison.settings.capacity:,} keys" if bounded(comparison) else ""
    note = f" ({model['note']})" if model["note"] else ""
    return f"{model['name']}{note} reads {comparison.tokens:,} tokens of {text['name']}{held}"
