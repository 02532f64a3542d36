"""One job in several processes: each has the whole base model and some of the tasks, and all make the same update."""

from meta_peft.processes.launch import check_launch
from meta_peft.processes.restart import attempt, join
from meta_peft.processes.step_shares import Share, StepShares
from meta_peft.processes.step_sum import ProcessFailedError, StepSum, StepTotal

__all__ = [
    "ProcessFailedError",
    "Share",
    "StepShares",
    "StepSum",
    "StepTotal",
    "attempt",
    "check_launch",
    "join",
]
