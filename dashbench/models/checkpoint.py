"""Checkpoints in, models out: the stock Llama of transformers with its attention replaced.

Any Hugging Face folder of a Llama is read: one or several safetensors files, or `pytorch_model.bin`. Every
parameter must be where it belongs and none may be left over: a DashAttention checkpoint never becomes a dense
Llama in silence. No code from a checkpoint is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dashbench.models.attention import NAME, AttentionState, add_parameters, register
from dashbench.models.kinds import KINDS, CheckpointError, added_parameters, kind_of, settings_of
from dashbench.models.random_tokenizer import write_tokenizer
from dashbench.models.sizes import SIZES, random_size


def _folder(id_or_path: str | Path) -> Path:
    path = Path(id_or_path)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a checkpoint is a folder with config.json and weights")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(str(id_or_path), allow_patterns=patterns))
    except Exception as problem:  # the hub has many ways of saying no
        first = str(problem).strip().splitlines()[0]
        raise CheckpointError(f"{id_or_path}: no such folder, and the hub did not give it: {first}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: it is missing, not JSON, or not a Llama's.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no config.json") from None
    except ValueError as problem:
        raise CheckpointError(f"{path}: not JSON: {problem}") from None
    if config.get("model_type") != "llama":
        found = config.get("model_type")
        raise CheckpointError(f"{path}: model_type is {found!r}; only llama checkpoints are read")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Files that hold the weights.

    Raises:
        CheckpointError: none, or one that an index names is missing.
    """
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            names = sorted(set(json.loads((folder / index).read_text())["weight_map"].values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(f"{folder}: {index} names {missing[0]}, which is not there")
            return [folder / name for name in names]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
    raise CheckpointError(
        f"{folder}: no weights (model.safetensors or pytorch_model.bin, in one or more files)"
    )


def _read_weights(files: list[Path], device: str) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                state |= load_file(str(path), device=device)
            else:
                state |= torch.load(path, map_location=device, weights_only=True)
        except Exception as problem:  # torn downloads fail in many ways
            first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            raise CheckpointError(f"{path}: not readable as weights: {first}") from None
    return state


def _skeleton(config: dict[str, Any], device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama without weights, its rotation computed."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from dashbench.models.slices import sliced

    register()
    known = {k: v for k, v in config.items() if k not in ("architectures", "auto_map")}
    llama = LlamaConfig.from_dict(known)
    llama._attn_implementation = NAME
    with torch.device("meta"):
        model = sliced(LlamaForCausalLM(llama)).to(dtype)
    model.to_empty(device=device)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(llama)
    if llama.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _with_attention(model: nn.Module, kind: str, settings: dict, source: dict) -> nn.Module:
    config = model.config
    state = AttentionState(kind, settings, source, model.model.rotary_emb)
    options = {"device": model.device, "dtype": model.dtype}
    for layer in model.model.layers:
        attention = layer.self_attn
        sizes = config.num_key_value_heads, config.head_dim, state.block_size
        add_parameters(attention, kind, *sizes, **options)
        attention.dashbench = state
    model.dashbench = state
    return model


def load(
    id_or_path: str | Path,
    attention: str = "auto",
    *,
    preset: str = "package",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **knobs: Any,
) -> nn.Module:
    """A checkpoint as a `LlamaForCausalLM` with its attention in place.

    Args:
        id_or_path: a folder, a name on the Hugging Face hub, or `random:SIZE` (see `random_model`).
        attention: `dense`, `infllmv2`, `nsa`, `dash`, or `auto` (see `kinds.kind_of`); random weights need a
            name.
        preset: `package` or `paper`: settings that neither the config nor `knobs` give.
        device: default: a GPU if there is one.
        dtype: default: the config's, or bf16; fp32 on a CPU.
        seed: of random weights.
        **knobs: settings of the attention, such as `scaling_factor` or `top_k`; `model.dashbench.settings`
            may be changed at any time.

    Returns:
        The model; `model.dashbench` has `kind`, `settings` and where each setting came from (`source`).

    Raises:
        CheckpointError: one sentence on what is missing, left over, contradictory or unreadable.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if (size := random_size(str(id_or_path))) is not None:
        dtype = dtype or (torch.float32 if device == "cpu" else torch.bfloat16)
        return random_model(attention, size, device=device, dtype=dtype, seed=seed, preset=preset, **knobs)
    folder = _folder(id_or_path)
    config = read_config(folder)
    if dtype is None:
        told = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
        dtype = torch.float32 if device == "cpu" else getattr(torch, told)
    state = _read_weights(weight_files(folder), device)
    kind = kind_of(state, config, attention)
    settings, source = settings_of(kind, config, preset, knobs)
    model = _with_attention(_skeleton(config, device, dtype), kind, settings, source)
    if model.config.tie_word_embeddings:
        state.setdefault("lm_head.weight", state.get("model.embed_tokens.weight"))
    wanted = model.state_dict()
    state = {name: x for name, x in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if missing := sorted(set(wanted) - set(state)):
        raise CheckpointError(f"{folder}: {len(missing)} parameters are missing, first {missing[0]}")
    if extra := sorted(set(state) - set(wanted)):
        raise CheckpointError(f"{folder}: {len(extra)} parameters have no place, first {extra[0]}")
    for name, x in state.items():
        if x.shape != wanted[name].shape:
            found, expected = list(x.shape), list(wanted[name].shape)
            raise CheckpointError(f"{folder}: {name} is {found}, expected {expected}")
    model.load_state_dict(state, strict=True)
    return model


def random_model(
    kind: str,
    size: str = "tiny",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    preset: str = "package",
    **knobs: Any,
) -> nn.Module:
    """A model with random weights, built on its device.

    Args:
        kind: of `kinds.KINDS`.
        size: of SIZES.
        device, dtype: of the weights.
        seed: of the weights.
        preset, **knobs: settings of the attention, as in `load`.

    Raises:
        CheckpointError: an unknown kind, size, preset or setting.
    """
    if kind not in KINDS:
        raise CheckpointError(f"random weights have no attention {kind!r}; known: {', '.join(KINDS)}")
    if size not in SIZES:
        raise CheckpointError(f"unknown size {size!r}; known: {', '.join(SIZES)}")
    settings, source = settings_of(kind, {}, preset, knobs)
    config = {"model_type": "llama", **SIZES[size], "tie_word_embeddings": False}
    config |= {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = _with_attention(_skeleton(config, device, dtype), kind, settings, source)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                parameter.fill_(1.0)
            elif name.endswith("indexer_q"):
                parameter.zero_()
            else:
                # Variance one over the inputs: logits neither flat nor all the same.
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def make_checkpoint(folder: Path, kind: str, size: str = "tiny", seed: int = 0, **knobs: Any) -> str:
    """Writes a random checkpoint in Hugging Face format, bf16, with the tokenizer of `write_tokenizer`.

    Args:
        folder: made if missing.
        kind, size, seed, **knobs: as in `random_model`; settings go into config.json.

    Returns:
        The first 12 digits of the weights' SHA-256.
    """
    from safetensors.torch import save_file

    model = random_model(kind, size, dtype=torch.bfloat16, seed=seed, **knobs)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: x.contiguous() for name, x in model.state_dict().items()}
    save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES[size],
        "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": [2], "pad_token_id": 2,
    }  # fmt: skip
    if kind != "dense":
        config |= {"attention_kind": kind, "attention_settings": model.dashbench.settings}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    write_tokenizer(folder, SIZES[size]["vocab_size"], SIZES[size]["max_position_embeddings"])
    return weights_hash(folder)


def weights_hash(folder: Path) -> str:
    """The first 12 digits of the SHA-256 over a checkpoint's weight files, in order."""
    digest = hashlib.sha256()
    for path in weight_files(folder):
        with open(path, "rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:12]


__all__ = ["added_parameters", "load", "make_checkpoint", "random_model"]
