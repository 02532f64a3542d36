"""Tables from wherever rows are kept: files, folders, the hub, streams."""

from meta_peft.tasks.sources.opening import opened, opened_splits, rows_of_task
from meta_peft.tasks.sources.text_files import read_rows

__all__ = ["opened", "opened_splits", "read_rows", "rows_of_task"]
