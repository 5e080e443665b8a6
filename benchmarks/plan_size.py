"""What a plan of a Llama of seven billion parameters on the meta device costs: seconds, and the largest memory of the process.

python benchmarks/plan_size.py
"""

from __future__ import annotations

import resource
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grsd import mup


def llama(layers: int, width: int) -> LlamaForCausalLM:
    """Return the architecture at a size, without weights; heads of dimension 128."""
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=11008 * width // 4096,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def main() -> None:
    """Plan it five times; print the shortest and longest time, and the memory."""
    model, base = llama(32, 4096), llama(4, 512)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        plan = mup.plan(model, base=base, optimizer="muon_kimi")
        seconds.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    count = sum(p.numel() for p in model.parameters())
    print(f"{len(plan.entries)} tensors, {count / 1e9:.2f}e9 parameters")
    print(f"plan: {min(seconds):.3f} to {max(seconds):.3f} s; process: {memory:.2f} GiB")


if __name__ == "__main__":
    main()
