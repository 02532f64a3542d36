"""Where episodes come from."""

from meta_peft.tasks.collate import EpisodeCollator
from meta_peft.tasks.encoding import Encoding
from meta_peft.tasks.episodes import EpisodeDataset
from meta_peft.tasks.labelling import Labelling
from meta_peft.tasks.prompt import PromptFormat
from meta_peft.tasks.task_set import TaskSet

__all__ = ["Encoding", "EpisodeCollator", "EpisodeDataset", "Labelling", "PromptFormat", "TaskSet"]
