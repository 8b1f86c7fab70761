"""To and from Hugging Face's own families: Qwen2-MoE and Mixtral, with the same logits.

Weights are renamed, never retrained: the attention, the norms and the stacked experts have the same layout on both
sides. What a family cannot express is refused with the reason; nothing is dropped. A gate that layers share becomes
one equal copy per layer, so an exported PathMoE model computes the same but no longer ties its gates. Parity is up to
rounding in float32; in lower precision the families compute router logits in the model's dtype, ours in float32.
"""

from crossways.models.convert.mixtral import from_mixtral, to_mixtral
from crossways.models.convert.qwen2_moe import from_qwen2_moe, to_qwen2_moe

__all__ = ["from_mixtral", "from_qwen2_moe", "to_mixtral", "to_qwen2_moe"]
