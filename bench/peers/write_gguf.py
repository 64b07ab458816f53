"""python write_gguf.py CHECKPOINT_DIR OUT.gguf: a Qwen2 or Qwen3 checkpoint as a bf16 GGUF file.

Its vocabulary is made up (bytes and filler): the measurements use token ids. Other families permute weights on
conversion; for them use llama.cpp's own converter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

ARCHITECTURES = {"Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, layer, rest = name.split(".", 3)
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{LAYER[module]}.{kind}"


def main(checkpoint: Path, out: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    architecture = ARCHITECTURES.get(config["architectures"][0])
    if architecture is None:
        raise SystemExit(f"{config['architectures'][0]} is not converted here; convertible: {', '.join(ARCHITECTURES)}")
    writer = gguf.GGUFWriter(out, architecture)
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    add_vocabulary(writer, config["vocab_size"])
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, raw in bfloat16_tensors(file):
            add_tensor(writer, gguf_name(name), raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    letters = byte_letters()
    tokens = letters + [f"<filler{i}>" for i in range(size - len(letters) - 1)] + ["<|end|>"]
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL] * (size - 1) + [gguf.TokenType.CONTROL])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(size - 1)
    writer.add_add_bos_token(False)


def byte_letters() -> list[str]:
    """A printable character for each byte, as GPT-2's byte-level encoding draws them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letter[byte] for byte in range(256)]


def bfloat16_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and bits, as uint16, of a safetensors file's tensors: numpy has no bfloat16."""
    data = np.memmap(file, np.uint8, "r")
    header_size = int(data[:8].view(np.uint64)[0])
    header = json.loads(data[8 : 8 + header_size].tobytes())
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{name} is {entry['dtype']}: only bfloat16 checkpoints are converted here")
        begin, end = entry["data_offsets"]
        bits = data[8 + header_size + begin : 8 + header_size + end].tobytes()
        yield name, np.frombuffer(bits, np.uint16).reshape(entry["shape"])


def add_tensor(writer: gguf.GGUFWriter, name: str, bits: np.ndarray) -> None:
    """Matrices in bf16, vectors in float32 (bf16 is its upper half): what llama.cpp expects."""
    if bits.ndim == 1:
        writer.add_tensor(name, (bits.astype(np.uint32) << 16).view(np.float32))
        return
    raw = bits.view(np.uint8).reshape(bits.shape[0], -1)
    writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
