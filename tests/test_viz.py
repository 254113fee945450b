"""`graphmoe.visualize`: what it imports, what it writes, what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from tiny_model import tiny_model
from tiny_transformers import OPTIONS, tiny

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


ROUTED = ["routing_load", "routing_tokens", "routing_graph", "routing_decisions"]


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_model_of_transformers_does_with_tokens(name, tmp_path):
    model, ids = tiny(name), torch.randint(3, 60, (2, 14))
    model.train()
    report = visualize(model, input_ids=ids, out=tmp_path)
    assert list(report) == ROUTED
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == set(ROUTED)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert model.training


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 60 for letter in text]}

    def decode(self, ids):
        return "".join(chr(number + 60) for number in ids)


def test_texts_of_different_lengths_are_padded_and_padding_does_not_count():
    model = tiny("mixtral")
    report = visualize(model, text=["hello", "be"], tokenizer=Letters())
    assert json.loads(report.record.meta["tokens"]) == list("hellobe")
    alone = visualize(model, text="be", tokenizer=Letters())
    first = report.record.records["routed_first"][report.record.records["routed_sequence"] == 1]
    assert (first == alone.record.records["routed_first"]).all()


def test_a_folder_of_a_model_and_one_of_ours(tmp_path):
    model = tiny("olmoe")
    model.save_pretrained(tmp_path / "olmoe")
    ids = torch.randint(3, 60, (1, 9))
    record = visualize(tmp_path / "olmoe", input_ids=ids).record
    loads = visualize(model, input_ids=ids).record.records["routed_load"]
    np.testing.assert_array_equal(record.records["routed_load"], loads)
    assert list(visualize(tiny_model(num_experts_per_tok=2), input_ids=ids % 31)) == ROUTED


def test_what_cannot_be_traced_is_one_typed_error(tmp_path):
    ids = torch.randint(3, 60, (1, 9))
    dense = tiny("llama")
    with pytest.raises(ConfigError, match=r"nothing to trace.*LlamaForCausalLM"):
        visualize(dense, input_ids=ids)
    with pytest.raises(ConfigError, match="text: a model shows what it does with an input"):
        visualize(tiny("mixtral"))
    with pytest.raises(ConfigError, match="tokenizer: a text needs a tokenizer"):
        visualize(tiny("mixtral"), text="hello")
    with pytest.raises(ConfigError, match="text and input_ids are two inputs"):
        visualize(tiny("mixtral"), text="hello", input_ids=ids)
    with pytest.raises(ConfigError, match="text: no token in a text"):
        visualize(tiny("mixtral"), text=[], tokenizer=Letters())
    tiny("mixtral").save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="tokenizer: no tokenizer that can be read here"):
        visualize(tmp_path / "model", text="hello")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="no model that can be read here"):
        visualize(tmp_path / "model", input_ids=ids)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        visualize(tmp_path / "nothing", input_ids=ids)
