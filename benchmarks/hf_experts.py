"""transformers' sparse MoE block with ``experts_implementation="graphmoe"`` against those it brings.

Block, router, weights and input are the same; outputs and gradients are compared before anything is timed. A
step is a forward and a backward pass and fused AdamW. ``GEMM ideal`` is the time of the bare matrix products
of a perfectly balanced layer: no forward and backward pass can be faster.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

from benchmarks.moe_layer import Shape, gemm_ideal
from benchmarks.timing import forward_backward, side_by_side
from graphmoe.integrations import hf

OURS, IDEAL = hf.NAME, "GEMM ideal"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
AIM = 1.15
"""Time of the best implementation that transformers brings, over ours."""

SHAPES = (Shape(2048, 256, 8, 1024), Shape(2048, 256, 64, 512))


def build(shape: Shape, implementation: str, device: torch.device) -> nn.Module:
    """Mixtral's block; the same weights every time."""
    config = MixtralConfig(
        hidden_size=shape.channels,
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config).to(device, shape.dtype)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in block.parameters():
            weight.normal_(std=weight.size(-1) ** -0.5, generator=generator)
    return block


def fits(shape: Shape, implementation: str) -> bool:
    """``batched_mm`` copies the weights of an expert for every row, and their gradients as well."""
    copied = shape.tokens * shape.k * 3 * shape.channels * shape.hidden * shape.dtype.itemsize
    return implementation != "batched_mm" or copied < 2**31


def difference(ours: nn.Module, peer: nn.Module, x: Tensor, grad: Tensor) -> float:
    """Largest difference of outputs and gradients, each relative to the largest value of its tensor."""
    results = []
    for block in (ours, peer):
        forward_backward(block, x, grad)()
        with torch.no_grad():
            results.append([block(x), x.grad, *(weight.grad for weight in block.parameters())])
    pairs = zip(*results, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def training_step(block: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Forward, backward and fused AdamW."""
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-4, fused=True)
    both = forward_backward(block, x, grad)

    def step() -> None:
        both()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of every implementation at one shape, and how far each is from ours."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = [name for name in (*IMPLEMENTATIONS, OURS) if fits(shape, name)]
    blocks = {name: build(shape, name, device) for name in names}
    torch.manual_seed(0)
    x = torch.randn(1, shape.tokens, shape.channels, dtype=shape.dtype, device=device, requires_grad=True)
    grad = torch.randn_like(x)
    apart = {name: difference(blocks[OURS], block, x, grad) for name, block in blocks.items() if name != OURS}
    for block in blocks.values():
        block.zero_grad(set_to_none=True)
    ideal = {IDEAL: gemm_ideal(shape, device)}
    both = {name: forward_backward(block, x, grad) for name, block in blocks.items()}
    times = {"forward + backward": side_by_side(ideal | both, rounds=rounds)}
    steps = {name: training_step(block, x, grad) for name, block in blocks.items()}
    times["training step"] = side_by_side(steps, rounds=rounds)
    left_out = [name for name in IMPLEMENTATIONS if name not in names]
    return {"shape": str(shape), "ms": times, "difference": apart, "left_out": left_out}


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    hf.register()
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        print(f"\nMixtral's sparse MoE block, {shape}")
        for what, times in result["ms"].items():
            print(f"{what:24} {'ms':>8} {'/ ours':>9} {'difference':>11}")
            for name, value in sorted(times.items(), key=lambda item: item[1]):
                far = result["difference"].get(name)
                print(
                    f"  {name:22} {value:8.1f} {value / times[OURS]:8.2f}x "
                    f"{'' if far is None else format(far, '.1e'):>11}"
                )
            best = min(value for name, value in times.items() if name in IMPLEMENTATIONS)
            result.setdefault("ratio", {})[what] = best / times[OURS]
            print(f"  best of transformers / ours: {best / times[OURS]:.2f} (aim: at least {AIM})")
        for name in result["left_out"]:
            print(f"  {name:22} left out: it would gather more than 2 GiB of weights")
        results.append(result)
    return results
