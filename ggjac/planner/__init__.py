"""What a command will take: its work, the memory for it, and the time on this machine.

In order, each file using only those before it: `forward` (the floats of the forward pass), `work` (the sweeps of each
command), `passes` (what a pass over a block reads and computes), `memory` (the peak by part), `plan` (budgets and where
weights stay), `network` (the sums of ranks that share a model), `times` (seconds). `machine` and `bench` look at the
machine itself.
"""

from ggjac.planner.forward import runs_at_once, trace_floats
from ggjac.planner.memory import CONTEXT_BYTES, DEQUANTIZING_BYTES, sweep_floats
from ggjac.planner.network import Network, NetworkError, parse_rate
from ggjac.planner.passes import LayerPlan, Pass, routed_experts
from ggjac.planner.plan import Budget, NoFitError, Plan, check, fitting, make
from ggjac.planner.times import Rates, Times, krylov_flop, seconds
from ggjac.planner.work import PlanError

__all__ = [
    "CONTEXT_BYTES",
    "DEQUANTIZING_BYTES",
    "Budget",
    "LayerPlan",
    "Network",
    "NetworkError",
    "NoFitError",
    "Pass",
    "Plan",
    "PlanError",
    "Rates",
    "Times",
    "check",
    "fitting",
    "krylov_flop",
    "make",
    "parse_rate",
    "routed_experts",
    "runs_at_once",
    "seconds",
    "sweep_floats",
    "trace_floats",
]
