"""A tiny random reader and its tokenizer of single bytes: everything that `evals` needs of a model, and no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sinks.models.attach import attach

BOS = 256
TRAINED = 512


def tiny_model(layers: int = 2, dtype: torch.dtype = torch.float64, trained: int = TRAINED) -> LlamaForCausalLM:
    """A random Llama, attached, whose weights are large enough that what is visible matters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=BOS + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=trained,
        initializer_range=0.4,
    )
    model = LlamaForCausalLM(config)
    model.to(dtype=dtype).eval()  # type: ignore[call-arg]
    attach(model)
    return model


def tiny_tokenizer(bos: bool = False, line_break: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte; with `bos` it puts `<s>` before every text, and without `line_break` it knows none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)} | {"<s>": BOS}
    if not line_break:
        vocabulary["<no line break>"] = vocabulary.pop("Ċ")
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>" if bos else None)


def tiny_folder(folder: Path, trained: int = TRAINED) -> Path:
    """Save the model in float32 and its tokenizer as a checkpoint that `--model` takes."""
    tiny_model(dtype=torch.float32, trained=trained).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def stream(tokens: int = 90) -> torch.Tensor:
    """Random ids, int64 [tokens]."""
    return torch.randint(0, BOS, (tokens,), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def dense_nll(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The surprise of every token after the first, by one plain forward pass: float64 [tokens - 1]."""
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
    return torch.nn.functional.cross_entropy(logits.double(), ids[1:], reduction="none")
