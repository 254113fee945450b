"""The memory step of the paper, element by element in plain loops: the oracle of every faster form."""

import math

import torch


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    norms = [torch.sqrt(sum(x * x for x in v) + 1e-6) for v in (a, b)]
    return dot / (norms[0] * norms[1])


def softmax(values):
    largest = max(float(v) for v in values)
    powers = [torch.exp(v - largest) for v in values]
    return [p / sum(powers) for p in powers]


def oneplus(x):
    return 1 + torch.log1p(torch.exp(-abs(x))) + (x if float(x) > 0 else 0 * x)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def one_step(memory, usage, link, precedence, read_weights, write_weights, raw):
    """One sample: nested lists of scalars in, nested lists out."""
    slots, width, heads = len(memory), len(memory[0]), len(read_weights)
    take = iter(raw)
    keys = [[next(take) for _ in range(width)] for _ in range(heads + 1)]
    vector = [next(take) for _ in range(width)]
    strengths = [oneplus(next(take)) for _ in range(heads + 1)]
    erase = [sigmoid(next(take)) for _ in range(width)]
    free = [sigmoid(next(take)) for _ in range(heads)]
    allocation_gate, write_gate = sigmoid(next(take)), sigmoid(next(take))
    modes = [softmax([next(take) for _ in range(3)]) for _ in range(heads)]
    assert next(take, None) is None

    used = []
    for i in range(slots):
        retention = math.prod(1 - free[r] * read_weights[r][i] for r in range(heads))
        used.append((usage[i] + write_weights[i] - usage[i] * write_weights[i]) * retention)
    order = sorted(range(slots), key=lambda i: float(used[i]))
    allocation = [None] * slots
    for j, i in enumerate(order):
        product = math.prod(1e-6 + (1 - 1e-6) * used[order[n]] for n in range(j))
        allocation[i] = (1 - used[i]) * product
    alike = softmax([strengths[heads] * cosine(keys[heads], memory[i]) for i in range(slots)])
    write = [
        write_gate * (allocation_gate * allocation[i] + (1 - allocation_gate) * alike[i])
        for i in range(slots)
    ]
    memory = [
        [memory[i][c] * (1 - write[i] * erase[c]) + write[i] * vector[c] for c in range(width)]
        for i in range(slots)
    ]
    link = [
        [
            0 * link[i][j] if i == j else (1 - write[i] - write[j]) * link[i][j] + write[i] * precedence[j]
            for j in range(slots)
        ]
        for i in range(slots)
    ]
    precedence = [(1 - sum(write)) * precedence[i] + write[i] for i in range(slots)]
    read, reads = [], []
    for r in range(heads):
        before = [sum(link[j][i] * read_weights[r][j] for j in range(slots)) for i in range(slots)]
        after = [sum(link[i][j] * read_weights[r][j] for j in range(slots)) for i in range(slots)]
        found = softmax([strengths[r] * cosine(keys[r], memory[i]) for i in range(slots)])
        weights = [
            modes[r][0] * before[i] + modes[r][1] * found[i] + modes[r][2] * after[i] for i in range(slots)
        ]
        read.append(weights)
        reads.append([sum(weights[i] * memory[i][c] for i in range(slots)) for c in range(width)])
    return memory, used, link, precedence, read, write, reads


def literal_step(*inputs):
    """A batch: the six tensors of the slots and the interface in, the six and what was read out."""
    samples = [one_step(*(_lists(tensor) for tensor in sample)) for sample in zip(*inputs, strict=True)]
    return tuple(torch.stack([_tensor(value) for value in part]) for part in zip(*samples, strict=True))


def _lists(tensor):
    return [_lists(part) for part in tensor] if tensor.dim() else tensor


def _tensor(value):
    return torch.stack([_tensor(part) for part in value]) if isinstance(value, list) else value
