"""`sinks bench`: speed against peers, in one run on one machine."""

import os
from pathlib import Path
from typing import no_type_check

import typer

from sinks.cli.terminal.progress import progress_bars, table_console

WIDE = 120
"""Columns of the GPU's tables where nobody says how many there are."""


def register(app: typer.Typer) -> None:
    """Add `sinks bench`, `sinks bench cpu` and `sinks bench gpu` to `app`."""
    group = typer.Typer(rich_markup_mode=None)
    group.callback(invoke_without_command=True)(bench)
    group.command("cpu")(cpu)
    group.command("gpu")(gpu)
    app.add_typer(group, name="bench")


@no_type_check  # the context that typer hands over is no `typer.Context`, and shape checking under test would object
def bench(context: typer.Context) -> None:
    """Measure speed against peers: say which bench, `sinks bench cpu` or `sinks bench gpu`."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def cpu(
    model: str | None = typer.Option(None, help="Name, Hub id, folder or GGUF file; by default the built-in model."),
    text: str | None = typer.Option(None, help="Name of a text, or a file; by default Python's language reference."),
    sinks: int | None = typer.Option(None, help="First tokens kept for ever; by default 4."),
    window: int | None = typer.Option(None, help="Most recent tokens kept, the current one included; by default 1020."),
    threads: int | None = typer.Option(None, help="Threads of every writer; by default one a core."),
    quick: bool = typer.Option(False, "--quick", help="A minute instead of ten: shorter streams and fewer rounds."),
    json: Path | None = typer.Option(None, help="Also write every number to this file: a new one, or an older result."),
    accept_terms: bool = typer.Option(
        False, "--accept-terms", help="Accept the licence terms of a model that asks for it."
    ),
) -> None:
    """Tokens a second on this processor: float32, int8, int4, transformers, llama.cpp, in turn; what rounding costs.

    llama.cpp takes part where llama-cpp-python is installed and the model is a GGUF file, as the built-in one is.
    """
    from dataclasses import asdict, replace

    from sinks.assets.catalogue import DEFAULT_TEXT
    from sinks.assets.texts import read_text
    from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW
    from sinks.cache.plan import Plan
    from sinks.evals.speed.entrants import gather
    from sinks.evals.speed.measure import QUICK, Bench, load_average, race, use_threads
    from sinks.report.document import to_json
    from sinks.report.files import results_file
    from sinks.report.speed import provenance, speed_document, speed_summary

    load_before = load_average()
    use_threads(os.cpu_count() or 1 if threads is None else threads)
    plan = Plan(DEFAULT_SINKS if sinks is None else sinks, DEFAULT_WINDOW if window is None else window)
    settings = replace(QUICK if quick else Bench(), plan=plan)
    with results_file(json, mark="writers") as write, progress_bars() as stage:
        read = read_text(text or DEFAULT_TEXT)
        entrants = gather(model, read.text, settings, accept_terms=accept_terms, stage=stage)
        speeds = race(entrants.writers, entrants.ids, settings, stage)
        source = {key: value for key, value in asdict(read).items() if key != "text"}
        about = provenance(entrants, source, load_before)
        write(to_json(speed_document(settings, speeds, entrants, about)))
    console = table_console()
    console.print(speed_summary(settings, speeds, entrants, load_before))


def gpu(
    quick: bool = typer.Option(False, "--quick", help="Two shapes, two batches and one text instead of everything."),
    only: str | None = typer.Option(None, help="Only this part: decode or attention; by default both."),
    json: Path | None = typer.Option(None, help="Also write every number to this file: a new one, or an older result."),
) -> None:
    """What this GPU does: tokens a second against its ceiling and transformers, attention against FlexAttention.

    Random weights in known shapes, and the built-in model where it can be had. The ceilings are measured in the same
    run, and so is dense attention; who could not take part, and why, is said at the end. It takes ten minutes or more;
    the file of --json grows as the bench goes on.
    """
    from dataclasses import replace

    from sinks.evals.speed.gpu.bench import QUICK, GpuBench, Measured, measure
    from sinks.evals.speed.gpu.clock import need_gpu
    from sinks.report.document import to_json
    from sinks.report.files import results_file
    from sinks.report.gpu_speed import gpu_document, gpu_summary

    settings = QUICK if quick else GpuBench()
    if only is not None:
        settings = replace(settings, parts=(only,))
    need_gpu("bench gpu")
    with results_file(json, mark="ceilings") as write, progress_bars() as stage:

        def keep(found: Measured) -> None:
            write(to_json(gpu_document(settings, found)))

        found = measure(settings, stage, keep)
    console = table_console(plain=WIDE)
    console.print(gpu_summary(found))
