"""TorchTitan 0.2.2 as the side-by-side peer of ``launch/bench.py what=train``: our `mini` shape in its vocabulary.

Imported by TorchTitan through ``--experimental.custom_import peer_torchtitan``. Documents are longer than any sequence,
so that its block-causal mask equals our causal one.
"""

import random

from datasets import Dataset
from torchtitan.hf_datasets import DatasetConfig, text_datasets
from torchtitan.models.deepseek_v3 import deepseekv3_args
from torchtitan.models.deepseek_v3.model.args import DeepSeekV3ModelArgs
from torchtitan.models.moe import MoEArgs

DOCUMENTS, WORDS = 512, 6000


def long_documents(_path: str) -> Dataset:
    """Documents of random numbers, each some 40,000 characters."""
    draw = random.Random(0)
    texts = [" ".join(str(draw.randrange(10**6)) for _ in range(WORDS)) for _ in range(DOCUMENTS)]
    return Dataset.from_dict({"text": texts})


text_datasets.DATASETS["long_documents"] = DatasetConfig(
    path="long_documents", loader=long_documents, sample_processor=lambda sample: sample["text"]
)

deepseekv3_args["mini"] = DeepSeekV3ModelArgs(
    vocab_size=129280, dim=2048, inter_dim=5632, moe_inter_dim=1024, n_layers=12, n_dense_layers=1, n_heads=16,
    q_lora_rank=768, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
    attn_type="flex", attn_mask_type="block_causal",
    moe_args=MoEArgs(
        num_experts=64, num_shared_experts=1, top_k=8, num_expert_groups=8, num_limited_groups=4,
        score_func="sigmoid", route_norm=True, route_scale=2.5, score_before_experts=False,
    ),
)  # fmt: skip
