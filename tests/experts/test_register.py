"""`experts_implementation="crossways"` in every transformers family that dispatches its experts, against eager."""

import importlib
import re
import subprocess
import sys
import warnings
from inspect import signature
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

import crossways
from crossways.experts.register import ExpertsFallbackWarning, experts_report, may_hold_a_part, plan_experts

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
EXPERTS, WIDTH, EXPERT_WIDTH, TOKENS, K = 4, 16, 24, 13, 2
SIZES = {
    "hidden_size": WIDTH,
    "moe_hidden_size": WIDTH,
    "intermediate_size": EXPERT_WIDTH,
    "moe_intermediate_size": EXPERT_WIDTH,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
}
PATTERN = re.compile(r"@use_experts_implementation[^\n]*\nclass (\w+)\(")
NOT_OURS = {
    "beam": "gate function of its own",
    "deepseek_v4": "gate function of its own",
    "diffusion_gemma": "activation",
    "gemma4": "activation",
    "glm5_next": "gate function of its own",
    "gpt_oss": "biases",
    "hy_v4": "gate function of its own",
    "inkling2": "gate function of its own",
    "minimax_m3_vl": "gate function of its own",
    "muse_spark": "norm after each expert",
    "openai_privacy_filter": "biases",
    "nemotron_h": "activation",
}
"""Families that have more than two matrices and a known activation, and what the reason must say."""
CONFIGS = {
    "Ernie4_5_VLMoeMoeExperts": "Ernie4_5_VLMoeTextConfig",
    "Qwen3OmniMoeThinkerTextExperts": "Qwen3OmniMoeTextConfig",
}
"""Of experts whose class does not say which configuration it takes."""


def families():
    folder = Path(transformers.__file__).parent / "models"
    for path in sorted(folder.glob("*/modeling_*.py")):
        for name in PATTERN.findall(path.read_text()):
            yield pytest.param(path.parent.name, name, id=f"{path.parent.name}-{name}")


@pytest.fixture(autouse=True)
def _registered():
    crossways.register_experts()


def tiny_config(family, module, experts_class):
    annotated = re.search(r"config: \"?(\w+)", Path(module.__file__).read_text().split(f"class {experts_class}")[1])
    config_class = getattr(module, CONFIGS.get(experts_class, annotated.group(1) if annotated else ""), None)
    config = config_class() if config_class else CONFIG_MAPPING[family]().get_text_config()
    for name, size in SIZES.items():
        if not isinstance(getattr(config, name, []), list):
            setattr(config, name, size)
    return config


def make_experts(family, experts_class, dtype):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    make = getattr(module, experts_class)
    width = {"intermediate_size": EXPERT_WIDTH} if "intermediate_size" in signature(make.__init__).parameters else {}
    experts = make(tiny_config(family, module, experts_class), **width)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.3).to(dtype)
    return experts


def run(experts, implementation, places=None):
    """Output and every gradient; `places` is the expert of weight zero of some pairs."""
    experts.config._experts_implementation_internal = implementation
    dtype = next(experts.parameters()).dtype
    down = experts.down_proj
    width = down.shape[2] if experts.is_transposed else down.shape[1]
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(TOKENS, width, generator=generator).to(dtype).requires_grad_()
    index_TK = torch.rand(TOKENS, experts.num_experts, generator=generator).topk(K).indices
    weight_TK = torch.rand(TOKENS, K, generator=generator).to(dtype)
    if places is not None:
        index_TK[::3, 1] = places
        weight_TK[::3, 1] = 0.0
    weight_TK.requires_grad_()
    y_TD = experts(x_TD, index_TK, weight_TK)
    leaves = [x_TD, weight_TK, *experts.parameters()]
    grad_y = torch.randn(y_TD.shape, generator=generator).to(y_TD.dtype)
    return [y_TD, *torch.autograd.grad(y_TD, leaves, grad_y, allow_unused=True)]


def assert_close(actual, expected, tolerance):
    for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert (ours is None) == (theirs is None), index
        if ours is not None:
            assert ours.dtype == theirs.dtype
            error = (ours.double() - theirs.double()).norm() / theirs.double().norm().clamp_min(1e-12)
            assert error <= tolerance, f"tensor {index}: relative RMS {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("family", "experts_class"), families())
