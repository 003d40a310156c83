"""The bridge to the lm-evaluation-harness: against the harness's own model, and against `sinks` token by token.

What a `Reader` says needs no harness, so it is tested everywhere; the rest runs wherever `lm-eval` is installed.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sinks.cache.cache import SinkCache
from sinks.errors import CapacityError, InvalidInput, UnsupportedOption
from sinks.evals import harness as bridge
from sinks.evals.harness import Reader, Reading, harness
from sinks.models.load import Loaded, Source
from sinks.reading.perplexity import score
from tests.reading.tiny import BOS, TRAINED, stream, tiny_folder, tiny_model, tiny_tokenizer

needs_harness = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason='lm-eval is not installed: pip install "sinks[lm-eval]"'
)

SIZES: dict[str, Any] = {"sinks": 4, "window": 12}
IDS = stream(300).tolist()
PAIRS = [  # (context, continuation), most contexts longer than the window of 16 tokens
    (IDS[:100], IDS[100:101]),
    (IDS[:100], IDS[200:201]),  # differs from the one above in its last token only
    (IDS[:100], IDS[150:153]),
    (IDS[:100], IDS[150:190]),
    (IDS[:100] + IDS[150:151], IDS[151:153]),  # the same text as two above, cut elsewhere
    (IDS[:41], IDS[41:43]),
    (IDS[:1], IDS[1:60]),
    (IDS[:3], IDS[3:4]),
    (IDS[200:231], IDS[231:250]),
]


def one_by_one(attention: str, context: list[int], continuation: list[int], chunk: int = 1) -> float:
    """The log-likelihood by the scorer of `sinks`, fed token by token, or faster where the stream is long."""
    model, kept = tiny_model(), SIZES["sinks"] if attention == "sinks" else 0
    cache = SinkCache.for_model(model, sinks=kept, window=16 - kept)
    return -float(score(model, torch.tensor(context + continuation), cache, chunk).nll[len(context) :].sum())


# A Reader, for which the harness need not be there


@pytest.mark.parametrize("attention", ["window", "sinks"])
@pytest.mark.parametrize(("chunk", "batch_size"), [(1, 1), (7, 1), (7, 4), (256, 3), (32, 9)])
def test_scores_are_those_of_feeding_token_by_token(attention: str, chunk: int, batch_size: int):
    reader = Reader(tiny_model(), Reading(attention, chunk=chunk, batch_size=batch_size, **SIZES))
    heard: list[int] = []
    found = reader.score(PAIRS, heard.append)
    # transformers' norms and rotary angles stay in float32 even in a float64 model, and round otherwise in chunks.
    expected = [one_by_one(attention, *pair) for pair in PAIRS]
    assert [likelihood for likelihood, _ in found] == pytest.approx(expected, abs=1e-4)
    assert sum(heard) == len(PAIRS)


def test_sinks_window_and_dense_differ_past_the_window_and_agree_within_it():
    within, past = ([9, 8, 7], [6, 5]), PAIRS[0]
    for pair, same in ((within, True), (past, False)):
        dense, window, sinks = (
            Reader(tiny_model(), Reading(mode, **SIZES)).score([pair])[0][0] for mode in bridge.MODES
        )
        assert (window == pytest.approx(dense, abs=1e-5)) is same
        assert (sinks == pytest.approx(dense, abs=1e-5)) is same
        assert (sinks == pytest.approx(window, abs=1e-5)) is same


def test_a_context_that_several_requests_share_is_read_once():
    model, fed = tiny_model(), []
    model.model.register_forward_hook(lambda *given, **_: fed.append(given[2].last_hidden_state.shape[:2]))
    reader = Reader(model, Reading("sinks", chunk=50, batch_size=4, **SIZES))
    reader.score([(IDS[:100], IDS[at : at + 5]) for at in (100, 120, 140, 160)])
    assert [rows for rows, _ in fed] == [1, 1, 4], "99 tokens by one row, then four endings side by side"
    fed.clear()
    reader.score([(IDS[:100], [letter]) for letter in (1, 2, 3, 4)])
    assert sum(rows * columns for rows, columns in fed) == 100, "one text, whose last logits answer all four"


@pytest.mark.parametrize("attention", bridge.MODES)
def test_greedy_is_said_of_the_likeliest_continuation_only(attention: str):
    reader = Reader(tiny_model(), Reading(attention, chunk=8, **SIZES))
    written = reader.write([IDS[:40]], 0, max_new_tokens=6, do_sample=False)[0]
    other = [*written[:5], (written[5] + 1) % BOS]
    assert [greedy for _, greedy in reader.score([(IDS[:40], written), (IDS[:40], other)])] == [True, False]


@pytest.mark.parametrize("attention", ["window", "sinks"])
def test_writing_is_a_loop_over_a_sink_cache(attention: str):
    model, contexts = tiny_model(), [IDS[:90], IDS[100:103], IDS[50:67]]
    reading = Reading(attention, chunk=8, **SIZES)
    expected = []
    for context in contexts:
        cache, chosen = reading.cache(model), list[int]()
        logits = [model(input_ids=torch.tensor([[token]]), past_key_values=cache).logits for token in context][-1]
        for _ in range(40):
            chosen.append(int(logits[0, -1].argmax()))
            logits = model(input_ids=torch.tensor([chosen[-1:]]), past_key_values=cache).logits
        expected.append(chosen)
    assert Reader(model, reading).write(contexts, 0, max_new_tokens=40, do_sample=False) == expected


def test_window_and_sinks_hold_equally_many_keys():
    model = tiny_model()
    window, sinks = (Reading(mode, **SIZES).cache(model) for mode in ("window", "sinks"))
    assert (window.sinks, window.window, window.capacity) == (0, 16, 16)
    assert (sinks.sinks, sinks.window, sinks.capacity) == (4, 12, 16)


@pytest.mark.parametrize(
    "wrong", [{"attention": "flash"}, {"sinks": -1}, {"window": 0}, {"chunk": 0}, {"batch_size": 0}]
)
def test_sizes_that_make_no_sense(wrong: dict[str, Any]):
    with pytest.raises(InvalidInput, match=next(iter(wrong))):
        Reading(**wrong)


def test_what_cannot_be_scored_or_does_not_fit():
    with pytest.raises(InvalidInput, match="a token before"):
        Reader(tiny_model(), Reading(**SIZES)).score([([], [1])])
    with pytest.raises(CapacityError):
        Reader(tiny_model(), Reading("sinks", window=TRAINED))


def test_without_the_harness_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    for name in ["lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedOption, match=r"pip install \"sinks\[lm-eval\]\""):
        harness(loaded(), ["any"])
    with pytest.raises(UnsupportedOption, match="not installed"):
        bridge.register()


# With the harness


def tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """One token a byte; `<s>` begins every text, or is only EOS."""
    made = tiny_tokenizer(bos=bos)
    made.eos_token = "<s>"
    return made


def writer() -> LlamaForCausalLM:
    """The tiny model without the EOS that transformers would give it, so that it writes on."""
    model = tiny_model()
    model.generation_config.eos_token_id = None
    return model


def loaded(bos: bool = False) -> Loaded:
    return Loaded(writer(), tokenizer(bos), Source("tiny", "folder", "none", "", ""))


def language_model(attention: str, bos: bool = False, **options: Any) -> Any:
    return bridge.SinksLM(loaded(bos), attention=attention, **SIZES | options)


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    """What the harness hands over, as far as a model looks at it."""
    return [SimpleNamespace(args=one) for one in arguments]


LONG = "".join(chr(32 + token % 90) for token in stream(2 * TRAINED + 40).tolist())  # one byte a letter
ASKED = requests(
    ("The sky is", " blue"),
    ("The sky is ", "blue"),
    ("The sky is", " x"),
    ("The sky is", " y"),
    ("", "Once upon"),
    (LONG[:200], " end"),
    (LONG[: TRAINED + 30], "over the trained length"),
)
TEXTS = requests((LONG[:5],), (LONG[:300],), (LONG,))  # the last one is two trained lengths and a bit


def of_the_harness(bos: bool) -> Any:
    """The harness's own model on the same weights."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=writer(), tokenizer=tokenizer(bos), add_bos_token=bos)


