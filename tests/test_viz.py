"""`graphmoe.visualize`: what it imports, what it writes, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from graphmoe.errors import CheckpointError, ConfigError
from graphmoe.viz import visualize

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    (path / "step-00000020").mkdir(parents=True)
    (path / "config.yaml").write_text("num_experts: 4\n")
    (path / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 20, "loss": 2.5}) + "\n")
    load = np.full((2, 1, 4), 0.25, np.float32)
    meta = {"coupling": "none", "num_experts": "4", "num_ghosts": "0"}
    save_file({"step": np.array([10, 20]), "load": load}, path / "records.safetensors", metadata=meta)
    return path


def test_run_and_step_give_the_same_report_and_write_nothing(run: Path):
    before = sorted(run.rglob("*"))
    for path in (run, str(run), run / "step-00000020"):
        report = visualize(path)
        assert list(report) == ["training_curves", "expert_load", "expert_load_over_time"]
    assert report["expert_load"].axes[0].get_ylabel() == "layer"
    assert sorted(run.rglob("*")) == before


def test_out_gets_pictures_and_report(run: Path, tmp_path: Path):
    report = visualize(run, plots="expert_load", out=tmp_path / "out")
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*")}
    assert list(report) == ["expert_load"] and written == {"plots/expert_load.png", "report.html"}


def test_wrong_input(run: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="did you mean 'training_curves'"):
        visualize(run, plots=["training_curve"])
    with pytest.raises(CheckpointError, match="not a run"):
        visualize(tmp_path / "nothing", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_drawing_imports_matplotlib_and_never_pyplot_or_transformers(run: Path):
    code = (
        "import sys; from pathlib import Path\n"
        "from graphmoe.viz import visualize\n"
        "print('matplotlib' in sys.modules)\n"
        f"visualize(Path({str(run)!r}))['expert_load']\n"
        "print({'matplotlib.pyplot', 'transformers', 'graphmoe.models'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split("\n")[:2] == ["False", "set()"]
