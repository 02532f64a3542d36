"""Every option of a run, in three flat groups with the ecosystem's names: the model, the tasks, the training."""

from meta_peft.config.checks import ALGORITHMS, INNER_OPTIMIZERS
from meta_peft.config.meta_lora_config import MetaLoraConfig
from meta_peft.config.model_arguments import ModelArguments
from meta_peft.config.task_arguments import TaskArguments

__all__ = ["ALGORITHMS", "INNER_OPTIMIZERS", "MetaLoraConfig", "ModelArguments", "TaskArguments"]
