"""Every family with the options that matter, as configurations of tiny models: data, and nothing is built here.

The table is what the tests are parametrised over. ``max_position_embeddings`` is only 24, so that a stream of 60 tokens
leaves the trained range behind, and bases of rotation are small, so that positions matter within a few tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VOCABULARY = 71
HIDDEN = 32
HEADS = 4
KV_HEADS = 2
HEAD_DIM = 8
TRAINED = 24  # max_position_embeddings of every tiny model
OWN = 5  # sliding window of layers that have their own, smaller than any capacity used in the tests
WIDE = 20  # sliding window that no tested capacity exceeds: such a layer behaves like a full one

Options = Callable[[int], dict[str, Any]]  # number of layers -> configuration


@dataclass(frozen=True)
class Tiny:
    """One case: a family with one set of options.

    Attributes:
        model_type: transformers' name of the family.
        options: configuration for a number of layers.
        own: window that layer 0 keeps for itself, None if it follows sinks and window.
        rounds: the family's own code rounds queries and keys to float32 on their way to the attention function.
        attention: transformers' attention implementation to use.
    """

    model_type: str
    options: Options
    own: int | None = None
    rounds: bool = False
    attention: str = "eager"


def _rope(theta: float = 100.0, **extra: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **extra}


def _common(layers: int, **extra: Any) -> dict[str, Any]:
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": TRAINED,
        "rope_parameters": _rope(),
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "use_cache": True,
    }
    base.update(extra)
    return base


def _plain(**extra: Any) -> Options:
    return lambda layers: _common(layers, **extra)


def _mixed(pattern: str, **extra: Any) -> Options:
    """Layer types from a pattern such as "sf": s sliding, f full, repeated."""
    names = {"s": "sliding_attention", "f": "full_attention"}

    def options(layers: int) -> dict[str, Any]:
        kinds = [names[pattern[i % len(pattern)]] for i in range(layers)]
        return _common(layers, layer_types=kinds, **extra)

    return options


_MOE: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MOE_QWEN: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 6,
    "beta_fast": 2.0,
    "beta_slow": 0.25,
}
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 0.5,
    "high_freq_factor": 2.0,
    "original_max_position_embeddings": 12,
}


def _longrope(original: int) -> dict[str, Any]:
    half = HEAD_DIM // 2
    parameters = _rope(
        rope_type="longrope",
        original_max_position_embeddings=original,
        factor=TRAINED / original,
        short_factor=[1.0 + 0.1 * i for i in range(half)],
        long_factor=[1.5 + 0.7 * i for i in range(half)],
    )
    # Phi-3's configuration overwrites the length in its parameters by its own, 4,096 unless it is told.
    return {"rope_parameters": parameters, "original_max_position_embeddings": original}


def _gemma3(pattern: str, window: int) -> Options:
    ropes = {"sliding_attention": _rope(50.0), "full_attention": _rope(200.0, rope_type="linear", factor=2.0)}
    return _mixed(
        pattern, sliding_window=window, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, rope_parameters=ropes
    )


def _olmo3(pattern: str, window: int) -> Options:
    ropes = {"sliding_attention": _rope(50.0), "full_attention": _rope(200.0, **_YARN)}
    return _mixed(pattern, sliding_window=window, rope_parameters=ropes)


def _gemma2(pattern: str, window: int) -> Options:
    return _mixed(
        pattern, sliding_window=window, head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, attn_logit_softcapping=3.0
    )


def _gpt_oss(pattern: str, window: int) -> Options:
    return _mixed(
        pattern,
        sliding_window=window,
        head_dim=HEAD_DIM,
        rope_parameters=_rope(**_YARN, truncate=False),
        attention_bias=True,
        **_MOE,
    )


def _smollm3(pattern: str) -> Options:
    """r: rotary layer, n: layer without positions."""
    return lambda layers: _common(
        layers, no_rope_layers=[1 if pattern[i % len(pattern)] == "r" else 0 for i in range(layers)]
    )


def _falcon(**extra: Any) -> Options:
    def options(layers: int) -> dict[str, Any]:
        base = _common(layers, ffn_hidden_size=48, **extra)
        del base["num_key_value_heads"], base["intermediate_size"]
        if base.get("alibi"):
            del base["rope_parameters"]
        return base

    return options


def _gptj(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "n_positions": TRAINED,
        "n_embd": HIDDEN,
        "n_layer": layers,
        "n_head": HEADS,
        "rotary_dim": 4,
        "n_inner": 48,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _bloom(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "n_layer": layers,
        "n_head": HEADS,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _mpt(layers: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "d_model": HIDDEN,
        "n_layers": layers,
        "n_heads": HEADS,
        "expansion_ratio": 2,
        "max_seq_len": TRAINED,
        "no_bias": True,
        "use_cache": True,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _deepseek(interleave: bool, **rope: Any) -> Options:
    return _plain(
        num_key_value_heads=HEADS,
        moe_intermediate_size=24,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=12,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        rope_interleave=interleave,
        rope_parameters=_rope(**rope),
    )


def _granite(**extra: Any) -> Options:
    return _plain(
        embedding_multiplier=1.5,
        logits_scaling=0.7,
        residual_multiplier=0.8,
        attention_multiplier=0.3,
        attention_bias=True,
        **extra,
    )


CASES: dict[str, Tiny] = {
    # every layer follows sinks and window
    "llama": Tiny("llama", _plain(attention_bias=True, mlp_bias=True)),
    "llama_linear": Tiny("llama", _plain(rope_parameters=_rope(rope_type="linear", factor=3.0))),
    "llama_yarn": Tiny("llama", _plain(rope_parameters=_rope(**_YARN))),
    "llama_llama3": Tiny("llama", _plain(rope_parameters=_rope(**_LLAMA3))),
    "llama_dynamic": Tiny("llama", _plain(rope_parameters=_rope(rope_type="dynamic", factor=2.0))),
    "mistral": Tiny("mistral", _plain(sliding_window=None, head_dim=HEAD_DIM)),
    "mixtral": Tiny("mixtral", _plain(sliding_window=None, **_MOE)),
    "qwen2": Tiny("qwen2", _plain()),
    "qwen2_moe": Tiny("qwen2_moe", _plain(shared_expert_intermediate_size=24, **_MOE_QWEN)),
    "qwen3": Tiny("qwen3", _plain(head_dim=12)),
    "qwen3_moe": Tiny("qwen3_moe", _plain(head_dim=HEAD_DIM, **_MOE_QWEN)),
    "gemma": Tiny("gemma", _plain(head_dim=HEAD_DIM)),
    "phi": Tiny("phi", _plain(rope_parameters=_rope(partial_rotary_factor=0.5))),
    "phi3": Tiny("phi3", _plain(sliding_window=None)),
    "phi3_longrope_short": Tiny("phi3", _plain(**_longrope(TRAINED - 2))),
    "phi3_longrope_long": Tiny("phi3", _plain(**_longrope(8))),
    "gpt_neox": Tiny("gpt_neox", _plain(rope_parameters=_rope(partial_rotary_factor=0.25), hidden_size=64)),
    "gpt_neox_sequential": Tiny(
        "gpt_neox", _plain(rope_parameters=_rope(partial_rotary_factor=0.5), use_parallel_residual=False)
    ),
    "stablelm": Tiny("stablelm", _plain(rope_parameters=_rope(partial_rotary_factor=0.5), use_qkv_bias=True)),
    "stablelm_norm": Tiny(
        "stablelm",
        _plain(rope_parameters=_rope(partial_rotary_factor=0.5), qk_layernorm=True, use_parallel_residual=True),
    ),
    "olmo": Tiny("olmo", _plain(clip_qkv=2.0)),
    "olmo2": Tiny("olmo2", _plain()),
    "cohere": Tiny("cohere", _plain(use_qk_norm=True, logit_scale=0.5), rounds=True),
    "glm": Tiny("glm", _plain(head_dim=HEAD_DIM, rope_parameters=_rope(partial_rotary_factor=0.5))),
    "glm4": Tiny("glm4", _plain(head_dim=HEAD_DIM, rope_parameters=_rope(partial_rotary_factor=0.5))),
    "granite": Tiny("granite", _granite()),
    "granitemoe": Tiny("granitemoe", _granite(**_MOE)),
    "starcoder2": Tiny("starcoder2", _plain(sliding_window=None)),
    "nemotron": Tiny("nemotron", _plain(rope_parameters=_rope(partial_rotary_factor=0.5))),
    "arcee": Tiny("arcee", _plain()),
    "ernie4_5": Tiny("ernie4_5", _plain(head_dim=HEAD_DIM, use_bias=True), rounds=True),
    "helium": Tiny("helium", _plain(head_dim=HEAD_DIM)),
    "olmoe": Tiny("olmoe", _plain(num_experts=4, num_experts_per_tok=2)),
    "seed_oss": Tiny("seed_oss", _plain(head_dim=HEAD_DIM)),
    "smollm3": Tiny("smollm3", _smollm3("rnr")),
    "smollm3_nope": Tiny("smollm3", _smollm3("nr")),
    "gemma2": Tiny("gemma2", _gemma2("fsf", OWN)),
    "gemma3_text": Tiny("gemma3_text", _gemma3("fsf", OWN)),
    "olmo3": Tiny("olmo3", _olmo3("fsf", OWN)),
    "cohere2": Tiny("cohere2", _mixed("fsf", sliding_window=OWN, logit_scale=0.5), rounds=True),
    "gpt_oss": Tiny("gpt_oss", _gpt_oss("fsf", OWN)),
    # every layer has its own window, wider than the capacity: it follows sinks and window
    "mistral_wide": Tiny("mistral", _plain(sliding_window=WIDE)),
    "gemma3_text_wide": Tiny("gemma3_text", _gemma3("sfs", WIDE)),
    "cohere2_wide": Tiny("cohere2", _mixed("sfs", sliding_window=WIDE, logit_scale=0.5), rounds=True),
    "gpt_oss_wide": Tiny("gpt_oss", _gpt_oss("sfs", WIDE)),
    # the first layer has its own window, narrower than the capacity: it keeps that, and no sinks
    "mistral_window": Tiny("mistral", _plain(sliding_window=OWN), own=OWN),
    "qwen2_window": Tiny("qwen2", _mixed("sfs", use_sliding_window=True, sliding_window=OWN), own=OWN),
    "gemma2_window": Tiny("gemma2", _gemma2("sfs", OWN), own=OWN),
    "gemma3_text_window": Tiny("gemma3_text", _gemma3("sfs", OWN), own=OWN),
    "olmo3_window": Tiny("olmo3", _olmo3("sfs", OWN), own=OWN),
    "cohere2_window": Tiny("cohere2", _mixed("sfs", sliding_window=OWN, logit_scale=0.5), own=OWN, rounds=True),
    "gpt_oss_window": Tiny("gpt_oss", _gpt_oss("sfs", OWN), own=OWN),
    # not through the attention interface, or latent: a second route
    "falcon": Tiny("falcon", _falcon(multi_query=True, parallel_attn=True)),
    "falcon_new": Tiny("falcon", _falcon(new_decoder_architecture=True, num_kv_heads=KV_HEADS)),
    # not eager: there transformers 5.23 adds the ALiBi bias twice (once in the mask, once in the layer)
    "falcon_alibi": Tiny("falcon", _falcon(alibi=True, multi_query=False, parallel_attn=False), attention="sdpa"),
    "gptj": Tiny("gptj", _gptj),
    "bloom": Tiny("bloom", _bloom),
    "mpt": Tiny("mpt", _mpt),
    "deepseek_v3": Tiny("deepseek_v3", _deepseek(True)),
    "deepseek_v3_yarn": Tiny("deepseek_v3", _deepseek(False, **_YARN, mscale=1.0, mscale_all_dim=0.7)),
}

BOTH_ROUTES = ["llama", "gemma3_text", "gpt_oss", "falcon", "falcon_alibi", "gptj", "bloom", "mpt", "deepseek_v3"]
"""A few cases that between them meet every way in which a model can be served."""
