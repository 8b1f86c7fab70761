"""What every model of ours tells transformers: how to initialise, save, load, record and recompute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import initialization as init
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaPreTrainedModel
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from crossways.errors import UserError
from crossways.experts.module import Experts
from crossways.experts.zero_computation import ZeroComputationExperts
from crossways.gates import Gate
from crossways.models.configuration import CrosswaysConfig
from crossways.models.decoder import CrosswaysDecoderLayer
from crossways.models.routed_attention import HeadExperts
from crossways.router import Router


class CrosswaysPreTrainedModel(LlamaPreTrainedModel):
    """Initialisation, and what transformers must know to save, load and record."""

    config_class = CrosswaysConfig
    config: CrosswaysConfig
    _no_split_modules = ["CrosswaysDecoderLayer"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = ["cutoff", "normaliser", "router.bias", "sparsity_coef"]  # noqa: RUF012
    _can_compile_fullgraph = False  # ragged assignments have data-dependent shapes
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": CrosswaysDecoderLayer,
        "attentions": [LlamaAttention, Qwen3Attention],
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Experts | ZeroComputationExperts):
            for name, parameter in module.named_parameters(recurse=False):
                std = 0.0 if name.endswith("_bias") else self.config.initializer_range
                init.normal_(parameter, mean=0.0, std=std)
        elif isinstance(module, HeadExperts):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, Gate):
            module.reset_parameters(self.config.router_initializer_range or self.config.initializer_range)
        elif isinstance(count := getattr(module, "training_passes", None), torch.Tensor):
            init.zeros_(count)
        elif isinstance(module, Router):
            for name, buffer in module.named_buffers(recurse=False):
                init.constant_(buffer, module.initial(name))

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] = checkpoint, **kwargs: Any
    ) -> None:
        """As in transformers, but reentrant checkpointing is refused: it cuts the auxiliary losses off their
        gradient without a word, since it only follows tensors that a layer returns by themselves."""
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get(
            "use_reentrant", True
        ):  # torch's default
            raise UserError("gradient checkpointing needs use_reentrant=False; the other kind loses auxiliary losses")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str | type = "AutoModel") -> None:
        """Nothing to do: the configuration's `save_pretrained` already says where these classes are. Transformers
        would copy our source file into every directory saved after loading one with `trust_remote_code`."""
