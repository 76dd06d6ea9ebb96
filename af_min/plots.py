"""Pictures of what a model learned and where it looks: report.png of a run, and `sample.py --plot`.

What a word attended to: the token at position t was chosen from the text state at position t - 1, so the weights shown for it
are those of t - 1, mean over its word's tokens, all heads and all cross-attention blocks:

    share[word, window] = mean over tokens t of the word, blocks, heads of softmax(q_{t-1} k_window / sqrt(K))

Colours are the colour-blind-safe set of Okabe and Ito; heat maps are viridis and cividis, which grow lighter steadily.
"""
from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import torch

warnings.filterwarnings("ignore", "Glyph .* missing from")       # a caption in letters that the font lacks: boxes stand for them
matplotlib.use("Agg")
from matplotlib import pyplot as plt

from . import answering, data, manifest
from .audio import count_windows
from .cli import UserError
from .config import AudioConfig
from .flamingo import Audio, AudioFlamingo, Sampling
from .retrieval import Heard, hear
from .text import Tokenizer, write_sample

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
SMOOTHING = 40                             # steps that a point of the smooth loss curve averages


def check_path(path: Path) -> None:
    """UserError for a picture that cannot have this name."""
    if path.suffix not in (".png", ".pdf", ".svg") or path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path}: expected the name of a file that ends with .png, .pdf or .svg, in a folder that exists")


# ---------------------------------------------------------------------- what was attended to

@torch.no_grad()
def attention(model: AudioFlamingo, ids: list[int], audio: Audio) -> np.ndarray:
    """Weights of every text position over all windows of a sample, mean over heads and blocks: (T, L).

    Recomputed from what each block is called with, whatever the mask; rows sum to 1, or to less beside a null key.
    """
    maps = []

    def look(block, inputs):
        maps.append(block.attention(*inputs[:2], *inputs[3:])[0].mean(0))          # all but the values

    hooks = [block.register_forward_pre_hook(look) for block in model.xattn.values()]
    model.hidden(torch.tensor([ids], device=audio.n_windows_BN.device), audio)
    for hook in hooks:
        hook.remove()
    return torch.stack(maps).mean(0).cpu().numpy()


def words(tokenizer: Tokenizer, ids: list[int]) -> list[tuple[str, list[int]]]:
    """Tokens -> [(word, places in `ids` of its tokens)]. Half a multi-byte character belongs to the word it completes."""
    groups: list[tuple[str, list[int]]] = []
    before = ""
    for t in range(len(ids)):
        text = tokenizer.decode(ids[:t + 1]).rstrip("\ufffd")
        new, before = text[len(before):], text
        if groups and not (new[:1].isspace() and groups[-1][0].strip()):
            groups[-1] = (groups[-1][0] + new, groups[-1][1] + [t])
        else:
            groups.append((new, [t]))
    return [(word.strip(), places) for word, places in groups]


def word_attention(model: AudioFlamingo, tokenizer: Tokenizer, prompt: list[int], answer: list[int], audio: Audio):
    """-> (words, share (words, L)): which windows were looked at when each word of the answer was chosen."""
    share_TL = attention(model, prompt + answer, audio)[len(prompt) - 1:]
    groups = words(tokenizer, answer)
    return [word for word, _ in groups], np.array([share_TL[places].mean(0) for _, places in groups])


# ---------------------------------------------------------------------- panels

def plain(words: str, limit: int = 24) -> str:
    """Words as a label: at most `limit` characters, no line breaks, a dollar sign is a dollar sign and no formula."""
    words = " ".join(words.split()).encode(errors="replace").decode()           # half letters, which no font can draw
    return (words if len(words) <= limit else words[:limit - 1] + "…").replace("$", r"\$")


