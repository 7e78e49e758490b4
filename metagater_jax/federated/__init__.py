"""What clients and server compute in a round, one algorithm per file, and the loop that runs any of them."""

from metagater_jax.federated.algorithm import ClientUpdate, FederatedAlgorithm, FederatedState, federated_init
from metagater_jax.federated.averaging import averaging, local_training
from metagater_jax.federated.fedavg import fedavg
from metagater_jax.federated.fedprox import fedprox
from metagater_jax.federated.host_tasks import PlannedRounds, TaskStore
from metagater_jax.federated.metagater import MetaGaterState, default_beta, metagater
from metagater_jax.federated.per_fedavg import per_fedavg
from metagater_jax.federated.pfedme import pfedme
from metagater_jax.federated.pruned import PruningServer, federated_pruning
from metagater_jax.federated.reptile import reptile
from metagater_jax.federated.rounds import RoundPlan, federated_round, follow_plan, plan_rounds, run_rounds, sample_cohort

__all__ = [
  "ClientUpdate",
  "FederatedAlgorithm",
  "FederatedState",
  "MetaGaterState",
  "PlannedRounds",
  "PruningServer",
  "RoundPlan",
  "TaskStore",
  "averaging",
  "default_beta",
  "fedavg",
  "federated_init",
  "federated_pruning",
  "federated_round",
  "fedprox",
  "follow_plan",
  "local_training",
  "metagater",
  "per_fedavg",
  "pfedme",
  "plan_rounds",
  "reptile",
  "run_rounds",
  "sample_cohort",
]
