"""The contract suite for geoopt manifolds: is the geometry what it claims to be?

:func:`check_manifold` runs every law that applies to a manifold, on random points, and raises with
all that failed, by how much, and what to do. It works for any subclass of ``geoopt.Manifold``,
embedded or quotient. Most wrong formulas still return plausible numbers of the right shape: laws of
*order* (log-log slopes) and identities between methods tell them from right ones.

In a test, make each law a case of its own::

    @pytest.mark.parametrize("law", list_laws())
    def test_contract(law):
        check_manifold(MyManifold(), shape=(5, 2), laws=[law])

Each law is also a function, ``check_<law>(manifold, **options)`` with the options of
:func:`check_manifold`, and :func:`register_law` adds laws. The laws:

* arrays: ``shapes``, ``arguments_unchanged``, ``batching``, ``broadcasting``, ``vmap``,
  ``single_precision``;
* validity: ``valid_points``, ``invalid_points``, ``nan_points``, ``wrong_shape``,
  ``point_projection``;
* tangent spaces: ``projections``, ``self_adjoint_projection``, ``metric``, ``norm``,
  ``component_inner``, ``gradient``;
* moving: ``retraction``, ``retraction_order``, ``exponential``, ``geodesic_speed``,
  ``geodesic_flow``, ``geodesic_variation``, ``transport``, ``retr_transp``, ``expmap_transp``,
  ``isometric_transport``;
* measuring: ``distance``, ``distance_to_itself``, ``geodesic_distance``, ``exp_log``,
  ``log_distance``, ``distance_gradient``, ``finite_gradients``;
* optimising: ``gradient_slope``, ``hessian``, ``optimisers``, ``scaled``;
* quotients: ``representatives``, ``gauge_invariance``, ``gauge_equivariance``, ``horizontality``,
  ``optimiser_equivariance``.
"""

from __future__ import annotations

from manifold_merge.checks_arrays import (
    check_arguments_unchanged,
    check_batching,
    check_broadcasting,
    check_shapes,
    check_single_precision,
    check_vmap,
)
from manifold_merge.checks_frame import (
    LAWS,
    Law,
    Sample,
    check_manifold,
    list_laws,
    register_law,
)
from manifold_merge.checks_laws import (
    check_component_inner,
    check_expmap_transp,
    check_gradient,
    check_invalid_points,
    check_isometric_transport,
    check_metric,
    check_nan_points,
    check_norm,
    check_optimisers,
    check_point_projection,
    check_projections,
    check_retr_transp,
    check_scaled,
    check_self_adjoint_projection,
    check_transport,
    check_valid_points,
    check_wrong_shape,
)
from manifold_merge.checks_quotient import (
    check_gauge_equivariance,
    check_gauge_invariance,
    check_horizontality,
    check_optimiser_equivariance,
    check_representatives,
)
from manifold_merge.checks_report import (
    CheckReport,
    ContractViolation,
    LawResult,
    Measurement,
    claim,
)
from manifold_merge.checks_slopes import (
    LogLogSlope,
    check_distance,
    check_distance_gradient,
    check_distance_to_itself,
    check_exp_log,
    check_exponential,
    check_finite_gradients,
    check_geodesic_distance,
    check_geodesic_flow,
    check_geodesic_speed,
    check_geodesic_variation,
    check_gradient_slope,
    check_hessian,
    check_log_distance,
    check_retraction,
    check_retraction_order,
    log_log_slope,
)

__all__ = [
    "LAWS",
    "CheckReport",
    "ContractViolation",
    "Law",
    "LawResult",
    "LogLogSlope",
    "Measurement",
    "Sample",
    "check_arguments_unchanged",
    "check_batching",
    "check_broadcasting",
    "check_component_inner",
    "check_distance",
    "check_distance_gradient",
    "check_distance_to_itself",
    "check_exp_log",
    "check_expmap_transp",
    "check_exponential",
    "check_finite_gradients",
    "check_gauge_equivariance",
    "check_gauge_invariance",
    "check_geodesic_distance",
    "check_geodesic_flow",
    "check_geodesic_speed",
    "check_geodesic_variation",
    "check_gradient",
    "check_gradient_slope",
    "check_hessian",
    "check_horizontality",
    "check_invalid_points",
    "check_isometric_transport",
    "check_log_distance",
    "check_manifold",
    "check_metric",
    "check_nan_points",
    "check_norm",
    "check_optimiser_equivariance",
    "check_optimisers",
    "check_point_projection",
    "check_projections",
    "check_representatives",
    "check_retr_transp",
    "check_retraction",
    "check_retraction_order",
    "check_scaled",
    "check_self_adjoint_projection",
    "check_shapes",
    "check_single_precision",
    "check_transport",
    "check_valid_points",
    "check_vmap",
    "check_wrong_shape",
    "claim",
    "list_laws",
    "log_log_slope",
    "register_law",
]
