"""Masked cross-attention and gated residual: the PyTorch reference, the choice of backend, and two runs of the Triton kernels
that need no GPU, under the interpreter (tests/test_kernels_interpreted.py) and ahead of time through the compiler."""
import csv
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import kernels
from af_min.cli import UserError
from kernels import reference

ROOT = Path(__file__).parent.parent
needs_triton = pytest.mark.skipif(not kernels.TRITON_INSTALLED, reason="triton has no package for this platform")


def python(*arguments, **environment):
    """A Python process of its own, on one thread; fails with the end of what it printed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"got exit code {done.returncode}, expected 0\n{(done.stdout + done.stderr)[-4000:]}"
    return done.stdout


def make(T=6, L=5, dtype=torch.float64):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, n, 2, 8, dtype=dtype).transpose(1, 2) for n in (T, L, L))
    kv_len = torch.tensor([[0] * T, [0] + [min(2, L)] * (T - 1), [L] * T], dtype=torch.int32)
    return [x.requires_grad_() for x in (q, k, v)] + [kv_len]


def test_reference_is_softmax_over_a_prefix():
    """Both forms of the reference equal a loop over tokens; kv_len 0 gives exactly 0."""
    q, k, v, kv_len = make()
    for function in (reference.attend, reference.attend_cpu, kernels.masked_cross_attention):
        out = function(q, k, v, kv_len)
        for b in range(3):
            for t in range(6):
                n = kv_len[b, t]
                weights = torch.softmax(torch.einsum("hk,hlk->hl", q[b, :, t], k[b, :, :n]) / 8 ** 0.5, -1)
                torch.testing.assert_close(out[b, :, t], torch.einsum("hl,hlk->hk", weights, v[b, :, :n]))
        assert (out[0] == 0).all()


@pytest.mark.parametrize("function", [reference.attend, reference.attend_cpu])
def test_reference_gradients(function):
    """Analytical equals numerical; samples and tokens without audio have zero gradients."""
    q, k, v, kv_len = make(4, 3)
    assert torch.autograd.gradcheck(lambda *x: function(*x, kv_len), (q, k, v))
    dq, dk, dv = torch.autograd.grad(function(q, k, v, kv_len).sum(), (q, k, v))
    assert (dq[0] == 0).all() and (dk[0] == 0).all() and (dv[0] == 0).all() and (dq[1, :, 0] == 0).all()


@pytest.mark.parametrize("function", [reference.attend, reference.attend_cpu])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("T", [1, 6])
def test_unused_keys_may_hold_anything(function, T, poison):
    """With gradients and without, where other code looks for them."""
    q, k, v, kv_len = make(T)
    kv_len[1, -1] = 2
    clean = function(q, k, v, kv_len)
    bad_k, bad_v = k.detach().clone(), v.detach().clone()
    for x in (bad_k, bad_v):
        x[0], x[1, :, 2:] = poison, poison
        x.requires_grad_()
    out = function(q, bad_k, bad_v, kv_len)
    torch.testing.assert_close(out, clean)
    wanted = torch.autograd.grad(clean.sum(), (q, k, v))
    for got, want in zip(torch.autograd.grad(out.sum(), (q, bad_k, bad_v)), wanted):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        torch.testing.assert_close(function(q, bad_k, bad_v, kv_len), clean)
        torch.testing.assert_close(function(q.abs(), bad_k, v, kv_len), function(q.abs(), k, v, kv_len))      # all of one sign


def test_no_audio_in_the_batch():
    """L = 0, and L > 0 of which nothing is visible: zeros, and zero (not missing) gradients."""
    for L in (0, 4):
        q, k, v, _ = make(3, L)
        out = kernels.masked_cross_attention(q, k, v, torch.zeros(3, 3, dtype=torch.int32))
        assert (out == 0).all() and all((g == 0).all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
    q, k, v, kv_len = make()
    assert kernels.masked_cross_attention(q[:, :, :0], k, v, kv_len[:, :0]).shape == (3, 2, 0, 8), "no text at all"


def test_more_visible_keys_than_there_are_is_an_error():
    q, k, v, kv_len = make()
    for wrong in (kv_len + 4, torch.full_like(kv_len, 6)):
        with pytest.raises(AssertionError, match="expected at most L = 5"):
            kernels.masked_cross_attention(q, k, v, wrong)


def test_shared_mask_follows_its_kv_len():
    """Layers share the mask of one kv_len tensor; writing to the tensor, another tensor or precision makes a new one."""
    q, k, v, kv_len = make()
    kernels.masked_cross_attention(q, k, v, kv_len)
    assert reference.additive_mask(kv_len, q.dtype)[2] is reference.additive_mask(kv_len, q.dtype)[2]
    kv_len[1, 3:] = 4
    torch.testing.assert_close(kernels.masked_cross_attention(q, k, v, kv_len), reference.attend(q, k, v, kv_len))
    other = kv_len.clamp(max=3)
    torch.testing.assert_close(kernels.masked_cross_attention(q, k, v, other), reference.attend(q, k, v, other))
    assert reference.additive_mask(other, torch.bfloat16)[2].dtype == torch.bfloat16
    with torch.inference_mode():
        moved = kv_len + 0
        kernels.masked_cross_attention(q, k, v, moved)
        moved[1] = 1
        torch.testing.assert_close(kernels.masked_cross_attention(q, k, v, moved), reference.attend(q, k, v, moved))


def test_every_thread_keeps_the_mask_of_its_own_part():
    """Parts of a batch are computed side by side: none is given, or loses its mask to, another's."""
    kv_len, others = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[1, 3]], dtype=torch.int32)
    mask = reference.additive_mask(kv_len, torch.float32)[2]
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(reference.additive_mask, others, torch.float32).result()[1] == 3
    assert reference.additive_mask(kv_len, torch.float32)[2] is mask


