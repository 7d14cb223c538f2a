"""DeepSeek-V3 and R1, the main model (arXiv 2412.19437)."""
from jaxlm.config import (MLAConfig, MLPConfig, MoEConfig, ModelConfig,
                          RopeConfig, RouterConfig, YarnScaling)

_V3 = ModelConfig(
    vocab_size=129280, d_model=7168, num_layers=61,
    attention=MLAConfig(
        num_heads=128, q_rank=1536, kv_rank=512, nope_head_dim=128,
        rope_head_dim=64, v_head_dim=128,
        rope=RopeConfig(10000.0, YarnScaling(
            factor=40.0, original_context=4096, beta_fast=32.0, beta_slow=1.0,
            truncate=True, mscale=1.0, mscale_all_dim=1.0), interleaved=True)),
    mlp=MLPConfig(18432), num_dense_layers=3,
    moe=MoEConfig(
        256, 8, MLPConfig(2048), shared=MLPConfig(2048),
        router=RouterConfig(
            "sigmoid_topk", renormalize=True, balance_bias=True, num_groups=8,
            groups_per_token=4, weight_scale=2.5)))

# R1 is V3 trained further.
PRESETS = {"deepseek-v3": _V3, "deepseek-r1": _V3}
