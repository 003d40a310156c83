"""The bridge to EleutherAI's lm-evaluation-harness: its tasks under dense attention, a plain window, or sinks.

    from sinks.evals.harness import harness

    found = harness(loaded, ["lambada_openai"], limit=100)      # one model, three ways to read, the same requests
    found["sinks"]["results"]["lambada_openai"]

The harness does not look for models of other packages, so its own command line runs through this module:
`python -m sinks.evals.harness run --model sinks --model_args pretrained=smollm2,attention=sinks ...`; see
docs/harness.md. Nothing here imports the harness (`lm-eval`, an optional extra) until it is used.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from itertools import groupby
from os.path import commonprefix
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from sinks.cache.cache import DEFAULT_SINKS, DEFAULT_WINDOW, SinkCache
from sinks.cache.plan import check_whole
from sinks.errors import InvalidInput, SinksError, UnsupportedOption
from sinks.models.attach import attach
from sinks.models.load import Loaded, load
from sinks.reading.perplexity import finite, surprise
from sinks.reading.tokens import stream_ids
from sinks.types import Listener, ignore

NAME = "sinks"
"""What `--model` of the harness calls it."""

MODES = ("dense", "window", "sinks")

Tokens = list[int]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Reading:
    """How a model reads a request. Raises InvalidInput where it makes no sense.

    `attention` is one of `MODES`. "sinks" holds the first `sinks` and the last `window` tokens; "window" holds the last
    `sinks + window`, so that both have equal memory; "dense" holds all, as the harness's own `hf` model does, and like
    it drops the oldest tokens beyond the model's trained length. Texts are fed `chunk` tokens at a time and up to
    `batch_size` of them side by side; both change speed and memory only.
    """

    attention: str = "sinks"
    sinks: int = DEFAULT_SINKS
    window: int = DEFAULT_WINDOW
    chunk: int = 256
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.attention not in MODES:
            raise InvalidInput(f"attention={self.attention!r} is not known: choose one of {', '.join(MODES)}")
        for name, least in {"sinks": 0, "window": 1, "chunk": 1, "batch_size": 1}.items():
            check_whole(name, getattr(self, name), least=least)

    @property
    def bounded(self) -> bool:
        """Whether a stream of any length fits."""
        return self.attention != "dense"

    def cache(self, model: PreTrainedModel) -> Cache:
        """An empty cache; raises as `SinkCache.for_model`."""
        if not self.bounded:
            return DynamicCache(config=model.config)
        sinks = self.sinks if self.attention == "sinks" else 0
        return SinkCache.for_model(model, sinks=sinks, window=self.sinks + self.window - sinks)


@dataclass(frozen=True)
class Row:
    """One text to feed. What it is to predict begins at token `first`; `wanted` says it by number of the request.

    Requests that differ in their very last token only, such as A, B, C or D after a question, share a row.
    """

    fed: Tokens
    first: int
    wanted: dict[int, Tokens]

    def targets(self, request: int, start: int, stop: int) -> Tokens:
        """What the columns `start` to `stop` are to predict."""
        return self.wanted[request][start + 1 - self.first : stop + 1 - self.first]


class Reader:
    """One model under one `Reading`, token ids in and numbers out; knows nothing of the harness."""

    def __init__(self, model: PreTrainedModel, reading: Reading) -> None:
        self.model, self.reading = model, reading
        if reading.bounded:
            attach(model)
        reading.cache(model)  # raises now if it does not fit the model
        self._can_trim = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[Tokens, Tokens]], listen: Listener = ignore) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-likelihood in nats, and whether every token is the likeliest.

        Both must have a token. Of the texts side by side in one batch, the beginning that all share is read once.
        """
        for context, continuation in pairs:
            if not context or not continuation:
                raise InvalidInput("a request to score needs a token before, and a token that is to be scored")
        rows: dict[tuple[tuple[int, ...], tuple[int, ...]], Row] = {}
        for request, (context, continuation) in enumerate(pairs):
            key = tuple(context), tuple(continuation[:-1])
            row = rows.setdefault(key, Row([*key[0], *key[1]], len(context), {}))
            row.wanted[request] = continuation
        answers = [(0.0, True)] * len(pairs)
        order = sorted(rows, key=lambda key: (-len(key[0]), key))  # equal contexts side by side
        for keys in in_batches(order, self.reading.batch_size):
            for request, (likelihood, greedy) in self._score([rows[key] for key in keys]):
                answers[request] = answers[request][0] + likelihood, answers[request][1] and greedy
            listen(sum(len(rows[key].wanted) for key in keys))
        return answers

    def _score(self, rows: list[Row]) -> Iterator[tuple[int, tuple[float, bool]]]:
        """The share of every pass in every request."""
        for start, logits in self._passes(rows):
            for row, own in zip(rows, logits, strict=True):
                begin, end = max(start, row.first - 1), min(start + len(own), len(row.fed))
                for request in row.wanted if begin < end else ():
                    targets = torch.tensor(row.targets(request, begin, end), device=own.device)
                    used = own[begin - start : end - start]
                    nll = finite(surprise(used, targets).cpu(), begin + 1, self.model.dtype)
                    yield request, (-float(nll.sum()), bool((used.argmax(-1) == targets).all()))

    def _passes(self, rows: list[Row]) -> Iterator[tuple[int, Tensor]]:
        """Feed the rows side by side, and give the logits that predict something with their first column.

        The rows are padded on the right: dense attention does not see what comes after, and a SinkCache is told.
        """
        cache = self.reading.cache(self.model)
        needed = min(row.first for row in rows) - 1  # the first column whose logits are used
        ids, real = padded([row.fed for row in rows], self.model.device)
        shared = min(len(commonprefix([row.fed for row in rows])), needed) if len(rows) > 1 else 0
        for start in range(0, shared, self.reading.chunk):
            self._forward(ids[:1, start : min(start + self.reading.chunk, shared)], None, cache, 1)
        if shared:
            cache.batch_repeat_interleave(len(rows))
        for start in range(shared, ids.shape[1], self.reading.chunk):
            part = slice(start, min(start + self.reading.chunk, ids.shape[1]))
            pads = self.reading.bounded and not bool(real[:, part].all())
            keep = part.stop - max(part.start, needed)
            logits = self._forward(ids[:, part], real[:, part].long() if pads else None, cache, max(1, keep))
            if keep > 0:
                yield part.stop - logits.shape[1], logits

    def _forward(self, ids: Int[Tensor, "rows columns"], mask: Tensor | None, cache: Cache, keep: int) -> Tensor:
        """The logits of the last `keep` columns, or of all where the model cannot leave any out."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self._can_trim else {}
        return self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **options).logits

    @torch.inference_mode()
    def write(self, contexts: list[Tokens], pad: int, **options: Any) -> list[Tokens]:
        """Continue the contexts side by side, by transformers' own `generate` and its `options`; new tokens only."""
        ids, real = padded(contexts, self.model.device, pad, left=True)
        if self.reading.bounded:
            options |= {"past_key_values": self.reading.cache(self.model), "prefill_chunk_size": self.reading.chunk}
        written = self.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=real.long(), pad_token_id=pad, use_cache=True, **options
        )
        return written[:, ids.shape[1] :].tolist()


