"""Tiny checkpoints of every kind: a folder with safetensors, a GGUF file, and the things that must be refused."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = ["<unk>", "<s>", "</s>", *"abcdefgh", "Ġ", "ab", "cd"]
HIDDEN, HEADS, LAYERS, MLP = 32, 2, 2, 64


def tiny_model() -> LlamaForCausalLM:
    """A random Llama of two layers."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def tiny_folder(folder: Path) -> LlamaForCausalLM:
    """Save `tiny_model` and a tokenizer of single letters into `folder`; returns the model."""
    model = tiny_model()
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(VOCABULARY)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    return model


def tiny_gguf(path: Path, architecture: str = "llama") -> None:
    """Write a random model in the GGUF form of llama.cpp, weights in Q8_0 where a row is long enough for a block."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_license("cc0-1.0")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(VOCABULARY) - 3))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, shape in shapes().items():
        values = np.random.default_rng(len(name)).normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 2:
            writer.add_tensor(
                name, gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0
            )
        else:
            writer.add_tensor(name, values + 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama in GGUF."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(VOCABULARY), HIDDEN),
        "output.weight": (len(VOCABULARY), HIDDEN),
        "output_norm.weight": (HIDDEN,),
    }
    for layer in range(LAYERS):
        found |= {f"blk.{layer}.attn_{part}.weight": (HIDDEN, HIDDEN) for part in ("q", "k", "v", "output")}
        found |= {f"blk.{layer}.ffn_{part}.weight": (MLP, HIDDEN) for part in ("gate", "up")}
        found |= {f"blk.{layer}.ffn_down.weight": (HIDDEN, MLP)}
        found |= {f"blk.{layer}.{part}_norm.weight": (HIDDEN,) for part in ("attn", "ffn")}
    return found
