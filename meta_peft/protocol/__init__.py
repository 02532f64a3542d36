"""The comparison that isolates meta-learning: every start by the same rules on the same held-out episodes, over seeds.

A run is a table of cells, one for each seed and start, each a file of its own. What is there is not run again, so a run
that was stopped goes on, and several processes may work on different seeds in one folder.
"""

from meta_peft.protocol.arguments import ProtocolArguments
from meta_peft.protocol.run import run

__all__ = ["ProtocolArguments", "run"]
