"""Merge neural networks as Fréchet means on manifolds that respect their symmetries.

The names below are the public surface; each is documented where it is defined.
"""

from manifold_merge._version import __version__
from manifold_merge.adapters import Adapter
from manifold_merge.averaged_model import FrechetAveragedModel
from manifold_merge.fisher import FisherEuclidean, FisherLoRAQuotient, KroneckerFisher
from manifold_merge.frechet import frechet_mean
from manifold_merge.lift import lifted_mean
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_groups import param_groups
from manifold_merge.merge import AdapterMerge, merge_adapters
from manifold_merge.optim import FrechetMean
from manifold_merge.polar import PolarLoRAQuotient
from manifold_merge.quotient import QuotientManifold
from manifold_merge.refine import Refinement, refine_adapters
from manifold_merge.solution import FrechetSolution, Status

__all__ = [
    "Adapter",
    "AdapterMerge",
    "FisherEuclidean",
    "FisherLoRAQuotient",
    "FrechetAveragedModel",
    "FrechetMean",
    "FrechetSolution",
    "KroneckerFisher",
    "LoRAQuotient",
    "PolarLoRAQuotient",
    "QuotientManifold",
    "Refinement",
    "Status",
    "__version__",
    "frechet_mean",
    "lifted_mean",
    "merge_adapters",
    "param_groups",
    "refine_adapters",
]
