"""Updates of clients with random factors."""

import torch

M, N, R = 7, 6, 3


def factors(seed, m=M, n=N, r=R, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=generator, dtype=dtype) for s in ((m, r), (r, n)))


def update(seed, r=R, dtype=torch.float64):
    """Two pairs, a head and a count."""
    found = {}
    for i, (m, n) in enumerate([(M, N), (4, 9)]):
        b, a = factors(10 * seed + i, m, n, r, dtype)
        found |= {f"layer.{i}.lora_B.weight": b, f"layer.{i}.lora_A.weight": a}
    generator = torch.Generator().manual_seed(seed)
    found["head.weight"] = torch.randn(2, 3, generator=generator, dtype=dtype)
    found["head.count"] = torch.tensor(seed)
    return found


def products(tensors):
    return {
        key: tensors[key].double().flatten(1)
        @ tensors[key.replace("lora_B", "lora_A")].double().flatten(1)
        for key in tensors
        if "lora_B" in key
    }


def rebased(tensors, seed, condition=100.0):
    """The same model in another gauge."""
    moved = dict(tensors)
    for key in products(tensors):
        other = key.replace("lora_B", "lora_A")
        b, a = tensors[key].double(), tensors[other].double()
        generator = torch.Generator().manual_seed(seed)
        q = torch.linalg.qr(torch.randn(len(a), len(a), generator=generator, dtype=b.dtype))[0]
        gauge = q * torch.logspace(-0.5, 0.5, len(a), base=condition, dtype=b.dtype)
        moved[key] = (b @ gauge).to(tensors[key].dtype)
        moved[other] = torch.linalg.solve(gauge, a).to(tensors[other].dtype)
    return moved


def gap(one, two):
    """Greatest relative difference of a product."""
    one, two = products(one), products(two)
    assert one.keys() == two.keys()
    return max(float((one[k] - two[k]).norm() / two[k].norm()) for k in one)