def test_gated_residual_reference():
    """x + tanh(gate) · a Wᵀ in float64, with numerical gradients."""
    torch.manual_seed(0)
    x, a, w, gate = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), (2, 3, 5), (4, 5), (1,)))
    torch.testing.assert_close(kernels.gated_residual(x, a, w, gate), x + torch.tanh(gate) * torch.einsum("bte,de->btd", a, w))
    assert torch.autograd.gradcheck(kernels.gated_residual, (x, a, w, gate))


def test_forced_backend_that_cannot_run_is_an_error(monkeypatch):
    """The argument and the environment choose; what cannot run says why; a CPU runs the reference unless asked."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv("AF_MIN_KERNELS", raising=False)
    q, k, v, kv_len = make(dtype=torch.float32)
    wide = [torch.zeros(3, 2, n, 64) for n in (6, 5, 5)] + [kv_len]
    kernels.masked_cross_attention(q, k, v, kv_len)
    with pytest.raises(UserError, match="unknown backend"):
        kernels.masked_cross_attention(q, k, v, kv_len, backend="cuda")
    if kernels.TRITON_INSTALLED:
        with pytest.raises(UserError, match="tensors are on the CPU"):
            kernels.masked_cross_attention(*wide, backend="triton")
        with pytest.raises(UserError, match="not float64"):
            kernels.masked_cross_attention(*(x.double() for x in wide[:3]), kv_len, backend="triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        with pytest.raises(UserError, match="head width 8"):
            kernels.masked_cross_attention(q, k, v, kv_len, backend="triton")
    monkeypatch.setattr(kernels, "TRITON_INSTALLED", False)
    monkeypatch.setenv("AF_MIN_KERNELS", "triton")
    with pytest.raises(UserError, match="AF_MIN_KERNELS=triton cannot run: the package triton is not installed"):
        kernels.masked_cross_attention(*wide)
    kernels.masked_cross_attention(*wide, backend="reference")


def test_works_without_triton():
    python("-c", "import sys; sys.modules['triton'] = None\n"
           "import torch, kernels\n"
           "x = torch.ones(1, 1, 2, 8)\n"
           "assert not kernels.TRITON_INSTALLED\n"
           "assert (kernels.masked_cross_attention(x, x, x, torch.tensor([[0, 1]], dtype=torch.int32))[0, 0, 1] == 1).all()")


def test_measuring_on_a_gpu_needs_no_sound_library():
    """Benchmarks and the kernels' tests read no recording: they run where soundfile and soxr are not installed."""
    python("-c", "import sys; sys.modules.update(dict.fromkeys(('soundfile', 'soxr', 'py7zr'))); sys.path.append('tests')\n"
           "import kernels.benchmark, kernels.benchmark_model, bench_step, conftest, test_kernels_interpreted")


