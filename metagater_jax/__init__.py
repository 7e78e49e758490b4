"""MetaGater in JAX: small networks that adapt to a new device's task in one gradient step, learned across devices.

Pure functions of pytrees; everything works under jit, vmap and grad. Data sets on disk are read by
`metagater_jax.data.datasets`, which nothing in here imports.
"""

from metagater_jax.accelerated_proximal import (
    AcceleratedProximalState, accelerated_proximal, accelerated_proximal_eval_params)
from metagater_jax.accounting import dense_cost, gate_cost, gated_macs, gated_parameters, masked_macs
from metagater_jax.adaptation import (
    adapt_backbone, adapt_gate, calibrate_threshold, fine_tune, two_stage_adaptation)
from metagater_jax.algorithms.averaging import averaging
from metagater_jax.algorithms.fedavg import fedavg
from metagater_jax.algorithms.federated_pruning import FEDERATED_SCORES, PruningServer, federated_pruning
from metagater_jax.algorithms.fedprox import fedprox
from metagater_jax.algorithms.metagater import default_beta, metagater
from metagater_jax.algorithms.metasnip import metasnip
from metagater_jax.algorithms.per_fedavg import META_GRADIENTS, per_fedavg
from metagater_jax.algorithms.pfedme import pfedme
from metagater_jax.algorithms.reptile import reptile
from metagater_jax.convolution import average_pool, conv_as_matmul, max_pool
from metagater_jax.data.episodes import (
    ClassPool, Episode, augment_images, check_episodes, make_class_pool, sample_episode, sample_episodes, with_rotations)
from metagater_jax.data.partition import (
    Partition, draw_sizes, partition_by_dirichlet, partition_by_label, split_tasks)
from metagater_jax.data.population import (
    Batch, Minibatches, Pool, Population, TaskData, make_population, make_populations, make_task, sample_batch,
    sample_positions, to_float)
from metagater_jax.evaluation import TaskMetrics, evaluate_targets, evaluate_task, mean_over_task
from metagater_jax.federated import (
    Algorithm, ClientUpdate, FederatedState, RoundPlan, federated_init, federated_round, follow_plan, plan_rounds, run_rounds,
    sample_cohort)
from metagater_jax.gates import ChannelGate, binarize, gate_groups, logistic_noise, sparsity
from metagater_jax.gradual_pruning import (
    GradualPruningState, PruningSchedule, find_pruning, gradual_pruning, pruning_mask, sparsity_schedule, staged_schedule)
from metagater_jax.local import Loss, classification_loss, full_batch_gradient, local_solve, microbatched
from metagater_jax.meta_training import MetaState, evaluate_episodes, meta_init, run_meta_steps
from metagater_jax.metalearning import DERIVATIVES, MetaLearner, anil, maml, meta_reptile
from metagater_jax.models import MLP, ConvNet4, ConvNet7, ConvUnit, FewShotConvNet, NormalizedConv, ResNet12
from metagater_jax.network import GatedNetwork, Layer, network_layers, row_keys
from metagater_jax.penalties import (
    Penalty, block_soft_threshold, group_lasso, group_norms, l1, no_penalty, on_part, soft_threshold)
from metagater_jax.pruning import (
    AVERAGES, SCORES, anp_score, apply_mask, connection_saliency, effective_mask, is_kernel, magnitude_score, make_mask,
    mask_sparsity, nonzero_mask, prune_further, random_score, snip_score)
from metagater_jax.tasks import TASK_AXIS, map_tasks, task_axes, task_mesh
