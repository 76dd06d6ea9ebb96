"""Decoding speed of the language model on a CPU, beside transformers' generate: float32, greedy, the same tokens.

    pip install -r tests/requirements.txt && python tests/get_smollm2.py smollm2
    OMP_NUM_THREADS=1 python -m tests.bench_decode smollm2               batch 1 and 8; both sides alternate in one process; fails
                                                                         where ours is below AT_LEAST times theirs, or says else

Another thread count: the same with OMP_NUM_THREADS=2.
"""
from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

from af_min.lm import LM
from af_min.pretrained_lm import load_lm

AT_LEAST = 1.3                       # times transformers' tokens/s


@torch.inference_mode()
def generate(lm: LM, ids_BT: torch.Tensor, new: int) -> torch.Tensor:
    """Greedy decoding with a cache: (B, new) tokens."""
    cache, made, read_BT = lm.new_cache(len(ids_BT), ids_BT.shape[1] + new), [], ids_BT
    for _ in range(new):
        made.append(lm.logits(lm(read_BT, cache=cache)[:, -1]).argmax(-1))
        read_BT = made[-1][:, None]
    return torch.stack(made, 1)


def bandwidth(numbers: int = 1 << 27) -> float:
    """Bytes a second of reading memory once, best of five."""
    memory, seconds = torch.randn(numbers), []
    for _ in range(5):
        began = time.perf_counter()
        memory.sum()
        seconds.append(time.perf_counter() - began)
    return memory.nbytes / min(seconds)


def compare(lm: LM, theirs, batch: int, prompt: int = 24, new: int = 64, repeats: int = 5) -> tuple[float, float]:
    """Tokens/s of ours and theirs, best of `repeats` alternating runs. AssertionError where a token differs."""
    ids = torch.randint(1000, 40_000, (batch, prompt), generator=torch.Generator().manual_seed(0))
    settings = dict(max_new_tokens=new, do_sample=False, attention_mask=torch.ones_like(ids))
    sides = {"ours": lambda: generate(lm, ids, new), "theirs": lambda: theirs.generate(ids, **settings)[:, prompt:]}
    tokens, best = {}, dict.fromkeys(sides, float("inf"))
    for _ in range(repeats):
        for name, run in sides.items():
            began = time.perf_counter()
            tokens[name] = run()
            best[name] = min(best[name], time.perf_counter() - began)
    assert torch.equal(tokens["ours"], tokens["theirs"]), "the two sides do not say the same"
    return batch * new / best["ours"], batch * new / best["theirs"]


def open_both(folder: Path):
    """Ours and transformers', from one Hugging Face folder; neither stops before its time."""
    import transformers
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config.eos_token_id = None
    ours = load_lm(folder)
    ours.pack()
    return ours, theirs


def report(folder: Path) -> None:
    lm, theirs = open_both(folder)
    size, speed = sum(p.nbytes for p in theirs.parameters()), bandwidth()
    print(f"{folder}: {size / 1e6:.0f} MB of weights, float32, {torch.get_num_threads()} threads; memory is read at {speed / 1e9:.1f} GB/s: "
          f"at most {speed / size:.1f} steps/s")
    for batch in (1, 8):
        ours, peer = compare(lm, theirs, batch)
        print(f"batch {batch}: {ours:.1f} tokens/s, transformers {peer:.1f}: {ours / peer:.2f}x, the same tokens")
        if ours < AT_LEAST * peer:
            sys.exit(f"batch {batch}: got {ours / peer:.2f} times transformers' rate, expected at least {AT_LEAST}")


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    report(Path(sys.argv[1]))
