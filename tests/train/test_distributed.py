"""Two processes with gloo between them do what one does: losses, gradients, weights, files, endings."""

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import ROOT, SMALL
from safetensors.torch import load_file, save_file
from tiny_model import tiny_model
from torch.nn.functional import cross_entropy

import graphmoe
from graphmoe import checkpoint
from graphmoe import loss as losses
from graphmoe.checkpoint.shards import whole
from graphmoe.data import TokenWindows
from graphmoe.errors import ConfigError, GraphMoEError
from graphmoe.train import callbacks as on
from graphmoe.train.config import RunConfig
from graphmoe.train.loop import Callback, Every, fit, reseed
from graphmoe.train.optim import scale_updates
from graphmoe.train.parallel import refuse_shards, whole_parameters
from graphmoe.train.ranks import from_main, make_accelerator, mean_of_shares, require_equal, together
from graphmoe.train.routing import RouterBalance

TESTS = str(Path(__file__).parents[1])
STEPS, CUT = 4, 2
MODELS = {
    "moe": {"num_experts_per_tok": 1},
    "collab": {
        "num_experts_per_tok": 2,
        "coupling": "collab",
        "coupling_layers": 2,
        "collab_heads": 2,
        "fusion": "gated",
        "reasoning_steps": 2,
    },
    "idle": {"num_experts_per_tok": 2},
    "bias": {"num_experts_per_tok": 1, "router_bias": True, "router_bias_rate": 0.1, "num_shared_experts": 1},
    "threshold": {"num_experts_per_tok": 2, "router": "threshold"},
}
CASES = [
    ("moe", "ddp", 1), ("moe", "ddp", 2), ("moe", "fsdp", 1), ("moe", "fsdp", 2),
    ("collab", "ddp", 2), ("collab", "fsdp", 2), ("collab", "fsdp", 1), ("idle", "ddp", 1),
    ("bias", "ddp", 1), ("bias", "fsdp", 2), ("threshold", "ddp", 2), ("threshold", "fsdp", 1),
]  # fmt: skip


