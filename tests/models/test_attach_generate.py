"""`model.generate(past_key_values=SinkCache...)` past eviction: greedy, sampling, ragged rows, chunked prefill,
beams.

Everything is compared with a hand loop that feeds one row, one token at a time, and knows nothing of `generate`.
"""

from __future__ import annotations

from functools import cache as memoize
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sinks.cache.cache import SinkCache
from sinks.errors import UnsupportedOption
from sinks.models.attach import attach
from tests.families.feeding import feed, feed_masked, generate, left_padded, odd_chunks, one_by_one
from tests.families.tiny import build, tokens
from tests.oracle.streaming_llm import visible

SINKS, WINDOW = 3, 9
LENGTHS = (3, 17, 40)
NEW = 60
COMMON: dict[str, Any] = {"pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
GREEDY: dict[str, Any] = {"do_sample": False, **COMMON}
SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 0.8, **COMMON}
FAMILIES = [
    "llama", "gemma3_text", "cohere2", "gpt_oss", "smollm3", "falcon", "falcon_alibi", "gptj", "bloom", "mpt",
    "deepseek_v3", "qwen2_window",
]  # fmt: skip


@memoize
def _model(name: str) -> PreTrainedModel:
    return attach(build(name, layers=2))


def model(name: str = "llama") -> PreTrainedModel:
    return _model(name)


def fresh(name: str = "llama") -> SinkCache:
    return SinkCache.for_model(model(name), sinks=SINKS, window=WINDOW)


def alone(prompt: list[int]) -> dict[str, Tensor]:
    """Arguments of `generate`. Without a mask it would take tokens equal to `pad_token_id` for padding."""
    return {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}


def by_hand(name: str, prompt: list[int], new: int, temperature: float | None = None) -> tuple[list[int], Tensor]:
    """Continues one prompt token by token. Returns the new tokens and the logits that each was chosen from."""
    cache = fresh(name)
    last = feed(model(name), cache, torch.tensor([prompt]), one_by_one(len(prompt)))[0, -1]
    chosen, logits = [], []
    for _ in range(new):
        logits.append(last)
        if temperature is None:
            chosen.append(int(last.argmax()))
        else:  # as transformers does it: float32 scores
            weights = torch.softmax(last.to(torch.float32) / temperature, dim=-1)
            chosen.append(int(torch.multinomial(weights[None], num_samples=1)))
        last = model(name)(input_ids=torch.tensor([chosen[-1:]]), past_key_values=cache).logits[0, -1]
    return chosen, torch.stack(logits)


def teacher_forced(name: str, prompt: list[int], continuation: list[int]) -> Tensor:
    """Logits from which each token of `continuation` would be chosen, by streaming it alone, one token at a time."""
    whole = torch.tensor([prompt + continuation[:-1]])
    return feed(model(name), fresh(name), whole, one_by_one(whole.shape[1]))[0, len(prompt) - 1 :]


def rows(seed: int = 0) -> list[list[int]]:
    return [tokens(length, seed=seed + length)[0].tolist() for length in LENGTHS]


def raw(output: Any) -> Tensor:
    """The unprocessed logits of a generate call, [batch, new, vocabulary] (transformers hands them over in float32)."""
    return torch.stack(output.logits, dim=1)