def in_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of `size`, the last one perhaps shorter."""
    return (items[start : start + size] for start in range(0, len(items), size))


def padded(
    rows: Sequence[Tokens], device: torch.device, pad: int = 0, left: bool = False
) -> tuple[Int[Tensor, "rows columns"], Bool[Tensor, "rows columns"]]:
    """The rows as one tensor, and where it holds tokens."""
    columns = max(len(row) for row in rows)
    gaps = [columns - len(row) for row in rows]
    ids = [[pad] * gap + row if left else row + [pad] * gap for row, gap in zip(rows, gaps, strict=True)]
    real = [[0] * gap + [1] * len(row) for row, gap in zip(rows, gaps, strict=True)]
    mask = torch.tensor(real if left else [marks[::-1] for marks in real], device=device)
    return torch.tensor(ids, device=device), mask.bool()


class Bridge:
    """What the harness asks of a language model, answered by a `Reader`; `SinksLM` is this with the harness's own base.

    `pretrained` is all that `sinks.load` takes, or what it gave; the other `model_args` are the fields of `Reading`,
    and `dtype`, `device`, `trust_remote_code` and `accept_terms` of `load`.
    """

    backend = "causal"
    max_gen_toks = 256

    def __init__(self, pretrained: str | Loaded | None = None, max_batch_size: object = None, **options: Any) -> None:
        super().__init__()
        fields = {name: options.pop(name) for name in Reading.__dataclass_fields__ if name in options}
        if not str(fields.get("batch_size", 1)).isdecimal() or max_batch_size is not None:
            raise UnsupportedOption("batch_size must be a number here: nothing looks for the largest that fits")
        if "batch_size" in fields:  # the harness's command line gives text
            fields["batch_size"] = int(fields["batch_size"])
        self.loaded = loaded(pretrained, **options)
        self.tokenizer = self.loaded.tokenizer
        self.reader = Reader(self.loaded.model, Reading(**fields))
        self._device = self.loaded.model.device

    # Text and tokens

    @property
    def eot_token_id(self) -> int | None:
        """EOS, at which generation stops."""
        return self._token("eos")

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text's first token so that this can be scored, as the harness has it: BOS, else EOS."""
        for token in (self._token("bos"), self._token("eos")):
            if token is not None:
                return token
        raise UnsupportedOption("this tokenizer has neither BOS nor EOS: give the task a context that is not empty")

    def _token(self, name: str) -> int | None:
        token = getattr(self.tokenizer, f"{name}_token_id")
        return token if isinstance(token, int) else None

    @property
    def max_length(self) -> int | None:
        """The most tokens that dense attention reads, as the harness counts them; None in a stream."""
        if self.reader.reading.bounded:
            return None
        return lm_eval("models.utils").resolve_max_length(self.loaded.model.config, self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What the harness's cache of requests goes by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> Tokens:
        """Token ids by the tokenizer's own convention (see `stream_ids`), unless the text begins with BOS itself."""
        ids, bos = stream_ids(self.tokenizer, string)
        begins = bos is not None and string.startswith(str(self.tokenizer.bos_token))
        plain = begins if add_special_tokens is None else not add_special_tokens
        return ids[1:] if plain and bos is not None else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the model's own template."""
        options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        options["continue_final_message"] = not add_generation_prompt
        return str(self.tokenizer.apply_chat_template(chat_history, **options))

    # The three kinds of requests

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, Tokens, Tokens]], disable_tqdm: bool = False, **_: object
    ) -> list[tuple[float, bool]]:
        pairs = [self._shortened(context, continuation) for _, context, continuation in requests]
        with bar("loglikelihood", len(pairs), disable_tqdm) as listen:
            return self.reader.score(pairs, listen)

    def _shortened(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, Tokens]:
        """For dense attention, without the tokens that do not fit: the same that the harness's `hf` leaves out."""
        if self.max_length is None:
            return context, continuation
        if len(continuation) > self.max_length:
            raise InvalidInput(
                f"a continuation has {len(continuation)} tokens, and dense attention of this model reads "
                f"{self.max_length}: choose attention=window or attention=sinks"
            )
        return context[-(self.max_length + 1 - len(continuation)) :], continuation

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts in nats: each is one stream through one cache, and is never chopped.

        Only dense attention reads what is longer than its trained length in pieces, as the harness's `hf` does.
        BOS stands once before a text, and is not scored.
        """
        pieces: list[tuple[Tokens, Tokens]] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            found = self._pieces(ids) if ids else []
            pieces += found
            owner += [number] * len(found)
        with bar("loglikelihood_rolling", len(pieces), disable_tqdm) as listen:
            scores = self.reader.score(pieces, listen)
        totals = [0.0] * len(requests)
        for number, (likelihood, _) in zip(owner, scores, strict=True):
            totals[number] += likelihood
        return totals

    def _pieces(self, ids: Tokens) -> list[tuple[Tokens, Tokens]]:
        if self.max_length is None:
            return [([self.prefix_token_id], ids)]
        utils = lm_eval("utils")
        windows = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
        return [utils.make_disjoint_window(window) for window in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context until a stop sequence, EOS or the task's limit; a stream may be of any length.

        Whatever else a task asks for (`temperature`, `top_p`) goes to transformers' `generate`.
        """
        asked = [(self.tok_encode(request.args[0]), request.args[1]) for request in requests]
        order = sorted(range(len(asked)), key=lambda at: (repr(asked[at][1]), -len(asked[at][0])))
        answers = [""] * len(asked)
        with bar("generate_until", len(asked), disable_tqdm) as listen:
            for _, alike in groupby(order, key=lambda at: repr(asked[at][1])):
                for batch in in_batches(list(alike), self.reader.reading.batch_size):
                    texts = self._generate([asked[at][0] for at in batch], asked[batch[0]][1])
                    for at, text in zip(batch, texts, strict=True):
                        answers[at] = text
                    listen(len(batch))
        return answers

    def _generate(self, contexts: list[Tokens], asked: dict[str, Any]) -> list[str]:
        helpers = lm_eval("models.utils")
        options = helpers.normalize_gen_kwargs(asked, self.max_gen_toks)
        eos = None if self.eot_token_id is None else str(self.tokenizer.decode(self.eot_token_id))
        until = helpers.handle_stop_sequences(options.pop("until", None), eos=eos)
        limit = options.pop("max_gen_toks")
        if not options["do_sample"]:
            options.pop("temperature", None)
        if self.max_length is not None:
            if limit >= self.max_length:
                raise InvalidInput(f"{limit} new tokens leave no room: dense attention reads {self.max_length}")
            contexts = [context[limit - self.max_length :] for context in contexts]
        pad = next(token for token in (self._token("pad"), self._token("eos"), 0) if token is not None)
        columns = max(len(context) for context in contexts)
        stop = lm_eval("models.utils_hf").stop_sequences_criteria(self.tokenizer, until, columns, len(contexts))
        written = self.reader.write(contexts, pad, max_new_tokens=limit, stopping_criteria=stop, **options)
        # In a batch a row goes on until all have stopped, and EOS would leave no trace in the text.
        ends = [tokens.index(self.eot_token_id) if self.eot_token_id in tokens else None for tokens in written]
        written = [tokens[:end] for tokens, end in zip(written, ends, strict=True)]
        texts = [str(self.tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in written]
        return [helpers.postprocess_generated_text(text, stop=until, think_end_token=None) for text in texts]

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results."""
        model, source = self.loaded.model, self.loaded.source
        numbers = {"model_num_parameters": model.num_parameters(), "model_dtype": str(model.dtype)}
        return numbers | {"model_source": asdict(source), "reading": asdict(self.reader.reading)}


def loaded(pretrained: str | Loaded | None, **options: Any) -> Loaded:
    """The model to evaluate: loaded by name with the options of `load`, or as it is."""
    known = ("dtype", "device", "trust_remote_code", "accept_terms")
    if unknown := sorted(options.keys() - set(known)):
        takes = ", ".join(("pretrained", *Reading.__dataclass_fields__, *known))
        raise UnsupportedOption(f"the harness's model {NAME!r} has no option {unknown[0]!r}: it takes {takes}")
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(pretrained, Loaded):
        return pretrained
    if str(options.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
        # The harness's command line says cuda:0 when its user says nothing, and its `hf` falls back as well.
        _log.warning("no CUDA device here: device=%s becomes cpu", options["device"])
        options["device"] = "cpu"
    return load(pretrained, **options)


@contextmanager
def bar(what: str, total: int, disable: bool) -> Iterator[Listener]:
    """A progress bar of the harness's own kind."""
    with import_module("tqdm").tqdm(total=total, desc=f"{NAME}: {what}", disable=disable) as drawn:
        yield drawn.update


# The harness itself


def lm_eval(module: str = "") -> Any:
    """A module of the harness. Raises UnsupportedOption where it is not installed."""
    try:
        return import_module(f"lm_eval.{module}".rstrip("."))
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "lm_eval":
            raise
        raise UnsupportedOption(
            'this needs the lm-evaluation-harness, which is not installed: pip install "sinks[lm-eval]"'
        ) from error


@functools.cache
def model_class() -> Any:
    """The class that the harness knows as `sinks`, also to be had as `sinks.evals.harness.SinksLM`."""
    names = {"__module__": __name__, "__doc__": Bridge.__doc__}
    return type("SinksLM", (Bridge, lm_eval("api.model").TemplateLM), names)


def __getattr__(name: str) -> Any:
    """`SinksLM` is made when it is first asked for: before that, the harness need not be there (PEP 562)."""
    if name == "SinksLM":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the model `sinks` known to the harness in this process; twice is once."""
    lm_eval("models")  # its own models first: it does not list them once it knows any other
    registry = lm_eval("api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME, target="sinks.evals.harness:SinksLM")


def harness(
    loaded: Loaded, tasks: Sequence[Any], modes: Sequence[str] = MODES, reading: Reading | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """The harness's `simple_evaluate` on one loaded model, once for each of `modes`: its whole results by mode.

    `tasks` are names or task objects of the harness, and `options` go to `simple_evaluate` (`limit`, `num_fewshot`,
    `task_manager`). `reading` sets the sizes; its own attention is not used.

    Raises UnsupportedOption where the harness is not installed, InvalidInput for a mode that is none.
    """
    evaluate = lm_eval("evaluator").simple_evaluate
    sizes = reading or Reading()
    models = {mode: model_class()(loaded, **asdict(replace(sizes, attention=mode))) for mode in modes}
    return {mode: evaluate(model=model, tasks=list(tasks), **options) for mode, model in models.items()}


def main() -> None:
    """The harness's own command line, with the model `sinks` among the others."""
    try:
        register()
        lm_eval("__main__").cli_evaluate()
    except SinksError as error:
        sys.exit(f"sinks: {error}")


if __name__ == "__main__":
    main()
