"""Matrix products on a CPU with both inputs rounded to bf16 and sums in fp32, forward and backward.

Linear layers, routed experts and the training loss's head take part; attention, routers, norms and all sums stay in
fp32, and so do weights, gradients and optimizer states.
"""

from __future__ import annotations

from erniekit.base import runtime
from erniekit.base.errors import ConfigError
from erniekit.models.decoder import ErnieForCausalLM, Head
from erniekit.models.layers import Linear
from erniekit.models.moe import Experts
from erniekit.ops.wheel import has_bf16_products
from erniekit.precision.packed import PackedExperts, PackedLinear


def use_bf16_products(model: ErnieForCausalLM) -> None:
    """Round the inputs of the model's matrix products. Raises ConfigError where nothing would come of it."""
    if runtime.plain_ops():
        raise ConfigError("cpu_bf16_matmul: true and ERNIEKIT_PLAIN_OPS=1 exclude each other: drop one of them.")
    if not has_bf16_products():
        raise ConfigError(
            "cpu_bf16_matmul: true needs a processor with avx512_bf16 or amx_bf16, and oneDNN in the Paddle wheel; "
            "this machine has not both. Set it to false: everything is computed in fp32 then."
        )
    for layer in model.sublayers():
        if isinstance(layer, (Linear, Experts, Head, PackedLinear, PackedExperts)):
            layer.bf16_products = True
