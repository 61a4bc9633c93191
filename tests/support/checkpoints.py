"""Small checkpoints for tests, with the published names, written by the safetensors library or byte by byte."""

import json

import torch

from engram_kernels import EngramConfig, EngramTable
from engram_kernels.geometry.row_format import FORMATS
from engram_kernels.testing import tables

SMALL = dict(max_ngram=3, heads=2, hidden_size=16, branches=2, raw_vocab_size=40, eps=1e-6)
V41 = EngramConfig(layers=(1, 4), table_sizes=(100, 100), row_width=64, vocab_size=40, format="e4m3_ue8m0", **SMALL)
QWEN = EngramConfig(
    layers=(1,),
    table_sizes=(100, 100),
    row_width=16,
    row_multiple=512,
    vocab_size=40,
    window="eos",
    eos_id=7,
    multiplier_rule="splitmix64",
    format="e4m3",
    conv_kernel=3,
    conv_eps=1e-6,
    norm_offset=1.0,
    zero_gate="sign",
    **SMALL,
)
#: What config.json says of the two.
V41_FIELDS = dict(
    engram_layer_ids=[1, 4],
    engram_num_embeddings=list(V41.rows_per_layer),
    engram_max_ngram_size=3,
    engram_n_heads=2,
    engram_head_dim=64,
    engram_vocab_size=100,
    engram_compressed_vocab_size=40,
    engram_pad_token_id=0,
    hidden_size=16,
    hc_mult=2,
    vocab_size=40,
    rms_norm_eps=1e-6,
)
QWEN_FIELDS = dict(
    ple_layer_ids=[2],
    ngram_size=3,
    heads_per_ngram=2,
    ngram_vocab_size_base=100,
    make_ngram_vocab_size_divisible_by=512,
    split_ngram_parts=8,
    ple_embed_dim=64,
    ple_conv_kernel_size=3,
    ple_embedding_dtype="float8_e4m3fn",
    seed=0,
    eos_token_id=7,
    hidden_size=16,
    hc_count=2,
    vocab_size=40,
    rms_norm_eps=1e-6,
)
E8M0 = torch.float8_e8m0fnu
QWEN_PLE = "model.language_model.layers.1.ple."
QWEN_TABLE = f"{QWEN_PLE}ple_embedding.ngram_embedding."
QWEN_SCALE = torch.tensor([0.000199], dtype=torch.bfloat16)


def raw(tensor):
    """A tensor's bytes, which compare where fp8 and NaN do not."""
    return tensor.contiguous().view(torch.uint8)


def save(path, tensors, **options):
    from safetensors.torch import save_file

    save_file(tensors, path, **options)
    return path


def save_in_files(folder, files):
    """Files ``{name: tensors}`` and their index in a new folder."""
    folder.mkdir()
    for name, tensors in files.items():
        save(folder / name, tensors)
    names = {tensor: name for name, tensors in files.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return folder


def save_config(folder, **fields):
    """``config.json`` of a folder."""
    (folder / "config.json").write_text(json.dumps(fields))


def by_hand(path, header, data=b"", length=None):
    """A file with this header (a dict, or bytes), whatever it promises."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def finite_parts(rows, width, name, seed=0):
    """(weight, scale) without NaN and with moderate scales, as a checkpoint's are; fp8 rows hold all other bytes."""
    weight, scale = tables.random_parts(rows, width, name, seed)
    fmt = FORMATS[name]
    if fmt.dtype == torch.float8_e4m3fn:
        bits = raw(weight)
        bits.masked_fill_((bits & 0x7F) == 0x7F, 0x11)
    if fmt.group:
        scale.clamp_(*((110, 130) if fmt.group_scale == "ue8m0" else (40, 70)))
    return weight, scale


def finite_table(name, rows=90, width=64):
    parts = finite_parts(rows, width, name)
    return EngramTable.from_tensors(*parts, placement="cpu", **tables.own_scale_of(*parts))


def v41_tensors(layer):
    """A V4.1 layer: its table and the rest, as published; the projection in fp8, scaled by blocks of 32 x 32."""
    rows = V41.rows_per_layer[V41.layers.index(layer)]
    weight, scale = finite_parts(rows, 64, "e4m3_ue8m0", seed=layer)
    wkv = torch.randn(48, 256).to(torch.float8_e4m3fn)
    return {
        f"layers.{layer}.engram.embed.weight": weight,
        f"layers.{layer}.engram.embed.scale": scale.view(E8M0),
        f"layers.{layer}.engram.wkv.weight": wkv,
        f"layers.{layer}.engram.wkv.scale": torch.randint(120, 134, (2, 8), dtype=torch.uint8).view(E8M0),
        f"layers.{layer}.engram.q_weight": torch.randn(2, 16),
        f"layers.{layer}.engram.k_weight": torch.randn(2, 16),
        f"layers.{layer}.attn.wq_b.weight": torch.randn(4, 4),
    }


def v41_folder(folder):
    """(folder, tensors of both layers), a file per layer."""
    files = {f"model-0000{number}-of-00002.safetensors": v41_tensors(layer) for number, layer in ((1, 1), (2, 4))}
    return save_in_files(folder, files), {name: value for part in files.values() for name, value in part.items()}


def qwen_table(parts):
    """(rows of the whole table, its tensors in ``parts`` parts)."""
    rows = QWEN.rows_per_layer[0]
    weight, _ = finite_parts(rows, 16, "e4m3")
    step = -(-rows // parts)
    pieces = {f"{QWEN_TABLE}shard_{k}.weight": piece.clone() for k, piece in enumerate(weight.split(step))}
    return weight, pieces | {f"{QWEN_TABLE}weight_scale": QWEN_SCALE}


def qwen_folder(folder, parts=8):
    """(folder, rows, tensors besides the table); the parts lie in three files, one order of magnitude apart."""
    weight, pieces = qwen_table(parts)
    rest = {f"{QWEN_PLE}{name}_proj.weight": torch.randn(size, 64) for name, size in (("key", 32), ("value", 16))}
    rest |= {f"{QWEN_PLE}norm_{name}.weight": torch.randn(32) for name in ("query", "key", "conv")}
    rest[f"{QWEN_PLE}conv1d.weight"] = torch.randn(32, 1, 3)
    names = list(pieces)
    files = {f"model-{k}.safetensors": {name: pieces[name] for name in names[k::3]} for k in range(3)}
    files["model-0.safetensors"] |= rest
    return save_in_files(folder, files), weight, rest


def saved_table(folder, name="bfloat16", **options):
    return finite_table(name).save_safetensors(folder / f"{name}.safetensors", **options)
