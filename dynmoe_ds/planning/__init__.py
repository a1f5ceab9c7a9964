"""What a training step costs in time and memory under a layout of ranks, before any rank is started."""

from dynmoe_ds.planning.cluster import Cluster, HeldOutError, Link
from dynmoe_ds.planning.layout import Layout
from dynmoe_ds.planning.memory import Memory, memory_per_rank
from dynmoe_ds.planning.model_shape import ModelShape, mean_k_of, shape_of
from dynmoe_ds.planning.search import Candidate, candidates
from dynmoe_ds.planning.step_time import StepTime, step_time
from dynmoe_ds.planning.work import Work, work_per_rank

__all__ = [
    "Candidate",
    "Cluster",
    "HeldOutError",
    "Layout",
    "Link",
    "Memory",
    "ModelShape",
    "StepTime",
    "Work",
    "candidates",
    "mean_k_of",
    "memory_per_rank",
    "shape_of",
    "step_time",
    "work_per_rank",
]
