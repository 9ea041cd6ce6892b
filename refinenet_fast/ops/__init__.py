"""RefineNet's three hot paths as differentiable ops. One file each: what it accepts, forward and backward."""

from refinenet_fast.ops.crp import crp
from refinenet_fast.ops.fuse import fuse
from refinenet_fast.ops.rcu import rcu, rcu_run

__all__ = ["crp", "fuse", "rcu", "rcu_run"]