@needs_triton
def test_kernels_under_the_interpreter():
    """Forward and every gradient on odd sizes in three precisions: see tests/test_kernels_interpreted.py."""
    out = python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", "tests/test_kernels_interpreted.py",
                 TRITON_INTERPRET="1")
    assert " passed" in out and "skipped" not in out


@needs_triton
@pytest.mark.slow
def test_kernels_under_the_interpreter_large():
    python("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "slow", "tests/test_kernels_interpreted.py",
           TRITON_INTERPRET="1")


@needs_triton
def test_kernels_compile_without_spills():
    """sm_80 and sm_90, head width 64, bf16: no spilled register, shared memory in bounds, wgmma on sm_90."""
    out = python("-m", "kernels.check_compile", "--quick", TRITON_INTERPRET="0")
    assert "no faults" in out and "wgmma" in out


@needs_triton
@pytest.mark.slow
def test_every_configuration_compiles_without_spills():
    assert "no faults" in python("-m", "kernels.check_compile", TRITON_INTERPRET="0")


@needs_triton
def test_a_new_length_of_text_compiles_no_new_kernel():
    """Of whatever number of tokens, keys, heads and rows, launches ask the JIT for one variant; dk and dv for two or, of one token, three."""
    out = python("-c", "import torch\n"
                 "from kernels import check_compile, masked_xattn, residual\n"
                 "def attention(H, T, L):\n"
                 "    q, k, v = (torch.empty(1, n, H, 64).transpose(1, 2) for n in (T, L, L))\n"
                 "    n = torch.zeros(1, T, dtype=torch.int32)\n"
                 "    o, lse = masked_xattn.forward_op(q, k, v, n)\n"
                 "    masked_xattn.backward_op(o, q, k, v, n, o, lse)\n"
                 "def project(rows):\n"
                 "    x = torch.empty(rows, 64)\n"
                 "    residual.forward_op(x, x, torch.empty(64, 64), torch.empty(1))\n"
                 "sizes = [(H, T, L) for H in (1, 5, 16) for T in (1, 2, 48, 33) for L in (1, 40, 64, 1001)]\n"
                 "launches = check_compile.recorded(masked_xattn, '', lambda: [attention(*s) for s in sizes])\n"
                 "launches += check_compile.recorded(residual, '', lambda: [project(rows) for rows in (1, 2, 16)])\n"
                 "variants = {(l.kernel.__name__, str(check_compile.specialised(l, 90))) for l in launches}\n"
                 "names = [name for name, _ in variants]\n"
                 "print({name: names.count(name) for name in sorted(names)})", TRITON_INTERPRET="0")
    assert out.strip() == str({"residual_forward": 1, "xattn_decode": 1, "xattn_dkv": 3, "xattn_dq": 1, "xattn_forward": 1, "xattn_join": 1})


def saved_rows(folder):
    """The lines of a dry run's benchmark.csv; every one is whole, and nothing else looks like a result."""
    lines = (folder / "dry" / "benchmark.csv").read_text().splitlines()
    assert lines[0].startswith("# dry run, no figures; torch ") and lines[1].startswith("table,shape,implementation,pass,median_us")
    rows = list(csv.reader(lines[2:]))
    assert all(len(row) == 10 for row in rows)
    return rows