def log_mel(model: AudioFlamingo, samples_S: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """-> (F, M) in dB over the whole windows' span, its seconds, the frequency (M,) in Hz at which each mel bin is loudest."""
    c = model.config.audio
    span = c.window_samples + (count_windows(len(samples_S), c) - 1) * c.hop_samples
    padded = torch.zeros(1, span)
    padded[0, :len(samples_S)] = torch.from_numpy(samples_S)[:span]
    front = model.encoder.log_mel
    with torch.no_grad():
        mel_FM = front(padded.to(front.window.device))[0].cpu().numpy()
    return mel_FM, span / c.sample_rate, front.filters.argmax(0).cpu().numpy() * c.sample_rate / c.n_fft


def draw_log_mel(axes, model: AudioFlamingo, heard: Heard, title: str) -> None:
    mel_FM, seconds, hertz_M = log_mel(model, heard.recording.samples)
    top = mel_FM.max()
    picture = axes.imshow(mel_FM.T, origin="lower", aspect="auto", cmap="magma", vmin=top - 60, vmax=top,
                          extent=(0, seconds, 0, len(hertz_M)), interpolation="nearest")
    ticks = np.linspace(0, len(hertz_M) - 1, 5).round().astype(int)
    axes.set_yticks(ticks + 0.5, [f"{hertz_M[m] / 1000:.1f}" for m in ticks])
    axes.set_ylabel("frequency (kHz)")
    axes.axvline(heard.recording.seconds, color="white", linestyle=":", linewidth=1.2)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.figure.colorbar(picture, ax=axes, pad=0.01, label="power (dB)")


def draw_windows(axes, c: AudioConfig, count: int) -> None:
    """Every window as a bar from its first to its last second; neighbours overlap, so the bars lie on several levels."""
    levels = max(1, -(-c.window_samples // c.hop_samples))
    for j in range(count):
        axes.broken_barh([(j * c.hop, c.window)], (-(j % levels) - 0.85, 0.7), color=COLOURS[0], edgecolor="white", linewidth=1.5)
        axes.text(j * c.hop + c.window / 2, -(j % levels) - 0.5, str(j + 1), fontsize=7, color="white", ha="center", va="center")
    axes.set(ylim=(-levels - 0.1, 0.1), yticks=[], ylabel=f"{count} windows" if count > 1 else "1 window")


def draw_attention(axes, c: AudioConfig, spoken: list[str], share: np.ndarray, title: str, seconds: float) -> None:
    """Heat map words x windows; each window is drawn around its middle, as wide as the step from one to the next."""
    count = share.shape[1]
    if count == 1:
        edges = np.array([0.0, max(c.window, seconds)])    # one window, or all of them pooled into one vector
    else:
        edges = c.window / 2 + c.hop * (np.arange(count + 1) - 0.5)
    picture = axes.pcolormesh(edges, np.arange(len(spoken) + 1), share, cmap="cividis", vmin=0,
                              vmax=max(share.max(), 2 / count))      # looking everywhere alike is a middle tone
    named = range(0, len(spoken), -(-len(spoken) // 30) or 1)     # of many words some: there is room for 30
    axes.set_yticks([n + 0.5 for n in named], [plain(spoken[n]) for n in named], fontsize=10 if len(spoken) <= 20 else 6)
    axes.set_ylim(len(spoken), 0)
    axes.set_xlabel("time (s); a cell is one window, drawn at its middle")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_facecolor("0.92")
    axes.figure.colorbar(picture, ax=axes, pad=0.01, label="share of attention")


def draw_losses(axes, log: Path) -> None:
    """Loss curves of all stages one after the other; a step that was run again after a resume counts once."""
    curves: dict[str, dict[int, float]] = {}
    for entry, _ in manifest.whole_lines(log):
        curves.setdefault(entry["stage"], {})[entry["step"]] = entry["loss"]
    first = 0
    for (stage, losses), colour in zip(curves.items(), COLOURS):
        steps = sorted(losses)
        loss = np.array([losses[step] for step in steps])
        at = first + np.array(steps)
        axes.plot(at, loss, color=colour, alpha=0.25, linewidth=0.8)
        wide = max(1, min(SMOOTHING, len(loss) // 4))              # of a short training the end alone, not all of it
        smooth = np.convolve(loss, np.ones(wide) / wide, "valid")
        axes.plot(at[wide - 1:], smooth, color=colour, linewidth=2, label=f"{stage}: ends at {smooth[-1]:.2f}")
        if first:
            axes.axvline(first, color="0.7", linewidth=0.8)
        first = at[-1] + 1
    if curves:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(matplotlib.ticker.StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.legend(frameon=False)
    axes.set(xlabel="training step, stages in order", ylabel="loss (nats)")
    axes.grid(alpha=0.3)
    axes.set_title("How the loss fell", loc="left", fontsize=11, fontweight="bold")


def draw_mask(axes, model: AudioFlamingo, ids: list[int], audio: Audio, answers: list[str]) -> None:
    """Windows (rows, audio after audio) x text tokens (columns): where the attention of one few-shot sample is above 0."""
    visible_LT, n_windows = attention(model, ids, audio).T > 0, audio.n_windows_BN[0].tolist()
    axes.imshow(visible_LT, aspect="auto", cmap=matplotlib.colors.ListedColormap(["0.9", COLOURS[0]]), vmin=0, vmax=1,
                interpolation="nearest")
    ends = np.cumsum([0, *n_windows])
    starts = [t for t, token in enumerate(ids) if token == model.config.audio_id] + [len(ids)]
    for end in ends[1:-1]:
        axes.axhline(end - 0.5, color="white", linewidth=1.5)
    for start in starts[:-1]:
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    axes.set_yticks((ends[:-1] + ends[1:] - 1) / 2, [f"audio {n + 1}" for n in range(len(n_windows))])
    middles = [(a + b - 1) / 2 for a, b in zip([0, *starts], starts)]
    axes.set_xticks(middles, ["task", *(f"text {n + 1}\n“{plain(answer, 16)}”" for n, answer in enumerate(answers))])
    axes.set(xlabel=f"{len(ids)} text tokens", ylabel=f"{sum(n_windows)} windows")
    seen = {"block": "its own audio and all before it", "last": "its own audio", "full": "every audio"}[model.config.xattn.mask]
    axes.set_title(f"What a few-shot text may look at (blue): {seen}", loc="left", fontsize=11, fontweight="bold")


# ---------------------------------------------------------------------- whole pictures

def draw_answer(figure, grid, model: AudioFlamingo, tokenizer: Tokenizer, heard: Heard, prompt: list[int], answer: list[int],
                audio: Audio) -> None:
    """Three panels over one time axis: log-mel of the recording asked about (the prompt's last), its windows, where each word looked."""
    c, count = model.config.audio, int(audio.n_windows_BN[0, audio.n_windows_BN[0] > 0][-1])
    rows = grid.subgridspec(3, 1, height_ratios=(5, 1.6, 5))
    top = figure.add_subplot(rows[0])
    strip, bottom = (figure.add_subplot(row, sharex=top) for row in (rows[1], rows[2]))
    for axes in (top, strip):
        axes.tick_params(labelbottom=False, bottom=axes is top)
    strip.spines[:].set_visible(False)
    draw_log_mel(top, model, heard, f"{plain(Path(heard.path).name, 50)}: {heard.recording.seconds:.2f} s as log-mel")
    draw_windows(strip, c, len(heard.windows_WD))
    spoken, share = word_attention(model, tokenizer, prompt, answer, audio) if answer else (["(nothing)"], np.zeros((1, count)))
    own = share[:, -count:]
    title = "Where the model looked when it chose each word"
    if share.shape[1] > count:
        title += f" ({own.sum(1).mean():.0%} here, the rest at the shots)"
    draw_attention(bottom, c, spoken, own, title, heard.recording.seconds)


def answer_picture(path: Path, model: AudioFlamingo, tokenizer: Tokenizer, heard: Heard, prompt: list[int], answer: list[int],
                   audio: Audio) -> None:
    """`sample.py --plot`: one recording and one answer about it."""
    figure = plt.figure(figsize=(9, 6.5), layout="constrained")
    draw_answer(figure, figure.add_gridspec(1, 1)[0], model, tokenizer, heard, prompt, answer, audio)
    save(figure, path, 130)


def questions(rows: list[dict]) -> list[dict]:
    """Rows with a prompt, each with one answer; where all are dialogues, the first turn of the first, still written as a dialogue."""
    first = rows[0].get("turns", [None])[0]
    return [{**row, "answer": row.get("answer") or row["answers"][0]} for row in rows if "turns" not in row] or \
        [{**rows[0], "turns": [first], "prompt": first["user"], "answer": first["assistant"]}]


def few_shot_row(rows: list[dict]) -> dict:
    """The first FewShotSeen row; without one, the first row with shots; without any, three rows put one after the other."""
    shown = sorted((row for row in rows if row.get("shots")), key=lambda row: row["task"] != "FewShotSeen")
    *shots, row = shown[:1] or rows[:3]
    return {**row, "shots": row.get("shots") or shots}


def scene_row(rows: list[dict]) -> dict:
    """The first caption of three or more events; without one, the first caption, or the first row."""
    captions = [row for row in rows if row["task"] == "AudioCaptioning"] or rows
    return next((row for row in captions if row["answer"].count(" then ") >= 2), captions[0])


def losses(run: Path) -> None:
    """<run>/report.png while training runs: the loss curves alone."""
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    draw_losses(figure.add_subplot(), Path(run) / "log.jsonl")
    save(figure, Path(run) / "report.png")


def save(figure, path: Path, dpi: int = 110) -> Path:
    path = path.resolve()                      # a link stays: what it points to is replaced
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=dpi)
        return partial.replace(path)
    except OSError as error:                                           # a full disk: name the picture, leave no half of it
        with contextlib.suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        plt.close(figure)


def report(run: Path, model: AudioFlamingo, tokenizer: Tokenizer, folder: Path) -> Path:
    """Draw <run>/report.png from the run's log and the test split of a prepared data set; returns its path.

    (a) loss curves of all stages, (b) a scene's log-mel with its windows, (c) the mask of a few-shot sample, (d) which windows
    each word of the model's own caption attended to.
    """
    rows = questions([row for row in manifest.read_rows(Path(folder) / "test.jsonl") if row["task"] != "WindowText"])
    figure = plt.figure(figsize=(16, 9), layout="constrained")
    left, right = figure.add_gridspec(1, 2)
    left = left.subgridspec(2, 1)
    draw_losses(figure.add_subplot(left[0]), Path(run) / "log.jsonl")

    def listen(sample):
        heard = {place: hear(model, Path(folder) / place[0], place[1]) for place in sample.audios}
        return heard[sample.audios[-1]], {place: h.windows_WD for place, h in heard.items()}

    row = few_shot_row(rows)
    sample = write_sample(tokenizer, row)
    batch = data.collate([(sample, listen(sample)[1])], tokenizer.pad_id, model.config.clap.out_width).to(next(model.parameters()).device)
    with torch.no_grad():                      # the text is not read: three rows one after the other may be more than the model holds
        audio = model.listen(batch.windows_AWD, batch.n_windows_BN)
    draw_mask(figure.add_subplot(left[1]), model, sample.ids, audio, [part["answer"] for part in [*row["shots"], row]])

    row = scene_row(rows)
    sample = write_sample(tokenizer, row, complete=False)
    heard, windows = listen(sample)
    state, logits_BV = answering.read(model, tokenizer, [sample], windows, 40)
    answer = answering.answer(model, tokenizer, state, logits_BV, Sampling(), 40)[0]
    draw_answer(figure, right, model, tokenizer, heard, sample.ids, [t for t in answer if t != tokenizer.eoc_id], state.audio)
    asked, said, truth = (plain(words, 60) for words in (row["prompt"], tokenizer.decode(answer), row["answer"]))
    figure.suptitle(f"{plain(Path(run).name)}: asked “{asked}”, it says “{said}” (true: “{truth}”)", fontsize=13)
    return save(figure, Path(run) / "report.png")