def assert_logits(got: Tensor, expected: Tensor) -> None:
    """Equal up to the rounding to float32 that `generate` applies to the logits it reports, or to 1e-9 without it."""
    atol = 1e-9 if got.dtype is torch.float64 else 2.0**-23 * expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy(name: str) -> None:
    prompt = tokens(5)[0].tolist()
    chosen, logits = by_hand(name, prompt, NEW)
    cache = fresh(name)
    output = generate(model(name), **alone(prompt), past_key_values=cache, max_new_tokens=NEW, **GREEDY)
    assert output.sequences[0, 5:].tolist() == chosen
    assert_logits(raw(output)[0], logits)
    assert cache.seen == [5 + NEW - 1]
    assert cache.visible() == visible(5 + NEW - 1, SINKS, WINDOW)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_sampling_with_a_seed(name: str) -> None:
    prompt = tokens(5)[0].tolist()
    torch.manual_seed(11)
    chosen, logits = by_hand(name, prompt, NEW, temperature=0.8)
    torch.manual_seed(11)
    output = generate(model(name), **alone(prompt), past_key_values=fresh(name), max_new_tokens=NEW, **SAMPLE)
    assert output.sequences[0, 5:].tolist() == chosen
    assert_logits(raw(output)[0], logits)
    assert len(set(chosen)) > 10


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_longer_than_the_window(name: str) -> None:
    prompt = tokens(50)[0].tolist()
    chosen, logits = by_hand(name, prompt, 20)
    for options in ({}, {"prefill_chunk_size": 7}, {"prefill_chunk_size": 1}, {"prefill_chunk_size": 49}):
        output = generate(
            model(name), **alone(prompt), past_key_values=fresh(name), max_new_tokens=20, **GREEDY, **options
        )
        assert output.sequences[0, 50:].tolist() == chosen, options
        assert_logits(raw(output)[0], logits)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bloom", "gptj", "deepseek_v3"])
def test_second_turn_with_a_filled_cache(name: str) -> None:
    first, more = tokens(7)[0].tolist(), tokens(15, seed=1)[0].tolist()
    reply, _ = by_hand(name, first, 20)
    second = first + reply + more
    expected, logits = by_hand(name, second, 20)
    cache = fresh(name)
    output = generate(model(name), **alone(first), past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert output.sequences[0].tolist() == first + reply
    seen = cache.seen[0]
    output = generate(model(name), **alone(second), past_key_values=cache, max_new_tokens=20, **GREEDY)
    assert output.sequences[0].tolist() == second + expected
    assert_logits(raw(output)[0], logits)
    assert cache.seen == [len(second) + 19]
    assert seen == len(first) + 19


def test_a_prompt_of_which_nothing_is_new_is_not_fed_twice() -> None:
    """transformers would hand over the whole prompt again, from position 0: an error, not a wrong continuation."""
    cache = fresh()
    prompt = tokens(30)
    model()(input_ids=prompt, past_key_values=cache)
    with pytest.raises(UnsupportedOption):
        generate(model(), **alone(prompt[0].tolist()), past_key_values=cache, max_new_tokens=3, **GREEDY)


@pytest.mark.parametrize("name", FAMILIES)
def test_ragged_rows_each_get_what_they_get_alone(name: str) -> None:
    prompts = rows()
    ids, mask = left_padded(prompts)
    expected = [by_hand(name, prompt, NEW) for prompt in prompts]
    for new, options in ((NEW, {}), (5, {"prefill_chunk_size": 10})):
        cache = fresh(name)
        output = generate(
            model(name),
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=new,
            **GREEDY,
            **options,
        )
        for row, (chosen, logits) in enumerate(expected):
            assert output.sequences[row, ids.shape[1] :].tolist() == chosen[:new], f"row {row}, {options}"
            assert_logits(raw(output)[row], logits[:new])
            assert cache.visible(row) == visible(LENGTHS[row] + new - 1, SINKS, WINDOW)
        assert cache.seen == [length + new - 1 for length in LENGTHS]
        assert cache.get_seq_length() == max(LENGTHS) + new - 1


@pytest.mark.parametrize("name", ["llama", "gpt_oss", "falcon", "gptj", "bloom", "mpt", "deepseek_v3"])
@pytest.mark.parametrize("size", [1, 7, 23, 36, 37, 40])
def test_ragged_rows_in_chunks_even_if_a_chunk_is_all_padding(name: str, size: int) -> None:
    """The shortest row has 37 pads: with chunks of 36 or less it has not begun when the first chunk ends."""
    prompts = rows(seed=100)
    ids, mask = left_padded(prompts)
    sizes = [size] * (40 // size) + ([40 % size] if 40 % size else [])
    cache = fresh(name)
    together = feed_masked(model(name), cache, ids, mask, sizes)
    assert together[mask.bool()].isfinite().all()
    for row, prompt in enumerate(prompts):
        lone = feed(model(name), fresh(name), torch.tensor([prompt]), odd_chunks(len(prompt)))[0]
        torch.testing.assert_close(together[row, -len(prompt) :], lone, rtol=0, atol=1e-9)
        assert cache.visible(row) == visible(len(prompt), SINKS, WINDOW)
    assert cache.seen == list(LENGTHS)


def test_what_a_pad_is_does_not_matter() -> None:
    prompts = rows()
    first, mask = left_padded(prompts, pad=0)
    second, _ = left_padded(prompts, pad=50)
    one, two = (feed_masked(model(), fresh(), ids, mask, [13, 27]) for ids in (first, second))
    assert torch.equal(one[mask.bool()], two[mask.bool()])


def test_rows_that_end_early_do_not_disturb_the_others() -> None:
    prompts = rows()
    ids, mask = left_padded(prompts)
    expected = [by_hand("llama", prompt, NEW)[0] for prompt in prompts]
    stop = expected[0][10]
    output = generate(
        model(),
        input_ids=ids,
        attention_mask=mask,
        past_key_values=fresh(),
        max_new_tokens=NEW,
        eos_token_id=stop,
        **GREEDY,
    )
    for row, chosen in enumerate(expected):
        until = chosen.index(stop) + 1 if stop in chosen else NEW
        assert output.sequences[row, ids.shape[1] :][:until].tolist() == chosen[:until]


def test_an_all_ones_mask_and_no_mask_are_one() -> None:
    ids = tokens(30, batch=2)
    plain = feed(model(), fresh(), ids, [20, 1, 9])
    masked = feed_masked(model(), fresh(), ids, torch.ones_like(ids), [20, 1, 9])
    assert torch.equal(plain, masked)


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_several_samples_of_one_prompt(name: str) -> None:
    prompt = tokens(20)[0].tolist()
    torch.manual_seed(3)
    output = generate(
        model(name), **alone(prompt), past_key_values=fresh(name), max_new_tokens=30, num_return_sequences=3, **SAMPLE
    )
    sequences = output.sequences[:, 20:].tolist()
    assert len({tuple(sequence) for sequence in sequences}) == 3
    for row, sequence in enumerate(sequences):
        assert_logits(raw(output)[row], teacher_forced(name, prompt, sequence))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "falcon", "gptj", "bloom", "mpt", "deepseek_v3"])