@needs_triton
def test_a_dry_run_goes_through_every_measurement(tmp_path):
    """What waits for a GPU is run here once, tiny and interpreted; only foreign baselines may be missing on a CPU."""
    python("-m", "kernels.benchmark", "--dry", "--minutes", "600", "--out", str(tmp_path))
    rows = saved_rows(tmp_path)
    missing = {row[2] for row in rows if row[3].startswith("not run")}
    assert missing <= {"SDPA cuDNN", "SDPA memory-efficient", "SDPA flash", "FlexAttention, mask ready",
                       "FlexAttention, mask every call", "flash-attn varlen"}
    done = {(row[0], row[2], row[3]) for row in rows if row[4] and float(row[4]) > 0}
    three, decoding = ("forward", "backward", "both"), ("prompt", "step", "2 tokens")
    for table, names, passes in (
            ("core", ("ours", "einsum, mask every call"), three),
            ("block", ("released form", "PyTorch", "PyTorch, torch.compile", "kernels", "kernels, torch.compile"), three),
            ("projection", ("fused", "folded, cuBLAS", "PyTorch", "PyTorch, torch.compile"), ("forward",)),
            ("projection", ("a product a block", "at once", "at once, weights kept stacked"), ("forward",)),
            ("model", ("released form", "PyTorch", "kernels"), decoding), ("model", ("kernels, CUDA graph",), decoding[1:])):
        assert done >= {(table, name, part) for name in names for part in passes}, table
    assert [row[3] for row in rows if row[0] == "tests"][0].startswith("1 passed")
    assert "1 passed" in (tmp_path / "dry" / "tests.txt").read_text()
    assert (tmp_path / "dry" / "benchmark.png").stat().st_size > 10_000 and not list(tmp_path.glob("dry/*.partial"))
    files = [*tmp_path.glob("dry/profile-*.txt")]
    assert min(file.stat().st_mtime_ns for file in files) > (tmp_path / "dry" / "tests.txt").stat().st_mtime_ns, "profiles slow what follows"
    profiles = [file.read_text() for file in files]
    assert len(profiles) == 4 and all("af_min::masked_xattn" in profile for profile in profiles)


@needs_triton
@pytest.mark.slow
def test_a_benchmark_that_is_killed_or_runs_out_of_time_leaves_what_it_measured(tmp_path):
    """SIGKILL while a new benchmark.csv is half written; then a run whose time is up before it begins, and of which parts fail."""
    with pytest.raises(AssertionError, match="exit code -9"):
        python("-c", "import os, sys\n"
               "from kernels import benchmark\n"
               f"sys.argv = ['benchmark', '--dry', '--out', {str(tmp_path)!r}]\n"
               "benchmark.check, write, kept = lambda *a: None, benchmark.Bench.write, []\n"
               "def deadly(bench, name, text):\n"
               "    kept.append(name)\n"
               "    if len(kept) == 4:\n"
               "        (bench.folder / (name + '.partial')).write_text(text[:-9])\n"
               "        os.kill(os.getpid(), 9)\n"
               "    write(bench, name, text)\n"
               "benchmark.Bench.write = deadly\n"
               "benchmark.main()")
    rows = saved_rows(tmp_path)
    assert [row[2:4] for row in rows] == [["ours", name] for name in ("forward", "backward", "both")] \
        + [["einsum, mask every call", name] for name in ("forward", "backward", "both")]
    assert (tmp_path / "dry" / "benchmark.csv.partial").exists()
    with pytest.raises(AssertionError, match="exit code 2"):
        python("-c", "import sys\n"
               "from kernels import benchmark\n"
               f"sys.argv = ['benchmark', '--dry', '--minutes', '0', '--out', {str(tmp_path)!r}]\n"
               "def fails(*a, **k):\n"
               "    raise RuntimeError('broken')\n"
               "benchmark.check = benchmark.plot = benchmark.block_table = benchmark.torch.cuda.empty_cache = fails\n"
               "benchmark.cli.run(benchmark.main)")
    rows = saved_rows(tmp_path)
    assert {row[0] for row in rows if row[3] == "not run: broken"} == {"check", "block", "plot", "memory"}
    late = [row[0] for row in rows if row[3] == "not run: no time left"]
    assert len(late) > 20 and set(late) == {"core", "model", "projection", "profile", "tests"}
    assert "RuntimeError: broken" in (tmp_path / "dry" / "errors.txt").read_text()


def test_a_profile_that_fails_costs_no_measurement(tmp_path, monkeypatch):
    from kernels import benchmark, benchmark_model

    def fails(*_):
        raise RuntimeError("no profiler")
    monkeypatch.setattr(benchmark_model, "training", lambda *_: lambda: None)
    monkeypatch.setattr(benchmark_model, "decoding", lambda *_: {})
    monkeypatch.setattr(benchmark_model, "profile", fails)
    bench = benchmark.Bench(tmp_path, "", dry=True)
    for profiled in (False, True):
        benchmark_model.table(bench, profiled)
    assert [row[2:4] for row in bench.rows] == [(name, "step") for name in ("kernels", "PyTorch", "released form")] \
        + [("kernels, step", "not run: no profiler")]
