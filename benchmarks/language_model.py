"""Training steps and decoding of ``GraphMoEForCausalLM`` against transformers' ``MixtralForCausalLM``.

Without coupling the two are the same function: weights are copied, and logits and losses are compared before
anything is timed. A step is a forward pass with labels, a backward pass and fused AdamW; the load-balancing
loss is on in both, with the same coefficient, and our router z-loss, which Mixtral lacks, is off.
``LlamaForCausalLM`` is a dense model of as many active parameters. ``GEMM ideal`` is the time of the bare
matrix products of a step with balanced experts, without those of attention: nothing can be faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from benchmarks.timing import side_by_side
from graphmoe.models import GraphMoEConfig, GraphMoEForCausalLM

OURS, IDEAL, DENSE = "graphmoe", "GEMM ideal", "transformers Llama, dense"
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
AIM = 1.25
"""Tokens a second of ours, over those of the best implementation of Mixtral."""


@dataclass(frozen=True)
class Shape:
    """Sizes of the model and of a batch."""

    vocab: int = 4096
    channels: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 4
    experts: int = 8
    k: int = 2
    hidden: int = 1024
    batch: int = 8
    length: int = 256

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def common(self) -> dict:
        """What the configurations of all models name alike."""
        return {
            "vocab_size": self.vocab,
            "hidden_size": self.channels,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def __str__(self) -> str:
        return (
            f"{self.batch} x {self.length} tokens, d={self.channels} L={self.layers} E={self.experts} "
            f"k={self.k} ff={self.hidden} vocab={self.vocab} heads={self.heads}/{self.kv_heads}"
        )


SHAPES = (Shape(),)
NEW_TOKENS = 64


def build_ours(shape: Shape) -> GraphMoEForCausalLM:
    """Our model: routed, uncoupled experts."""
    return GraphMoEForCausalLM(
        GraphMoEConfig(
            **shape.common(),
            intermediate_size=shape.hidden,
            num_experts=shape.experts,
            num_experts_per_tok=shape.k,
            router_aux_loss_coef=0.01,
            router_z_loss_coef=0.0,
            rope_theta=1e4,
        )
    )


def build_mixtral(ours: GraphMoEForCausalLM, shape: Shape, implementation: str) -> MixtralForCausalLM:
    """transformers' model with one of its experts implementations, and our weights."""
    config = MixtralConfig(
        **shape.common(),
        intermediate_size=shape.hidden,
        num_local_experts=shape.experts,
        num_experts_per_tok=shape.k,
        output_router_logits=True,  # without them there is no load-balancing loss
        router_aux_loss_coef=0.01,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        sliding_window=None,
        experts_implementation=implementation,
    )
    peer = MixtralForCausalLM(config)
    pairs = [(peer.model.embed_tokens, ours.model.embed_tokens), (peer.model.norm, ours.model.norm)]
    with torch.no_grad():
        for block, own in zip(peer.model.layers, ours.model.layers, strict=True):
            attend, moe = own.attend, own.feed_forward
            theirs = block.self_attn
            pairs += [(theirs.q_proj, attend.lin_query), (theirs.k_proj, attend.lin_key)]
            pairs += [(theirs.v_proj, attend.lin_value), (theirs.o_proj, attend.lin_out)]
            pairs += [(block.input_layernorm, own.attend_norm), (block.mlp.gate, moe.router)]
            pairs += [(block.post_attention_layernorm, own.feed_forward_norm)]
            block.mlp.experts.gate_up_proj.copy_(moe.experts.gate_up_proj)
            block.mlp.experts.down_proj.copy_(moe.experts.down_proj)
        for theirs, own in pairs:
            theirs.weight.copy_(own.weight)
    return peer


def build_dense(shape: Shape) -> LlamaForCausalLM:
    """A dense model whose feed-forward is as wide as the ``k`` experts of a token together."""
    return LlamaForCausalLM(LlamaConfig(**shape.common(), intermediate_size=shape.k * shape.hidden))