@pytest.mark.parametrize("ragged", [False, True])
def test_every_beam_has_the_score_of_its_own_sequence(name: str, ragged: bool) -> None:
    """Beams change places at most steps; if the cache did not follow them, or not with its counters, scores would
    differ.

    A score is the mean of 40 log-probabilities that transformers computes in float32: each is off by at most a few
    roundings of a number of order 10, so 10 * 4 * 2^-24 = 2.4e-6 bounds the mean.
    """
    prompts = [rows()[0], rows()[1]] if ragged else [rows()[1]]
    ids, mask = left_padded(prompts)
    cache = fresh(name)
    moves: list[bool] = []
    reorder = cache.reorder_cache

    def watched(beam_idx: Tensor) -> None:
        moves.append(beam_idx.tolist() != list(range(beam_idx.numel())))
        reorder(beam_idx)

    cache.reorder_cache = watched
    output = generate(
        model(name),
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=40,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    assert sum(moves) > 10
    for index, sequence in enumerate(output.sequences):
        prompt = prompts[index // 3]
        continuation = sequence[ids.shape[1] :].tolist()
        logits = teacher_forced(name, prompt, continuation)
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])
        assert abs(chosen.mean().item() - output.sequences_scores[index].item()) < 2.4e-6


def test_memory_stays_flat_over_a_generation_of_ten_capacities() -> None:
    cache = fresh()
    generate(model(), **alone(tokens(20)[0].tolist()), past_key_values=cache, max_new_tokens=2, **GREEDY)
    full = cache.nbytes
    cache.reset()
    generate(
        model(), **alone(tokens(20)[0].tolist()), past_key_values=cache, max_new_tokens=10 * (SINKS + WINDOW), **GREEDY
    )
    assert cache.nbytes == full
