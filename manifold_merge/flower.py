"""A strategy for Flower that averages LoRA updates of clients as Fréchet means.

This module needs Flower, which ``manifold-merge[flwr]`` installs; it is written for the message API
of ``flwr.serverapp`` and tested with flwr 1.25 to 1.42. What it computes is
:func:`~manifold_merge.federated.merge_updates`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from manifold_merge.client_update import UpdateError
from manifold_merge.federated import UpdateMerge, merge_updates

if TYPE_CHECKING:
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
    from flwr.serverapp import Grid
    from flwr.serverapp.strategy import FedAvg
else:
    try:
        from flwr.app import ArrayRecord
        from flwr.serverapp.strategy import FedAvg
    except ImportError:
        FedAvg, ArrayRecord = object, None

__all__ = ["FedFrechet"]

logger = logging.getLogger(__name__)


class FedFrechet(FedAvg):
    """FedAvg whose average is a Fréchet mean: LoRA pairs on their quotient, all else as arrays.

    Sampling, evaluation and metrics are those of Flower's ``FedAvg``. Clients reply as they do
    there, with one ``ArrayRecord`` of the trained tensors under the names that they were sent, and
    one ``MetricRecord`` with ``num-examples``. Each may choose its own gauge and its own rank.

    Args:
        p: 2 for the mean, 1 for the geometric median, robust against clients of less than half of
            the weight.
        geometry: As in :func:`~manifold_merge.federated.merge_updates`.
        distance: As there.
        rank: Rank of the global factors, as there.
        pairs: Names of (B, A) of each pair, as there.
        scaling: Function from a rank to the factor on B A, as there.
        equal_weights: Count every client once. The number of examples is what a client claims, and
            a robust median should not depend on that.
        invalid: ``"raise"`` an error for a reply that cannot be averaged, or ``"drop"`` it with a
            warning, as Flower does with clients that fail.
        options: Arguments of ``FedAvg``, such as ``fraction_train``, ``min_train_nodes`` and
            ``weighted_by_key``.

    Attributes:
        merge: The last round's :class:`~manifold_merge.federated.UpdateMerge`, with the distance of
            each client from the mean.

    Raises:
        ImportError: Flower is not installed.
        ValueError: An option is unknown.

    Example::

        from flwr.app import ArrayRecord, Context
        from flwr.serverapp import Grid, ServerApp
        from manifold_merge.flower import FedFrechet

        app = ServerApp()

        @app.main()
        def main(grid: Grid, context: Context) -> None:
            strategy = FedFrechet(p=1, equal_weights=True, invalid="drop")
            result = strategy.start(grid, ArrayRecord(initial_tensors), num_rounds=5)
            final_tensors = result.arrays.to_torch_state_dict()
    """

    def __init__(
        self,
        *,
        p: int = 2,
        geometry: str = "embedded",
        distance: str | None = None,
        rank: int | str | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        scaling: Callable[[int], float] | None = None,
        equal_weights: bool = False,
        invalid: str = "raise",
        **options: Any,
    ) -> None:
        if ArrayRecord is None:
            raise ImportError(
                "FedFrechet needs Flower's flwr.serverapp.strategy, of flwr 1.25 or newer; "
                'install it with pip install "manifold-merge[flwr]"'
            )
        super().__init__(**options)
        self._options: dict[str, Any] = {
            "p": p, "geometry": geometry, "distance": distance, "rank": rank, "pairs": pairs,
            "scaling": scaling, "invalid": invalid,
        }  # fmt: skip
        self.equal_weights = equal_weights
        self.merge: UpdateMerge | None = None
        self._sent: ArrayRecord | None = None

    def summary(self) -> None:
        """Log the options, as Flower's strategies do."""
        super().summary()
        shown = {key: value for key, value in self._options.items() if value is not None}
        logger.info("FedFrechet: %s, equal_weights=%s", shown, self.equal_weights)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Configure a round of training as ``FedAvg`` does, and note what is sent to the clients.

        Args:
            server_round: The round, from 1.
            arrays: The global tensors.
            config: What clients are told beside.
            grid: The clients.

        Returns:
            A message for each chosen client.
        """
        self._sent = arrays
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what the clients sent.

        Args:
            server_round: The round, from 1.
            replies: Their messages.

        Returns:
            The global tensors and the averaged metrics; twice ``None``, which keeps the model of
            the last round, where no client sent an update that can be used.

        Raises:
            UpdateError: With ``invalid="raise"``, a reply that cannot be averaged; the message
                names the node.
        """
        contents: dict[str, tuple[Any, Any, Any]] = {}
        for reply in replies:
            name = f"node {reply.metadata.src_node_id}"
            if reply.has_error():
                logger.warning("round %d: %s failed: %s", server_round, name, reply.error.reason)
                continue
            try:
                contents[name] = reply.content, *self._read(name, reply.content)
            except UpdateError as error:
                if self._options["invalid"] == "raise":
                    raise
                logger.warning("round %d: left out: %s", server_round, error)
        self.merge = None
        if contents:
            _, updates, weights = zip(*contents.values(), strict=True)
            try:
                self.merge = merge_updates(
                    updates,
                    [1.0] * len(updates) if self.equal_weights else weights,
                    names=list(contents),
                    like=None if self._sent is None else self._sent.to_torch_state_dict(),
                    **self._options,
                )
            except UpdateError as error:
                if self._options["invalid"] == "raise":
                    raise
                logger.warning("round %d: %s", server_round, error)
        if self.merge is None:
            logger.warning("round %d: no update, the global tensors stay", server_round)
            return None, None
        used = [contents[name][0] for name in self.merge.distances]
        return (
            ArrayRecord(self.merge.tensors),
            self.train_metrics_aggr_fn(used, self.weighted_by_key),
        )

    def _read(self, name: str, content: Any) -> tuple[Any, float]:
        """Tensors and weight of one reply."""
        for what, records in (
            ("ArrayRecord", content.array_records),
            ("MetricRecord", content.metric_records),
        ):
            if len(records) != 1:
                raise UpdateError(f"{name}: {len(records)} {what}s in its reply, expected one")
        (arrays,) = content.array_records.values()
        (metrics,) = content.metric_records.values()
        weight = metrics.get(self.weighted_by_key)
        if not isinstance(weight, (int, float)) or not math.isfinite(weight) or weight < 0:
            raise UpdateError(
                f"{name}: {self.weighted_by_key!r} is {weight!r} in its MetricRecord, expected a "
                "number >= 0"
            )
        return arrays.to_torch_state_dict(), float(weight)
