"""The notebooks run top to bottom, with a tiny model in place of the base and fewer outer steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from surface import ROOT
from test_docs import save_base

from meta_peft.base.locate import SMOLLM2

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    base = save_base(tmp_path / "base", 3)
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert len(cells) > 4
    namespace: dict[str, object] = {"__name__": notebook.stem}
    for number, cell in enumerate(cells):
        code = "".join(cell["source"]).replace(SMOLLM2, base.as_posix())
        code = re.sub(
            r"max_steps=\d+", "max_steps=2", re.sub(r"multitask_warmup_steps=\d+", "multitask_warmup_steps=1", code)
        )
        code = re.sub(r"^STEPS, TASKS = .*", "STEPS, TASKS = 2, 2", code, flags=re.MULTILINE)
        exec(compile(code, f"{notebook.name}, code cell {number}", "exec"), namespace)
    assert (tmp_path / "outputs").is_dir()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_no_output_is_kept(notebook: Path):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
