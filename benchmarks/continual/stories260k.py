"""Convert the 260K-parameter TinyStories model from llama2.c's format to a Hugging Face model directory.

It is a real trained LLaMA that runs anywhere, so that the benchmarks can be run end to end and offline.

    python -m benchmarks.continual.stories260k SOURCE DESTINATION
"""

from __future__ import annotations

import argparse
import math
import struct
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HEADER = struct.Struct("<7i")
SIZES = (  # the header's fields, by Hugging Face's names
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
UNKNOWN, START, _ = SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")  # ids 0, 1, 2; the file adds line breaks to two


def _layout(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Hugging Face state-dict name and shape of each weight, in file order; `{}` stands for the layer."""
    layers, hidden, feed_forward = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    key_value = config.num_key_value_heads * config.head_dim
    return {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.layers.{}.input_layernorm.weight": (layers, hidden),
        "model.layers.{}.self_attn.q_proj.weight": (layers, hidden, hidden),
        "model.layers.{}.self_attn.k_proj.weight": (layers, key_value, hidden),
        "model.layers.{}.self_attn.v_proj.weight": (layers, key_value, hidden),
        "model.layers.{}.self_attn.o_proj.weight": (layers, hidden, hidden),
        "model.layers.{}.post_attention_layernorm.weight": (layers, hidden),
        "model.layers.{}.mlp.gate_proj.weight": (layers, feed_forward, hidden),
        "model.layers.{}.mlp.down_proj.weight": (layers, hidden, feed_forward),
        "model.layers.{}.mlp.up_proj.weight": (layers, feed_forward, hidden),
        "model.norm.weight": (hidden,),
    }


def _halves_from_pairs(weight: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Reorder the rows of query or key projections [layers, heads * head_dim, hidden] for Hugging Face's RoPE.

    llama2.c rotates rows (2i, 2i + 1) of a head together, Hugging Face rows (i, i + head_dim / 2). Queries and keys are
    reordered alike, so their dot products do not change.
    """
    layers, rows, hidden = weight.shape
    pairs = weight.reshape(layers, rows // head_dim, head_dim // 2, 2, hidden)
    return pairs.transpose(2, 3).reshape(layers, rows, hidden)


def _read_model(path: Path) -> LlamaForCausalLM:
    """Read a version-0 checkpoint: header, float32 weights, then RoPE tables, which Hugging Face computes itself."""
    data = bytearray(path.read_bytes())
    if len(data) < HEADER.size:
        raise ValueError(f"{path}: expected a header of {HEADER.size} bytes, got {len(data)}")
    sizes = dict(zip(SIZES, HEADER.unpack_from(data), strict=True))
    # A negative vocabulary size would mean an untied output head.
    if min(sizes.values()) <= 0 or sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise ValueError(f"{path}: expected positive sizes and heads that divide the hidden size, got {sizes}")
    config = LlamaConfig(
        **sizes,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        pad_token_id=SPECIAL_TOKENS.index(UNKNOWN),
        bos_token_id=SPECIAL_TOKENS.index(START),
        # Its stories are separated by the start token; the end token was never trained.
        eos_token_id=SPECIAL_TOKENS.index(START),
    )
    layout = _layout(config)
    counts = [math.prod(shape) for shape in layout.values()]
    expected = HEADER.size + 4 * (sum(counts) + config.max_position_embeddings * config.head_dim)
    if len(data) != expected:
        raise ValueError(f"{path}: expected {expected} bytes for {sizes}, got {len(data)}")

    flat = torch.frombuffer(data, dtype=torch.float32, offset=HEADER.size, count=sum(counts))
    state: dict[str, torch.Tensor] = {}
    for (name, shape), values in zip(layout.items(), torch.split(flat, counts), strict=True):
        weight = values.view(shape)
        if "q_proj" in name or "k_proj" in name:
            weight = _halves_from_pairs(weight, config.head_dim)
        state |= {name.format(i): w for i, w in enumerate(weight)} if "{}" in name else {name: weight}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model


def _read_pieces(path: Path, count: int) -> list[tuple[str, float]]:
    """Read (piece, score) by token id: one int32, then float32 score, int32 length and UTF-8 bytes of each."""
    data = path.read_bytes()
    pieces: list[tuple[str, float]] = []
    position = 4  # skip the length of the longest piece
    while position + 8 <= len(data):
        score, length = struct.unpack_from("<fi", data, position)
        start, position = position + 8, position + 8 + max(length, 0)
        pieces.append((data[start:position].decode(errors="replace").replace(" ", "▁"), score))
    if position != len(data) or len(pieces) != count:
        raise ValueError(f"{path}: expected {count} tokens that fill the file, got {len(pieces)} in {len(data)} bytes")
    return pieces


def _build_tokenizer(pieces: list[tuple[str, float]], positions: int) -> PreTrainedTokenizerFast:
    """Express llama2.c's merging by score as BPE with ranked merges.

    llama2.c joins the neighbours that make the piece of highest score, wherever that piece is divided. Each piece, in
    order of falling score, therefore gives a merge for every way to split it into two pieces.
    """
    names = [*SPECIAL_TOKENS, *(piece for piece, _ in pieces[len(SPECIAL_TOKENS) :])]
    vocabulary = {piece: token for token, piece in enumerate(names)}
    ranked = sorted(pieces, key=lambda scored: -scored[1])
    splits = ((piece[:cut], piece[cut:]) for piece, _ in ranked for cut in range(1, len(piece)))
    merges = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=UNKNOWN, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B:1", special_tokens=[(START, vocabulary[START])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=START,
        eos_token=START,
        pad_token=UNKNOWN,  # unused, as there are byte tokens; padding with START would hide real ends
        model_max_length=positions,
        clean_up_tokenization_spaces=False,
    )


def convert(source: Path, destination: Path) -> None:
    """Write `source`'s stories260K.bin and tok512.bin to `destination` as a model that `from_pretrained` loads.

    Both files are read before anything is written. Raises OSError for a path that cannot be read or written, ValueError
    for an incomplete file.
    """
    model = _read_model(source / "stories260K.bin")
    pieces = _read_pieces(source / "tok512.bin", model.config.vocab_size)
    destination.mkdir(parents=True, exist_ok=True)  # given a file, save_pretrained only logs an error
    model.save_pretrained(destination)
    _build_tokenizer(pieces, model.config.max_position_embeddings).save_pretrained(destination)


def main() -> int:
    """Run the command; returns 0 on success, 1 for an incomplete file, 2 for an unusable path."""
    parser = argparse.ArgumentParser(description="Convert llama2.c's stories260K to a Hugging Face model directory.")
    parser.add_argument("source", type=Path, help="folder with stories260K.bin and tok512.bin")
    parser.add_argument("destination", type=Path, help="folder to write, created if missing")
    arguments = parser.parse_args()
    try:
        convert(arguments.source, arguments.destination)
    except (OSError, ValueError) as error:
        print(f"stories260k: {error}", file=sys.stderr)
        return 2 if isinstance(error, OSError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
