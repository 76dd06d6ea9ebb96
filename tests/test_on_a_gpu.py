"""The commands on a pretended GPU (pretend_gpu.py): nothing is left on the CPU, a recorded graph says what the ordinary loop says."""
import contextlib
import dataclasses
import io
import shutil
import sys
import time

import pytest
import torch

import kernels
import sample
from af_min import checkpoint, engine, evaluate, retrieval
from af_min.flamingo import AudioFlamingo
from conftest import shake
from kernels import benchmark
from micro import STAGES
from pretend_gpu import pretend_gpu
from training import ROOT, log, spawn, train, weights


@contextlib.contextmanager
def on_a_gpu():
    """Without the kernels, which this process cannot interpret; test_kernels.py does that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "TRITON_INSTALLED", False)
        patch.delenv("AF_MIN_KERNELS", raising=False)
        with pretend_gpu(patch) as gpu:
            yield gpu


@pytest.fixture
def gpu():
    with on_a_gpu() as gpu:
        yield gpu


def test_what_a_gpu_refuses_is_refused(gpu):
    x, y = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    assert x.is_cuda and x.data.device == x.clone().device == x.new_zeros(2).device == x.to(torch.int).device == torch.device("cuda", 0)
    assert not y.is_cuda and x.cpu().device == x.to(y).device == torch.zeros_like(x, device="cpu").device == torch.device("cpu")
    for mistake in (lambda: x + y, lambda: torch.cat([x, y]), lambda: torch.nn.functional.layer_norm(x, (3,), y), lambda: x[0] + y):
        with pytest.raises(RuntimeError, match="two devices"):
            mistake()
    with pytest.raises(TypeError, match="to numpy"):
        x.numpy()
    layer = torch.nn.Linear(3, 3).to("cuda")
    layer(x).sum().backward()
    assert layer.weight.is_cuda and layer.weight.grad.is_cuda and (x + torch.tensor(1.0) + y[2].item()).is_cuda and x.sum().item() == 3


def test_a_graph_repeats_what_was_recorded(gpu):
    """Recording computes nothing; replays see numbers in memory, not those that Python has since."""
    x, total, factor = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda"), 2
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += x * factor
        out = total.view(2, 1) + 1
    assert total.tolist() == [0, 0] and out.isnan().all()
    x[1], factor = 5, 1000
    graph.replay(), graph.replay()
    assert total.tolist() == [4, 20] and out.tolist() == [[5], [21]]
    for mistake in (lambda: x.sum().item(), lambda: bool(x[0] > 0), lambda: x.cpu(), lambda: x[torch.tensor([0])],
                    lambda: torch.tensor([1.0], device="cuda")):
        with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), torch.cuda.graph(graph):
            mistake()


# ---------------------------------------------------------------------- the commands

@pytest.fixture(scope="module")
def folder(tmp_path_factory, scenes_data):
    """runs/cpu and runs/gpu, trained with the same flags; on the GPU activations were recomputed and the last stage was cut off and resumed."""
    folder = tmp_path_factory.mktemp("there")
    flags = ["--preset", "micro-still", "--float32", "--name"]

    def cut(patch, rate=engine.rate):
        def breaks(step, settings):
            if (step, settings) == (3, STAGES["sft"]):
                raise RuntimeError("cut off")
            return rate(step, settings)
        patch.setattr(engine, "rate", breaks)
    train(folder, scenes_data, *flags, "cpu")
    with on_a_gpu() as gpu:
        with pytest.raises(RuntimeError, match="cut off"):
            train(folder, scenes_data, *flags, "gpu", "--checkpoint-activations", before=cut)
        train(folder, scenes_data, *flags, "gpu", "--checkpoint-activations", "--resume")
    assert gpu.operations > 10_000
    return folder


def test_training_there_is_training_here(folder):
    cpu, gpu = (log(folder / "runs" / name) for name in ("cpu", "gpu"))
    for here, there in zip(cpu, gpu, strict=True):
        assert there["loss"] == pytest.approx(here["loss"], rel=1e-5) and there["memory_gb"] == 1.0
    here, there = (weights(folder / "runs" / name / "model.safetensors") for name in ("cpu", "gpu"))
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, rtol=0, atol=1e-3, msg=name)


@pytest.fixture(scope="module")
def place(tmp_path_factory, scenes_data, micro_config, tokenizer):
    """runs/shaken: random weights that say many words, with the convolution of `tiny`."""
    place, lm = tmp_path_factory.mktemp("answers"), dataclasses.replace(micro_config.lm, tied_head=False, conv=3)
    config = dataclasses.replace(micro_config, lm=lm)
    checkpoint.save_run(place / "runs/shaken", shake(AudioFlamingo(config), seed=2, scale=0.25), config, tokenizer,
                        {"args": {"data": [str(scenes_data)]}})
    return place


@pytest.fixture
def both(place, run_command, monkeypatch):
    """Runs a command on the CPU, then on the GPU -> what it prints and the lines that it leaves in `writes`, twice; the GPU."""
    monkeypatch.chdir(place)

    def run(main, *flags, stdin="", writes="no/such"):
        said = []
        for where in (contextlib.nullcontext(), on_a_gpu()):
            monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
            with where as gpu:
                code, out, err = run_command(main, "--run", "runs/shaken", *flags)
            assert code == 0, err
            said.append((out, {path.name: path.read_text() for path in place.glob(writes)}))
            for name in said[-1][1]:
                (place / writes).with_name(name).unlink()
        return *said, gpu
    return run


@pytest.mark.parametrize("files, flags, replays", [
    ([0, 1, 2], [], 8), ([0], ["--shots", 2], 8), ([1], ["--chat"], 16), ([1], ["--temperature", 2], 8), ([1], ["--plot", "x.png"], 8),
    ([0, 2], ["--prompt", "is there a dog?", "--options", "yes,no"], 0)], ids=str)
def test_sample_says_there_what_it_says_here(both, scenes_data, files, flags, replays):
    """Several recordings at once, examples, two turns with one recorded step, chance, a picture, options."""
    audio = [scenes_data / "audio" / f"test-{n:05d}.wav" for n in files]
    (here, _), (there, _), gpu = both(sample.main, "--audio", *audio, "--max-new", 10, *flags, stdin="what is the first sound?\nis it high or low?\n")
    assert there == here and here.strip() and gpu.operations > 500 and gpu.replays >= replays


@pytest.mark.slow
def test_scores_there_are_scores_here(both, scenes_data):
    flags = ["--dataset", scenes_data, "--items", 1, "--shots", 1, "--options", "Presence", "--no-swapped", "--max-new", 9]
    (_, here), (_, there), gpu = both(evaluate.main, *flags, writes="runs/shaken/predictions-*.jsonl")
    assert len(here) == 1 and there == here and gpu.replays > 20


def test_neighbours_there_are_neighbours_here(place, scenes_data, tmp_path, run_command):
    rows = []
    for device in ("cpu", "cuda"):
        data = shutil.copytree(scenes_data, tmp_path / device)
        with on_a_gpu() as gpu:
            code, _, err = run_command(retrieval.main, "--run", place / "runs/shaken", "--data", data, "--shots", 2, "--rows", 20, "--device", device)
        assert code == 0 and (gpu.operations > 100) == (device == "cuda"), err
        rows.append((data / "train.jsonl").read_text())
    assert rows[0] == rows[1] and '"retrieved"' in rows[0]


def test_the_benchmarks_clock(gpu, tmp_path):
    """That of events, which `--dry` does not use: what is timed runs once more than there are repetitions, and memory is counted."""
    bench, runs = benchmark.Bench(tmp_path, "pretended"), []
    bench.__dict__["gigabyte"] = torch.empty(8, dtype=torch.uint8, device="cuda")
    assert bench.time(lambda: runs.append(time.sleep(0.01))) == (1000.0, 1000.0, 1000.0, 0.0) and 6 <= len(runs) <= 11


@pytest.mark.slow
def test_kernels_are_the_default_there(scenes_data, micro_config, tokenizer, tmp_path):
    """Programs of their own, with the kernels in Triton's interpreter: training in bfloat16 and answers, as on the CPU."""
    xattn = dataclasses.replace(micro_config.xattn, head_dim=32)                  # for which there is a kernel
    config = dataclasses.replace(micro_config, xattn=xattn)
    checkpoint.save_run(tmp_path / "runs/start", shake(AudioFlamingo(config)), config, tokenizer, {})
    audio = [scenes_data / "audio" / f"test-{n:05d}.wav" for n in (0, 1)]
    said, losses = {}, {}
    for name, program in {"cpu": [], "gpu": [ROOT / "tests/pretend_gpu.py"]}.items():
        code, said[name] = spawn(tmp_path, *program, ROOT / "sample.py", "--run", "runs/start", "--audio", *audio)
        assert code == 0, said[name]
        code, printed = spawn(tmp_path, *program, ROOT / "tests/micro.py", "--data", scenes_data, "--stage", "sft", "--init", "runs/start",
                              "--name", name, "--steps", 3)
        assert code == 0, printed
        losses[name] = [line["loss"] for line in log(tmp_path / "runs" / name)]
        said[name] = [line for line in said[name].splitlines() if line.startswith(str(audio[0].parent))]
    assert len(said["cpu"]) == 2 and said["gpu"] == said["cpu"]
    assert losses["gpu"] == pytest.approx(losses["cpu"], rel=0.02)
