"""`sinks models`: what is built in, what is supported, fetching ahead of time, and checking a model of one's own."""

import json
import sys
from dataclasses import asdict
from typing import Any, no_type_check

import typer

from sinks.cli.terminal.progress import print_rows

_JSON = typer.Option(False, "--json", help="Print JSON instead of a table.")


def register(app: typer.Typer) -> None:
    """Add `sinks models`, `sinks models fetch` and `sinks models check` to `app`."""
    group = typer.Typer(rich_markup_mode=None)
    group.callback(invoke_without_command=True)(models)
    group.command("fetch")(fetch)
    group.command("check")(check)
    app.add_typer(group, name="models")


@no_type_check  # the context that typer hands over is no `typer.Context`, and shape checking under test would object
def models(
    context: typer.Context,
    supported: bool = typer.Option(False, "--supported", help="Show which model families can stream, and why not."),
    as_json: bool = _JSON,
) -> None:
    """List the built-in models and texts, or fetch and check one."""
    if context.invoked_subcommand is not None:
        return
    if supported:
        _show_supported(as_json)
    else:
        _show_built_in(as_json)


def fetch(
    name: str = typer.Argument(..., help="A built-in model or text; `sinks models` lists them."),
    accept_terms: bool = typer.Option(False, "--accept-terms", help="You have read and accept the model's terms."),
) -> None:
    """Bring a built-in model or text into the cache folder, so that later everything works without a network."""
    from sinks.assets.catalogue import ModelAsset, find_asset
    from sinks.assets.fetch import fetch as fetch_payload

    asset = find_asset(name)
    if isinstance(asset, ModelAsset):
        agreed = accept_terms or _ask_for_consent(asset)
        typer.echo(f"{asset.name} is ready in {_prepare(asset, agreed)}")
    elif asset.payload is None:
        typer.echo(f"{asset.name} is part of this Python and needs no fetching")
    else:
        typer.echo(f"{asset.name} is ready in {fetch_payload(asset.payload).parent}")


def _prepare(asset: Any, accept_terms: bool) -> Any:
    if asset.kind == "causal":
        from sinks.models.load import prepare  # torch, only now that there is something to convert

        return prepare(asset.name, accept_terms=accept_terms)
    from sinks.models.encoders import prepare_encoder

    return prepare_encoder(asset.name)


def check(
    model: str = typer.Argument(..., help="A built-in model, a folder, a .gguf file, or a Hub id."),
    accept_terms: bool = typer.Option(False, "--accept-terms", help="You have read and accept the model's terms."),
    trust_remote_code: bool = typer.Option(
        False, "--trust-remote-code", help="Run Python code that the model brings along."
    ),
    as_json: bool = _JSON,
) -> None:
    """Load a model and say whether it can stream, and how or why not. Exit status 1 when it cannot."""
    from sinks.errors import UnsupportedModel
    from sinks.models.families import describe
    from sinks.models.load import load

    loaded = load(model, accept_terms=accept_terms, trust_remote_code=trust_remote_code)
    name, model_type = loaded.source.name, loaded.model.config.model_type
    answer: dict[str, Any] = {"model": name, "model_type": model_type, "source": asdict(loaded.source)}
    try:
        scheme = _scheme_entry(describe(loaded.model))
    except UnsupportedModel as error:
        answer |= {"supported": False, "reason": str(error), "scheme": None}
        line = f"{name}: {error}"
    else:
        answer |= {"supported": True, "reason": None, "scheme": scheme}
        told = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in scheme.items() if value not in (None, ""))
        line = f"{name} ({model_type}) can stream: {told}"
    typer.echo(json.dumps(answer, indent=1) if as_json else line)
    if not answer["supported"]:
        raise typer.Exit(1)


def _scheme_entry(scheme: Any) -> dict[str, Any]:
    family = scheme.family
    return {
        "positions": family.positions,
        "convention": family.convention,
        "route": family.route,
        "layers": len(scheme.layers),
        "layers_with_a_window_of_their_own": sum(layer.own_window is not None for layer in scheme.layers),
        "trained_length": scheme.trained_length,
        "note": family.note,
    }


def _ask_for_consent(asset: Any) -> bool:
    """Whether the person at the terminal accepts the terms now; False, without asking, when nobody sits there."""
    from sinks.assets.fetch import fetch_terms, terms_accepted

    if terms_accepted(asset) or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    document = fetch_terms(asset)
    return typer.confirm(
        f"{asset.title} is under the {asset.licence}.\nRead them in {document}.\nDo you accept them?", err=True
    )


def _show_built_in(as_json: bool) -> None:
    from sinks.assets.folder import cache_folder

    entries = [*_model_entries(), *_text_entries()]
    if as_json:
        typer.echo(json.dumps({"cache_folder": str(cache_folder()), "built_in": entries}, indent=1))
        return
    rows = [
        (
            entry["name"],
            entry["kind"],
            "none" if not entry["download_bytes"] else f"{entry['download_bytes'] / 1e6:.1f} MB",
            "yes" if entry["cached"] else "no",
            entry["licence"],
            entry["title"],
        )
        for entry in entries
    ]
    print_rows(("name", "kind", "download", "here", "licence", "what it is"), rows)
    typer.echo(f"Cache folder: {cache_folder()}")


def _model_entries() -> list[dict[str, Any]]:
    from sinks.assets.catalogue import DEFAULT_MODEL, MODELS
    from sinks.assets.fetch import cached

    return [
        {
            "name": asset.name,
            "kind": "model" if asset.kind == "causal" else f"{asset.kind} model",
            "title": asset.title,
            "aliases": list(asset.aliases),
            "default": asset.name == DEFAULT_MODEL,
            "licence": asset.licence,
            "needs_consent": asset.terms is not None,
            "download_bytes": asset.payload.download_bytes,
            "sha256": asset.payload.sha256,
            "cached": cached(asset.payload) is not None,
        }
        for asset in MODELS.values()
    ]


def _text_entries() -> list[dict[str, Any]]:
    from sinks.assets.catalogue import DEFAULT_TEXT, TEXTS
    from sinks.assets.fetch import cached

    return [
        {
            "name": asset.name,
            "kind": "text",
            "title": asset.title,
            "aliases": [],
            "default": asset.name == DEFAULT_TEXT,
            "licence": asset.licence,
            "needs_consent": False,
            "download_bytes": asset.payload.download_bytes if asset.payload else 0,
            "sha256": asset.payload.sha256 if asset.payload else None,
            "cached": asset.payload is None or cached(asset.payload) is not None,
        }
        for asset in TEXTS.values()
    ]


def _show_supported(as_json: bool) -> None:
    from sinks.models.families import FAMILIES, REFUSED

    fields = ("model_type", "positions", "route", "convention", "note")
    families = [{field: getattr(family, field) for field in fields} for family in FAMILIES.values()]
    if as_json:
        typer.echo(json.dumps({"supported": families, "refused": dict(REFUSED)}, indent=1))
        return
    print_rows(("model type", *fields[1:]), [tuple(family[field] for field in fields) for family in families])
    if REFUSED:
        print_rows(("refused", "reason"), list(REFUSED.items()))
