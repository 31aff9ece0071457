"""Merge neural networks as Fréchet means on manifolds that respect their symmetries.

The names below are the public surface; each is documented where it is defined.
"""

from manifold_merge._version import __version__
from manifold_merge.adapters import Adapter
from manifold_merge.frechet import frechet_mean
from manifold_merge.lift import lifted_mean
from manifold_merge.lora import LoRAQuotient
from manifold_merge.merge import AdapterMerge, merge_adapters
from manifold_merge.polar import PolarLoRAQuotient
from manifold_merge.quotient import QuotientManifold
from manifold_merge.solution import FrechetSolution, Status

__all__ = [
    "Adapter",
    "AdapterMerge",
    "FrechetSolution",
    "LoRAQuotient",
    "PolarLoRAQuotient",
    "QuotientManifold",
    "Status",
    "__version__",
    "frechet_mean",
    "lifted_mean",
    "merge_adapters",
]
