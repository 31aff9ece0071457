"""Merge neural networks as Fréchet means on manifolds that respect their symmetries.

The names below are the public surface; each is documented where it is defined.
"""

from manifold_merge._version import __version__
from manifold_merge.activation_matching import activation_scores, unit_responses
from manifold_merge.adapters import Adapter
from manifold_merge.averaged_model import FrechetAveragedModel
from manifold_merge.batch_norm import reestimate_batch_norm, repair
from manifold_merge.checkpoint_align import ModelAlignment, align_models
from manifold_merge.checkpoint_merge import ModelMerge, merge_models
from manifold_merge.checkpoints import Checkpoint
from manifold_merge.client_update import UpdateError
from manifold_merge.federated import UpdateMerge, merge_updates
from manifold_merge.fisher import FisherEuclidean, FisherLoRAQuotient, KroneckerFisher
from manifold_merge.frechet import frechet_mean
from manifold_merge.lift import lifted_mean
from manifold_merge.lora import LoRAQuotient
from manifold_merge.lora_groups import param_groups
from manifold_merge.merge import AdapterMerge, merge_adapters
from manifold_merge.mergekit_merge import merge_mergekit
from manifold_merge.network_align import Alignment, align
from manifold_merge.network_merge import NetworkMerge, merge_networks
from manifold_merge.network_quotient import NetworkQuotient
from manifold_merge.optim import FrechetMean
from manifold_merge.peft_integration import add_frechet_adapter
from manifold_merge.permutation import PermutationQuotient
from manifold_merge.polar import PolarLoRAQuotient
from manifold_merge.quotient import QuotientManifold
from manifold_merge.refine import Refinement, refine_adapters
from manifold_merge.rescaling import balanced
from manifold_merge.solution import FrechetSolution, Status
from manifold_merge.symmetry import (
    GaugeGroup,
    NetworkSymmetry,
    PermutedSet,
    Placement,
    SymmetryElement,
    SymmetryError,
)
from manifold_merge.symmetry_derive import symmetry_of
from manifold_merge.symmetry_proof import prove

__all__ = [
    "Adapter",
    "AdapterMerge",
    "Alignment",
    "Checkpoint",
    "FisherEuclidean",
    "FisherLoRAQuotient",
    "FrechetAveragedModel",
    "FrechetMean",
    "FrechetSolution",
    "GaugeGroup",
    "KroneckerFisher",
    "LoRAQuotient",
    "ModelAlignment",
    "ModelMerge",
    "NetworkMerge",
    "NetworkQuotient",
    "NetworkSymmetry",
    "PermutationQuotient",
    "PermutedSet",
    "Placement",
    "PolarLoRAQuotient",
    "QuotientManifold",
    "Refinement",
    "Status",
    "SymmetryElement",
    "SymmetryError",
    "UpdateError",
    "UpdateMerge",
    "__version__",
    "activation_scores",
    "add_frechet_adapter",
    "align",
    "align_models",
    "balanced",
    "frechet_mean",
    "lifted_mean",
    "merge_adapters",
    "merge_mergekit",
    "merge_models",
    "merge_networks",
    "merge_updates",
    "param_groups",
    "prove",
    "reestimate_batch_norm",
    "refine_adapters",
    "repair",
    "symmetry_of",
    "unit_responses",
]
