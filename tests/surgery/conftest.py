"""Tiny random models of transformers' routed families, by the catalogue in families.yaml."""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from packaging.version import Version
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CATALOGUE: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "families.yaml").read_text(encoding="utf-8")
)

# Fields of a language model's configuration, those that it has.
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "moe_shared_expert_intermediate_size": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 2,
    "topk_group": 1,
    "mlp_layer_types": ["sparse", "sparse"],
    "mlp_only_layers": [],
    "decoder_sparse_step": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "max_position_embeddings": 128,
    "sliding_window": 64,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Those of the parts of a wrapper that do not route text.
OTHER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "out_hidden_size": 32,
    "depth": 1,
    "num_hidden_layers": 1,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "deepstack_visual_indexes": [0],
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}


def model_class(name):
    """The class that the catalogue names."""
    module, version = CATALOGUE[name].get("module", name), Version(transformers.__version__)
    if importlib.util.find_spec(f"transformers.models.{module}") is None:
        pytest.skip(f"transformers {version} has no {module}")
    if version.release[:2] <= Version(str(CATALOGUE[name].get("not_up_to", 0))).release:
        pytest.skip(f"{name} has another form in transformers {version}")
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    return getattr(modeling, CATALOGUE[name]["model"])


def build(name, **changes):
    """The model of a family, evaluation mode, float32; `changes` replace fields of its (text) configuration."""
    entry = CATALOGUE[name]
    kind = model_class(name).config_class
    own = entry.get("with", {}) | changes
    parts = dict(getattr(kind, "sub_configs", {}))
    if "text_config" in parts:
        fields = {part: _part(kind, part, cls) for part, cls in parts.items()}
        for part, changed in ({"text_config": own} | entry.get("parts", {})).items():
            fields[part] |= changed
        fields |= entry.get("whole", {})
    else:
        fields = _fields(kind, TEXT) | own
    torch.manual_seed(0)
    model = model_class(name)(kind(**fields)).eval()
    _spread(model)
    return model


def _part(kind, part, cls):
    """Small fields of a part of a wrapper, which may be of any other family."""
    named = {}
    if not hasattr(cls, "__dataclass_fields__"):
        named = {"model_type": kind.sub_configs_defaults[part].model_type}
        cls = CONFIG_MAPPING[named["model_type"]]
    return named | _fields(cls, TEXT if part == "text_config" else OTHER)


def _fields(kind, common):
    return {name: value for name, value in common.items() if name in getattr(kind, "__dataclass_fields__", ())}


@torch.no_grad()
def _spread(model):
    """Balancing biases and factors start at nothing; give them something, so that a test sees whether they count."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("e_score_correction_bias", "expert_bias", "per_expert_scale", "global_scale")):
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.3)
        elif name.endswith("balancing_biases"):  # the last one starts where it is never chosen
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.1)
        elif tensor.dim() == 2 and tensor.is_floating_point() and not tensor.any():  # some gates start at zero
            tensor.normal_(std=0.3, generator=generator)


def supported():
    """Families that are understood, and called as a language model is."""
    return [name for name, entry in CATALOGUE.items() if not {"refused", "called_otherwise"} & set(entry)]


def refused():
    """Families that are not."""
    return [name for name, entry in CATALOGUE.items() if "refused" in entry]


def pytest_generate_tests(metafunc):
    for fixture, names in (("family", supported()), ("refused_family", refused())):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, names, scope="module")


@pytest.fixture(scope="session")
def catalogue():
    """Family to its entry."""
    return CATALOGUE


@pytest.fixture(scope="session")
def make():
    """`build`."""
    return build


@pytest.fixture(scope="session")
def batch():
    """Makes inputs of two sequences, of 9 and 6 tokens where `padding` names a side, else both of 9."""

    def inputs(padding=None, rows=2):
        generator = torch.Generator().manual_seed(1)
        ids_BS = torch.randint(3, 64, (rows, 9), generator=generator)
        mask_BS = torch.ones_like(ids_BS)
        if padding == "left":
            mask_BS[1, :3] = 0
        elif padding == "right":
            mask_BS[1, -3:] = 0
        return {"input_ids": ids_BS.masked_fill(mask_BS == 0, 0), "attention_mask": mask_BS}

    return inputs
