"""The small checkpoints as Hugging Face folders: safetensors, config, tokenizer, and how they were made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import nn

from dashbench.miniature.continuation import swap_attention
from dashbench.miniature.llama import Llama
from dashbench.miniature.shape import LlamaShape
from dashbench.miniature.tokenizer import save_tokenizer

WEIGHTS = "model.safetensors"


def save_checkpoint(
    folder: Path, model: nn.Module, tokenizer: Tokenizer, kind: str, settings: dict[str, Any], longest: int
) -> str:
    """Writes a checkpoint in bf16; returns the first 12 digits of the weights' SHA-256.

    Args:
        folder: made if missing; the weights are replaced in one step.
        model: of `llama.Llama`.
        tokenizer: of `tokenizer.train_tokenizer`.
        kind: attention kind, kept in the config as `attention_kind`.
        settings: of the attention, kept as `attention_settings`.
        longest: context length that it was trained for, tokens.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = {n: p.detach().to("cpu", torch.bfloat16).contiguous() for n, p in model.state_dict().items()}
    partial = folder / f"{WEIGHTS}.partial"
    save_file(state, str(partial), metadata={"format": "pt"})
    partial.replace(folder / WEIGHTS)
    (folder / WEIGHTS).chmod(0o644)
    shape: LlamaShape = model.shape
    told = shape.model_dump(exclude={"rope_theta"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **told,
        "max_position_embeddings": longest,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "torch_dtype": "bfloat16",
        "attention_kind": kind,
        "attention_settings": settings,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_tokenizer(tokenizer, folder, longest)
    return hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()[:12]


def load_checkpoint(folder: Path, dtype: torch.dtype, device: str) -> tuple[Llama, str, dict[str, Any]]:
    """(model with its attention in place, kind, settings) of a folder that `save_checkpoint` wrote.

    Raises:
        RuntimeError: weights that are missing or that the kind does not have.
    """
    config = json.loads((folder / "config.json").read_text())
    shape = LlamaShape(**{name: config[name] for name in LlamaShape.model_fields})
    model = Llama(shape, dtype).to(device)
    kind, settings = config["attention_kind"], config["attention_settings"]
    settings = swap_attention(model, kind, settings)
    model.load_state_dict(load_file(str(folder / WEIGHTS)), strict=True)
    return model, kind, settings