def build(name):
    reseed(0, 0)
    model = tiny_model(**{"router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.01} | MODELS[name])
    # That of transformers computes in float32 whatever it is given.
    model.loss_function = lambda logits, labels, vocab_size, **_: cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    if name == "idle":  # DDP waits for gradients of every parameter unless it is told to look
        model.register_parameter("spare", torch.nn.Parameter(torch.ones(3)))
    return model


def config(parallel="ddp", micros=1, **options):
    settings = {
        "max_steps": STEPS,
        "batch_size": 4,
        "gradient_accumulation_steps": micros,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "max_grad_norm": 0.1,
        "device": "cpu",
        "num_threads": 1,
        "parallel": parallel,
    }
    return RunConfig(**settings | options)


def batches(index, size, slots):
    """The second half of a batch is one token only, which one expert serves: rank 1 has three idle ones."""
    ids = np.random.default_rng([3, index]).integers(0, 31, (size, 10))
    ids[size // 2 :] = 7
    ids = torch.from_numpy(ids[slots])
    return {"input_ids": ids, "labels": ids, "output_records": True}


class Watch(Callback):
    """Figures of every step, its gradients after clipping, and what each expert of this rank served."""

    def __init__(self, model):
        self.model, self.steps, self.served, self.tensors = model, {}, [], {}

    def setup(self, optimizer):
        optimizer.register_step_pre_hook(lambda *_: self.keep("grad"))

    def keep(self, kind):
        """Parameters are looked up anew: sharding replaces them."""
        for name, parameter in self.model.named_parameters():
            tensor = parameter.grad if kind == "grad" else parameter
            if tensor is not None:
                self.tensors[f"{kind}/{len(self.steps)}/{name}"] = whole(tensor.detach()).clone()

    def on_step(self, state, model, outputs):
        keys = ("loss", "lm_loss", "aux", "grad_norm")
        self.steps[state.step] = {key: state.metrics[key] for key in keys}
        self.served.append([record.routing.ptr.diff().tolist() for record in outputs.records])

    def on_end(self, state, model):
        self.keep("weight")


def train(run_dir, name, parallel="ddp", micros=1, *, resume_from=None, extra=(), **options):
    model = build(name)
    watch = Watch(model)
    fit(
        model, batches, config(parallel, micros, **options), run_dir,
        callbacks=[watch, RouterBalance(model), *extra], setup=watch.setup, resume_from=resume_from,
    )  # fmt: skip
    return model, watch


# --- what each of two processes does


def compare_runs(out, rank):
    """Every case, and the same without exchanging counts."""
    from accelerate import Accelerator

    found = {}
    alone, unsynced = [], Accelerator.no_sync
    Accelerator.no_sync = lambda *arguments: alone.append(1) or unsynced(*arguments)
    for case in CASES:
        alone.clear()
        _, watch = train(out, *case)
        key = "-".join(map(str, case))
        found[key] = {"steps": watch.steps, "served": watch.served, "alone": len(alone)}
        save_file(watch.tensors, out / f"{key}-{rank}.safetensors")
    exchange, losses.over_ranks = losses.over_ranks, lambda counts: counts
    found["local counts"] = train(out, "moe")[1].steps
    losses.over_ranks = exchange
    return found


def order_of_data(out, rank):
    """The rows that this rank was given, by batch."""
    windows = TokenWindows(np.arange(31).repeat(9), 8, seed=5)
    rows = {}

    def logged(index, size, slots):
        rows[str(index)] = torch.from_numpy(windows.batch(index, size, slots))
        return batches(index, size, slots)

    fit(build("moe"), logged, config(micros=2), out)
    save_file(rows, out / f"rows-{rank}.safetensors")


def saved_runs(out, rank):
    """Runs that save, with both ways to hold a model."""
    for parallel in ("ddp", "fsdp"):
        run_dir = out / f"two-{parallel}"
        if rank == 0:
            run_dir.mkdir()
        train(run_dir, "collab", parallel, extra=[Every(CUT, on.Save(keep=9))])


def resumed_runs(out, rank):
    """From the checkpoint of a single process, and from that of two that held the model another way."""
    pairs = (("one", "ddp"), ("one", "fsdp"), ("two-fsdp", "ddp"), ("two-ddp", "fsdp"))
    for source, parallel in pairs:
        start = out / source / f"step-{CUT:08d}"
        _, watch = train(out, "collab", parallel, resume_from=start)
        weights = {key: value for key, value in watch.tensors.items() if key.startswith("weight/")}
        save_file(weights, out / f"resumed-{source}-{parallel}-{rank}.safetensors")


def agreement(out, rank):
    """What the ranks tell one another, and how each hears of an error of another."""
    accelerator = make_accelerator(config())
    rows = np.arange(35.0).reshape(7, 5)
    found = {
        "mean": mean_of_shares(accelerator, lambda part: float(part.mean()), rows),
        "sizes": [],
        "few": mean_of_shares(accelerator, lambda part: float(part.mean()), rows[:1]),
        "from_main": from_main(accelerator, f"said by  {rank}\n"),
    }
    mean_of_shares(accelerator, lambda part: found["sizes"].append(len(part)) or 0.0, rows)
    for name, function in {
        "main": lambda: ConfigError("refused", "--flag") if rank == 0 else None,
        "other": lambda: RuntimeError("broken") if rank == 1 else None,
        "all": lambda: ConfigError(f"refused by {rank}"),
        "none": lambda: None,
    }.items():
        try:
            with together(accelerator):
                if (error := function()) is not None:
                    raise error
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    try:
        require_equal(accelerator, "corpus", "same")
        require_equal(accelerator, "corpus", f"that of {rank}")
    except GraphMoEError as error:
        found["unequal"] = str(error)
    return found


def failing_save(out, rank):
    """The main rank cannot write; the other one must not wait for it."""
    blocked = out / "blocked"
    if rank == 0:
        blocked.write_text("a file where a folder should be")
    try:
        train(blocked, "moe", "fsdp", extra=[on.Save()])
    except GraphMoEError as error:
        return f"{type(error).__name__}: {error}"


def whole_weights(out, rank):
    """Sharded parameters, read whole and put back."""
    model, _ = train(out, "moe", "fsdp", max_steps=1)
    sharded = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    with whole_parameters(model):
        full = {name: tuple(p.shape) for name, p in model.named_parameters() if not hasattr(p, "to_local")}
    again = {name: tuple(p.to_local().shape) for name, p in model.named_parameters()}
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    experts = model.moe_layers()[0].experts.down_proj
    with pytest.raises(ConfigError, match="slices of sharded parameters cannot be scaled"):
        scale_updates(torch.optim.SGD([experts], lr=1.0), {experts: lambda: torch.ones(4)})
    return {"sharded": sharded, "full": full, "again": again == sharded, "tied": tied}


def commands(out):
    """Recipes from the outside: exit codes and what this rank printed as errors."""
    from recipes import ghost_lm, moe_lm

    found = {}
    for name, recipe, flags in (
        ("flag", moe_lm, ["--num_expert=4"]),
        ("ghosts", ghost_lm, ["--parallel=fsdp"]),
        ("batch", moe_lm, ["--batch_size=3"]),
        ("locked", moe_lm, ["--run_name=locked"]),
        ("exists", moe_lm, ["--run_name=one"]),
        ("corpus", moe_lm, ["--dataset=/no/such/corpus"]),
        ("sharded", moe_lm, ["--parallel=fsdp", "--run_name=sharded"]),
    ):
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(io.StringIO()):
            code = recipe.main(recipe_flags(out, *flags))
        found[name] = {"code": code, "printed": printed.getvalue()}
    return found


@contextlib.contextmanager
def changes_below(folder):
    """The paths below a folder that this process opens or changes in the meantime."""
    paths, on_watch = [], [True]

    def watch(event, arguments):
        if not on_watch or event not in ("open", "os.mkdir", "os.rename", "os.remove", "os.chmod"):
            return
        if isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if path.startswith(os.fspath(folder)):
                paths.append(f"{event} {os.path.relpath(path, folder)}")

    sys.addaudithook(watch)  # for the life of the process: there is no way to remove one
    yield paths
    on_watch.clear()


def one_rank(out):
    """What each of two processes does, and what it leaves in ``out``."""
    from recipes import frame

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    frame.leave = lambda: None  # one group for all that follows
    torch.set_default_dtype(torch.float64)
    found = compare_runs(out, rank)
    order_of_data(out, rank)
    with changes_below(out) as found["saving"]:
        saved_runs(out, rank)
    resumed_runs(out, rank)
    found["agreement"] = agreement(out, rank)
    found["blocked"] = failing_save(out, rank)
    found["whole"] = whole_weights(out, rank)
    torch.set_default_dtype(torch.float32)
    with changes_below(out) as found["recipe"]:
        found["commands"] = commands(out)
    (out / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


# --- what one process finds of it


def write_corpus(folder):
    folder.mkdir()
    for name in ("abc", "ast", "bisect"):
        source = Path(os.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
        (folder / f"{name}.txt").write_text(source[:4000], encoding="utf-8")


def recipe_flags(out, *flags):
    return [*SMALL, f"--out_dir={out}", f"--dataset={out / 'corpus'}", "--max_steps=2", *flags]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The folder of the comparison, with the run of a single process that the two go on from."""
    out = tmp_path_factory.mktemp("ranks")
    write_corpus(out / "corpus")
    torch.set_default_dtype(torch.float64)
    try:
        (out / "one").mkdir()
        _, whole_run = train(out / "one", "collab", extra=[Every(CUT, on.Save(keep=9))])
        runs = {"saved": whole_run}
        for name, _, micros in CASES:
            if (name, micros) not in runs:
                runs[name, micros] = train(out, name, micros=micros)[1]
    finally:
        torch.set_default_dtype(torch.float32)
    return out, runs


@pytest.fixture(scope="module")
def two(one):
    """What two processes found."""
    out, _ = one
    (out / "locked").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    with checkpoint.RunLock(out / "locked"):
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, str(out)], cwd=ROOT,
                env=os.environ | common | {"RANK": rank, "LOCAL_RANK": rank, "PYTHONPATH": f"{ROOT}:{TESTS}"},
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for rank in ("0", "1")
        ]  # fmt: skip
        try:
            printed = [process.communicate(timeout=240)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(printed)
    return [json.loads((out / f"{rank}.json").read_text()) for rank in (0, 1)]


def assert_same_steps(found, expected):
    for number, figures in expected.items():
        other = found[str(number)]
        assert figures["aux"].keys() == other["aux"].keys()
        for key, value in {**figures["aux"], **{k: v for k, v in figures.items() if k != "aux"}}.items():
            assert other["aux"].get(key, other.get(key)) == pytest.approx(value, rel=0, abs=1e-10), key


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_two_processes_compute_what_one_computes(one, two, case):
    out, runs = one
    name, _, micros = case
    expected, key = runs[name, micros], "-".join(map(str, case))
    for rank in (0, 1):
        assert_same_steps(two[rank][key]["steps"], expected.steps)
        assert two[rank][key]["alone"] == STEPS * (micros - 1)  # gradients meet once a step
        assert_same_tensors(load_file(out / f"{key}-{rank}.safetensors"), expected.tensors)
    assert max(step["grad_norm"] for step in expected.steps.values()) > 0.1  # it is clipped


def test_the_ranks_route_otherwise_and_one_has_experts_without_tokens(two):
    served = [two[rank]["moe-ddp-1"]["served"] for rank in (0, 1)]  # [steps, layers, experts]
    assert served[0] != served[1]
    assert all(layer.count(0) == 3 for step in served[1] for layer in step)
    assert any(layer.count(0) == 0 for step in served[0] for layer in step)


def test_balance_of_each_rank_alone_is_another_loss(one, two):
    exact, local = one[1]["moe", 1].steps[1]["aux"]["balance"], two[0]["local counts"]["1"]["aux"]["balance"]
    assert abs(local / exact - 1) > 0.01


def test_the_order_of_data_does_not_depend_on_the_number_of_processes(one, two):
    out, _ = one
    windows = TokenWindows(np.arange(31).repeat(9), 8, seed=5)
    halves = [load_file(out / f"rows-{rank}.safetensors") for rank in (0, 1)]
    assert set(halves[0]) == {str(index) for index in range(2 * STEPS)}
    for index, rows in halves[0].items():
        both = torch.cat([rows, halves[1][index]]).numpy()
        assert np.array_equal(both, windows.batch(int(index), 4, slice(0, 4)))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_is_one_of_one(one, two, parallel, tmp_path, double):
    out, runs = one
    for step in (CUT, STEPS):
        mine, theirs = (out / name / f"step-{step:08d}" for name in ("one", f"two-{parallel}"))
        checkpoint.verify(theirs)
        assert {path.name for path in mine.iterdir()} == {path.name for path in theirs.iterdir()}
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert_same_tensors(load_file(theirs / file), load_file(mine / file))
        for file in ("config.json", "state.json"):
            assert (mine / file).read_bytes() == (theirs / file).read_bytes()
    model = graphmoe.load(out / f"two-{parallel}")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    start = out / f"two-{parallel}" / f"step-{CUT:08d}"
    _, resumed = train(tmp_path, "collab", resume_from=start)
    weights = {key: value for key, value in runs["saved"].tensors.items() if key.startswith("weight/")}
    rest = {step: figures for step, figures in runs["saved"].steps.items() if step > CUT}
    assert_same_steps({str(step): figures for step, figures in resumed.steps.items()}, rest)
    found = {key.replace(f"/{STEPS - CUT}/", f"/{STEPS}/"): v for key, v in resumed.tensors.items()}
    assert_same_tensors({key: found[key] for key in weights}, weights)


@pytest.mark.parametrize(
    "source, parallel", [("one", "ddp"), ("one", "fsdp"), ("two-fsdp", "ddp"), ("two-ddp", "fsdp")]
)
def test_two_go_on_from_any_checkpoint(one, two, source, parallel):
    out, runs = one
    expected = {key: v for key, v in runs["saved"].tensors.items() if key.startswith("weight/")}
    for rank in (0, 1):
        found = load_file(out / f"resumed-{source}-{parallel}-{rank}.safetensors")
        assert_same_tensors(
            {key.replace(f"/{STEPS - CUT}/", f"/{STEPS}/"): v for key, v in found.items()}, expected
        )


def test_one_process_writes(two):
    assert two[1]["saving"] == []
    assert any("step-" in path for path in two[0]["saving"])
    written = [
        path for path in two[1]["recipe"] if not path.split()[1].startswith(("corpus", "one", "locked"))
    ]
    assert written == []
    assert any("sharded/result.json" in path or "sharded/.tmp-result" in path for path in two[0]["recipe"])


def test_slices_are_whole_inside_and_slices_outside(two):
    for rank in two:
        sharded, full = rank["whole"]["sharded"], rank["whole"]["full"]
        assert sharded.keys() == full.keys() and rank["whole"]["again"] and rank["whole"]["tied"]
    for name, shape in full.items():
        assert sum(rank["whole"]["sharded"][name][0] for rank in two) == shape[0], name


def test_what_ranks_agree_on(two):
    for rank in two:
        found = rank["agreement"]
        assert found["mean"] == pytest.approx(17.0, abs=1e-12) and found["few"] == 2.0
        assert found["sizes"] == [3, 1]  # as many calls with as many rows on both
        assert found["from_main"] == "said by 0" and "none" not in found
    assert [rank["agreement"]["main"] for rank in two] == [
        "ConfigError: --flag: refused", "OtherRankError: --flag: refused (process 0)"
    ]  # fmt: skip
    assert [rank["agreement"]["other"] for rank in two] == [
        "OtherRankError: broken (process 1)", "RuntimeError: broken"
    ]  # fmt: skip
    assert [rank["agreement"]["all"] for rank in two] == [f"ConfigError: refused by {n}" for n in (0, 1)]
    expected = "process 1: processes differ in the corpus; expected that of 0; got 'that of 1'"
    assert [rank["agreement"]["unequal"] for rank in two] == [expected] * 2


def test_a_save_that_fails_ends_all(two):
    assert two[0]["blocked"].startswith("CheckpointWriteError: ") and "blocked" in two[0]["blocked"]
    assert two[1]["blocked"].startswith("OtherRankError: ") and "(process 0)" in two[1]["blocked"]


@pytest.mark.parametrize(
    "name, message",
    [
        ("flag", "did you mean --num_experts"),
        ("ghosts", "--parallel: the learning rates of ghosts"),
        ("batch", "--batch_size: batch does not divide among 2 processes"),
        ("locked", "run is in use by process"),
        ("exists", "run exists"),
        ("corpus", "/no/such/corpus"),
    ],
)
def test_bad_input_ends_all_processes_with_one_line(two, name, message):
    printed = "".join(rank["commands"][name]["printed"] for rank in two)
    assert [rank["commands"][name]["code"] for rank in two] == [2, 2]
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1


def test_a_sharded_recipe_leaves_a_whole_run(one, two):
    out, _ = one
    assert [rank["commands"]["sharded"]["code"] for rank in two] == [0, 0]
    assert_whole_run(out / "sharded", steps=2)
    assert_whole_run(out / "sharded", steps=2)


def assert_whole_run(run_dir, steps):
    result = json.loads((run_dir / "result.json").read_text())
    assert result["steps"] == steps and result["processes"] == 2
    names = {path.name for path in run_dir.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "records.safetensors", "report.html", "plots"} <= names
    assert not [name for name in names if name.startswith((".tmp", ".old"))]
    rows = checkpoint.read(run_dir).metrics
    assert len({(row["kind"], row["step"]) for row in rows}) == len(rows)
    last = [row for row in rows if row["kind"] == "eval"][-1]
    assert last["step"] == steps
    checkpoint.verify(checkpoint.latest(run_dir))
    assert graphmoe.load(run_dir)(torch.tensor([[1, 2]])).logits.isfinite().all()


def torchrun(*arguments):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    return [*launcher, "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", *arguments]


def test_torchrun_runs_a_recipe(one, tmp_path):
    """The whole command, as the documentation gives it."""
    flags = recipe_flags(one[0], f"--out_dir={tmp_path}")
    done = subprocess.run(
        torchrun("-m", "recipes.moe_lm", *flags), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bits_per_byte") == 1 and "Warning" not in done.stderr
    assert_whole_run(tmp_path / "moe_lm", steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_torchrun_is_stopped_and_goes_on(one, tmp_path, signum):
    """A signal to torchrun ends both ranks after the same step, which is saved once."""
    run_dir = tmp_path / "moe_lm"
    flags = recipe_flags(one[0], f"--out_dir={tmp_path}", "--max_steps=100000", "--parallel=fsdp")
    process = subprocess.Popen(
        torchrun("-m", "recipes.moe_lm", *flags), cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signum)
    printed = process.communicate(timeout=60)[0]
    saved = [path.name for path in run_dir.glob("step-*")]
    assert len(saved) == 1, printed
    step = int(saved[0].removeprefix("step-"))
    assert max(row["step"] for row in checkpoint.read(run_dir).metrics) == step
    resume = ["--resume", f"--max_steps={step + 2}", f"--out_dir={tmp_path}"]
    done = subprocess.run(
        torchrun("-m", "recipes.moe_lm", *resume), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming from step {step}" in done.stdout
    assert_whole_run(run_dir, steps=step + 2)


@pytest.mark.parametrize("options", [{"ghosts": True}, {"weight_orthogonality": True}], ids=str)
def test_what_slices_cannot_do(options):
    options = {"ghosts": False, "weight_orthogonality": False} | options
    refuse_shards("ddp", **options)
    with pytest.raises(
        ConfigError,
        match=r"^--parallel: .*; expected ddp with --(num_ghosts|orthogonality_weight_coef); got 'fsdp'",
    ):
        refuse_shards("fsdp", **options)


if __name__ == "__main__":
    one_rank(Path(sys.argv[1]))