def test_every_family_agrees_with_eager(family, experts_class, dtype):
    experts = make_experts(family, experts_class, dtype)
    expected = run(experts, "eager")
    reason = plan_experts(experts).reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual = run(experts, "crossways")
    assert_close(actual, expected, TOLERANCE[dtype])
    assert (reason is None) == (family not in NOT_OURS), reason
    told = [str(one.message) for one in caught if issubclass(one.category, ExpertsFallbackWarning)]
    assert (reason is not None) == bool(told)
    if reason:
        assert NOT_OURS[family] in reason
        assert reason in told[0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("family", "experts_class"),
    [family for family in families() if family.values[1] in ("MixtralExperts", "AriaExperts", "JambaExperts")],
)
def test_sentinels_are_nobodys_pairs(family, experts_class, dtype):
    """As expert 0 with weight zero would be, but for the gradient of that weight, which they have none of."""
    experts = make_experts(family, experts_class, dtype)
    actual = run(experts, "crossways", places=experts.num_experts)
    assert not actual[2][::3, 1].any()
    expected = run(experts, "eager", places=0)
    expected[2][::3, 1] = 0.0
    assert_close(actual, expected, TOLERANCE[dtype])


def test_the_experts_of_one_rank_of_an_expert_parallel_group():
    """Each rank holds half of the experts and gets local indices; the ranks' outputs add up to the whole."""
    whole = make_experts("mixtral", "MixtralExperts", torch.float32)
    index_TK = torch.rand(TOKENS, EXPERTS).topk(K).indices
    weight_TK, x_TD = torch.rand(TOKENS, K), torch.randn(TOKENS, WIDTH)
    whole.config._experts_implementation_internal = "eager"
    expected = whole(x_TD, index_TK, weight_TK)
    total = torch.zeros_like(expected)
    for rank in range(2):
        local = make_experts("mixtral", "MixtralExperts", torch.float32)
        half = EXPERTS // 2
        for name in ("gate_up_proj", "down_proj"):
            part = getattr(whole, name)[rank * half : (rank + 1) * half]
            setattr(local, name, nn.Parameter(part.detach().clone()))
        local.num_experts, local._is_expert_parallel = half, True
        local.config._experts_implementation_internal = "crossways"
        mine_TK = index_TK // half == rank
        local_TK = torch.where(mine_TK, index_TK - rank * half, half)
        total += local(x_TD, local_TK, weight_TK * mine_TK)
    torch.testing.assert_close(total, expected, rtol=1e-5, atol=1e-5)


def test_older_versions_do_not_say_whether_experts_are_spread():
    """Transformers 5.17 has neither of the two attributes; its expert parallelism gives the module a `forward`."""
    experts = make_experts("mixtral", "MixtralExperts", torch.float32)
    for name in ("has_post_expert_norm", "_is_expert_parallel"):
        vars(experts).pop(name, None)
    assert plan_experts(experts).reason is None
    assert not may_hold_a_part(experts)
    experts.forward = lambda *arguments: type(experts).forward(experts, *arguments)
    assert may_hold_a_part(experts)
    experts._is_expert_parallel = False
    assert not may_hold_a_part(experts)


def test_nothing_is_registered_on_import():
    code = "import crossways.experts; from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as A;"
    subprocess.run([sys.executable, "-c", code + "assert 'crossways' not in A.valid_keys()"], check=True)
    assert "crossways" in ALL_EXPERTS_FUNCTIONS.valid_keys()


MODELS = {
    "olmoe": {},
    "flex_olmo": {},
    "mixtral": {},
    "qwen2_moe": {"decoder_sparse_step": 1, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"decoder_sparse_step": 1, "head_dim": 8},
    "phimoe": {},
    "granitemoe": {},
    "granitemoeshared": {"shared_intermediate_size": 24},
    "dots1": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 8},
    "glm4_moe": {"first_k_dense_replace": 0, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "head_dim": 8},
    "ernie4_5_moe": {"moe_layer_start_index": 0},
    "minimax": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "moe_topk": [2, 2]},
    "gpt_oss": {"head_dim": 8},
}
COMMON = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_jitter_noise": 0.0,
    "input_jitter_noise": 0.0,
}


def loss_and_gradients(model, implementation):
    model.set_experts_implementation(implementation)
    model.zero_grad()
    ids_BS = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(2))
    logits = model(ids_BS).logits
    logits.square().mean().backward()
    return [logits, *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore::crossways.experts.register.ExpertsFallbackWarning")
def test_whole_models(family):
    config_class = CONFIG_MAPPING[family]
    known = vars(config_class())
    fields = {name: value for name, value in (SIZES | COMMON).items() if name in known or name in dir(config_class)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**fields, **MODELS[family])).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    report = experts_report(model)
    assert report
    assert all((plan.reason is None) == (family not in NOT_OURS) for plan in report.values())
    assert_close(loss_and_gradients(model, "crossways"), loss_and_gradients(model, "eager"), 1e-4)


def test_from_pretrained(tmp_path):
    config = CONFIG_MAPPING["olmoe"](**SIZES, **COMMON | {"num_attention_heads": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="crossways")
    assert model.get_experts_implementation()[""] == "crossways"
    logits = model(torch.arange(3, 9)[None]).logits
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits, model(torch.arange(3, 9)[None]).logits, rtol=1e-4, atol=1e-5)