def training_step(model: PreTrainedModel, ids: Tensor) -> Callable[[], None]:
    """One whole step on a batch of token ids."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(model: PreTrainedModel, prompt: Tensor) -> Callable[[], Tensor]:
    """Greedy continuation of one prompt with a cache."""

    def decode() -> Tensor:
        return model.generate(
            prompt, max_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True, pad_token_id=0
        )

    return decode


def gemm_ideal(shape: Shape, device: torch.device) -> Callable[[], None]:
    """The matrix products of a step and nothing else, in place: three for every weight."""
    tokens, rows, d = shape.tokens, shape.tokens * shape.k // shape.experts, shape.channels
    kv = d * shape.kv_heads // shape.heads
    # (rows, inputs, outputs) of a product, and how many times a step needs it
    products = [
        (tokens, d, d, 2 * shape.layers),
        (tokens, d, kv, 2 * shape.layers),
        (tokens, d, shape.vocab, 1),
    ]
    routed = shape.layers * shape.experts
    products += [(rows, d, 2 * shape.hidden, routed), (rows, shape.hidden, d, routed)]
    work = []
    for count, inputs, outputs, times in products:
        sizes = ((count, inputs), (outputs, inputs), (count, outputs))
        work.append(([torch.randn(size, device=device) for size in sizes], times))

    def multiply() -> None:
        for (x, weight, out), times in work:
            for _ in range(times):
                torch.mm(x, weight.t(), out=out)
                torch.mm(out.t(), x, out=weight)
                torch.mm(out, weight, out=x)
                # The values do not matter, but they must not grow to infinity or shrink to denormals.
                x.fill_(0.1)
                weight.fill_(0.1)

    return multiply


def fits(shape: Shape, implementation: str) -> bool:
    """``batched_mm`` copies the weights of an expert for every row, and their gradients as well."""
    copied = shape.tokens * shape.k * 3 * shape.channels * shape.hidden * 4
    return implementation != "batched_mm" or copied < 2**31


def measure(shape: Shape, *, rounds: int) -> dict:
    """Milliseconds of a step and of decoding of every model, and how far those are apart that are equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours = build_ours(shape).to(device)
    names = [name for name in IMPLEMENTATIONS if fits(shape, name)]
    models: dict[str, PreTrainedModel] = {OURS: ours}
    models |= {f"transformers {name}": build_mixtral(ours, shape, name).to(device) for name in names}
    ids = torch.randint(shape.vocab, (shape.batch, shape.length), device=device)
    outputs = {}
    with torch.no_grad():
        for name, model in models.items():
            outputs[name] = model.train()(input_ids=ids, labels=ids, use_cache=False).logits
    apart = {n: (out - outputs[OURS]).abs().max().item() for n, out in outputs.items() if n != OURS}
    del outputs
    models[DENSE] = build_dense(shape).to(device)
    for model in models.values():
        model.generation_config.eos_token_id = None  # every model decodes as many tokens
    prompt = ids[:1, :8]
    decode = {name: decoding(model.eval(), prompt) for name, model in models.items()}
    same = {name: torch.equal(decode[name](), decode[OURS]()) for name in apart}
    decoded = side_by_side(decode, rounds=rounds)
    work = {IDEAL: gemm_ideal(shape, device)}
    work |= {name: training_step(model.train(), ids) for name, model in models.items()}
    steps = side_by_side(work, rounds=rounds)
    left_out = [f"transformers {name}" for name in IMPLEMENTATIONS if name not in names]
    return {
        "shape": str(shape),
        "ms": steps,
        "decode_ms": decoded,
        "difference": apart,
        "same_tokens": same,
        "left_out": left_out,
    }


def run(*, rounds: int = 9) -> list[dict]:
    """Measure all shapes and print a table of each."""
    results = []
    for shape in SHAPES:
        result = measure(shape, rounds=rounds)
        times, decoded = result["ms"], result["decode_ms"]
        ours, ideal = times[OURS], times[IDEAL]
        print(f"\nLanguage model, training step, {shape}")
        print(
            f"{'':30} {'ms':>8} {'tokens/s':>9} {'peer / ours':>12} {'of GEMM ideal':>14} {'difference':>11}"
        )
        for name, value in sorted(times.items(), key=lambda item: item[1]):
            apart = result["difference"].get(name)
            far = "" if apart is None else f"{apart:.1e}"
            # The dense model has another ideal: larger products, and no router.
            share = "" if name == DENSE else f"{100 * ideal / value:.0f} %"
            speed = 1e3 * shape.tokens / value
            print(f"{name:30} {value:8.0f} {speed:9.0f} {value / ours:11.2f}x {share:>14} {far:>11}")
        for name in result["left_out"]:
            print(f"{name:30} left out: it would gather more than 2 GiB of weights")
        best = min(value for name, value in times.items() if name in result["difference"])
        print(f"best Mixtral / ours: {best / ours:.2f} (aim: at least {AIM})")
        print(f"\nGreedy decoding of one sequence with a cache, {NEW_TOKENS} tokens")
        for name, value in sorted(decoded.items(), key=lambda item: item[1]):
            note = "" if result["same_tokens"].get(name, True) else "  (other tokens)"
            print(f"{name:30} {1e3 * NEW_TOKENS / value:8.0f} tokens/s{note}")
        results.append(result)
    return results