@needs_harness
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_size": "4", "chunk": 33}])
def test_dense_is_the_model_of_the_harness(bos: bool, options: dict[str, Any]):
    ours, theirs = language_model("dense", bos, **options), of_the_harness(bos)
    found, expected = (model.loglikelihood(ASKED, disable_tqdm=True) for model in (ours, theirs))
    assert [likelihood for likelihood, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    for until in ([], ["a", "!"]):
        asked = [(request.args[0], {"until": until, "max_gen_toks": 25}) for request in ASKED if request.args[0]]
        written, there = (model.generate_until(requests(*asked), disable_tqdm=True) for model in (ours, theirs))
        assert written == there


@needs_harness
def test_dense_rolls_as_the_model_of_the_harness():
    found, expected = (model.loglikelihood_rolling(TEXTS) for model in (language_model("dense"), of_the_harness(False)))
    assert found == pytest.approx(expected, abs=1e-3)


@needs_harness
def test_bos_stands_once_and_is_not_scored():
    """The harness's own model puts its prefix before a text that has its BOS already, and scores the second one."""
    model = language_model("dense", bos=True)
    theirs = of_the_harness(True)
    ids = [ord(letter) for letter in "sky"]
    assert model.tok_encode("sky") == [BOS, *tokenizer(False)("sky").input_ids] == theirs.tok_encode("sky")
    assert model.tok_encode("<s>sky") == theirs.tok_encode("<s>sky") == model.tok_encode("sky")
    assert len(model.tok_encode("sky", add_special_tokens=False)) == len(ids)
    once = model.loglikelihood_rolling(requests(("sky",)))[0]
    theirs.add_bos_token = False
    assert once == pytest.approx(theirs.loglikelihood_rolling(requests(("sky",)))[0], abs=1e-5)


@needs_harness
@pytest.mark.parametrize("attention", ["window", "sinks"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_text_of_any_length_is_one_stream(attention: str, bos: bool):
    model = language_model(attention, bos)
    expected = [one_by_one(attention, [BOS], tokenizer(False)(request.args[0]).input_ids, 12) for request in TEXTS]
    assert model.loglikelihood_rolling(TEXTS) == pytest.approx(expected, abs=1e-3)
    assert model.loglikelihood_rolling(requests(("",))) == [0.0]


@needs_harness
@pytest.mark.parametrize("attention", ["window", "sinks"])
def test_a_stream_takes_contexts_and_continuations_beyond_the_trained_length(attention: str):
    model = language_model(attention, batch_size=3)
    (found, _), *_ = model.loglikelihood(requests((LONG, LONG[:600])))
    ids = [tokenizer(False)(text).input_ids for text in (LONG, LONG[:600])]
    assert found == pytest.approx(one_by_one(attention, *ids, 12), abs=1e-3)
    with pytest.raises(InvalidInput, match="choose attention=window"):
        language_model("dense").loglikelihood(requests((LONG, LONG[:600])))


@needs_harness
@pytest.mark.parametrize("attention", bridge.MODES)
def test_generation_stops_where_it_is_told(attention: str):
    model = language_model(attention, batch_size=2)
    starts = [LONG[at : at + 60] for at in range(0, 160, 20)]  # it writes EOS early after some
    texts = model.generate_until(requests(*[(start, {"max_gen_toks": 30}) for start in starts]))
    start, free = next((start, text) for start, text in zip(starts, texts, strict=True) if len(text) > 5)
    stop = free[4]
    assert model.generate_until(requests((start, {"until": [stop], "max_gen_toks": 30}))) == [free.split(stop)[0]]
    torch.manual_seed(0)
    sampled = model.generate_until(requests((start, {"do_sample": True, "temperature": 3.0, "max_gen_toks": 30})))
    assert sampled != [free]


@needs_harness
@pytest.mark.parametrize(
    ("options", "words"),
    [({"tokens": 9}, "no option 'tokens'"), ({"batch_size": "auto"}, "must be a number"), ({"chunk": 0}, "chunk=0")],
)
def test_options_that_are_none(options: dict[str, Any], words: str):
    with pytest.raises((UnsupportedOption, InvalidInput), match=words):
        language_model("sinks", **options)


# A whole run

TASKS = {
    "tiny_choice": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"},
    "tiny_roll": {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}"},
    "tiny_write": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8},
    },
}
METRICS = {"tiny_choice": ["acc"], "tiny_roll": ["bits_per_byte"], "tiny_write": ["bypass"]}


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of three tasks over six documents, most of them longer than the window."""
    documents = [{"question": LONG[at : at + 90], "choices": [" one", " two"], "answer": at % 2} for at in range(6)]
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    for name, parts in TASKS.items():
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "metric_list": [{"metric": metric} for metric in METRICS[name]],
        }
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | parts))  # JSON is YAML
    return tmp_path


@needs_harness
@pytest.mark.slow
def test_a_whole_run_in_every_mode(tasks: Path):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = harness(
        loaded(), [*TASKS], reading=Reading(**SIZES), task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    assert list(found) == list(bridge.MODES)
    bits = {mode: results["results"]["tiny_roll"]["bits_per_byte,none"] for mode, results in found.items()}
    assert len({round(value, 3) for value in bits.values()}) == 3
    for mode, results in found.items():
        assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
        assert results["config"]["reading"]["attention"] == mode
        json.dumps(results["config"])
        first = results["samples"]["tiny_choice"][0]
        context, choice = first["arguments"][0]
        if mode != "dense":
            ids = [tokenizer(False)(text).input_ids for text in (context, choice)]
            assert float(first["resps"][0][0][0]) == pytest.approx(one_by_one(mode, *ids), abs=1e-4)


@needs_harness
@pytest.mark.slow
def test_the_command_line_of_the_harness(tasks: Path, tmp_path: Path, run_python: Callable[..., Any]):
    folder = tiny_folder(tmp_path / "model")
    arguments = f"pretrained={folder},attention=window,sinks=4,window=12"
    command = ["run", "--model", "sinks", "--model_args", arguments, "--tasks", "tiny_choice", "--batch_size", "2"]
    command += ["--include_path", str(tasks), "--limit", "4"]
    result = run_python("-m", "sinks.evals.harness", *command)
    assert result.returncode == 0, result.stderr
    assert "tiny_choice" in result.stdout and "acc" in result.stdout
    wrong = run_python("-m", "sinks.evals.harness", *[part.replace("=window", "=none") for part in command])
    assert wrong.returncode == 1
    assert wrong.stderr.splitlines()[-1].startswith("sinks: attention='none' is not known")


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., Any]:
    """Run Python on these arguments in a fresh process, without a network."""

    def run(*arguments: str) -> Any:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run
