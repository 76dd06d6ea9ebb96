"""train.py --lm: a new model on a published language model, with the encoder of another run, from CLAP, or trained from nothing."""
import pytest
import torch

import micro
from af_min import checkpoint
from af_min.pretrained_lm import load_lm
from test_pretrained_lm import LLAMA, state_of, write_folder
from test_pretrained_text import byte_level
from training import TRAIN, log, run_main, spawn, train, weights


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder as published: a Llama of two layers, a byte-level vocabulary."""
    folder = tmp_path_factory.mktemp("lm") / "llama"
    values = {**LLAMA, "vocab_size": 1200, "max_position_embeddings": 512, "eos_token_id": 0}
    write_folder(folder, values, state_of(values)[0])
    byte_level(("<|endoftext|>",)).save(str(folder / "tokenizer.json"))
    return folder


def test_a_model_on_a_published_lm_with_the_encoder_of_a_run_trains_and_is_sampled(llama, trained, scenes_data, tmp_path, capsys):
    """Pretrain leaves the LM as published and the encoder as in the run; then sft, evaluation and sample.py work on it."""
    train(tmp_path, scenes_data, "--lm", llama, "--encoder", trained[0], "--stage", "pretrain", "--name", "new")
    run = tmp_path / "runs" / "new"
    after, published, ears = weights(run / "model.safetensors"), load_lm(llama).state_dict(), weights(trained[0] / "model.safetensors")
    for name, value in published.items():
        assert torch.equal(after["lm." + name][:len(value)], value), name
    assert all(torch.equal(after[name], value) for name, value in ears.items() if name.startswith("encoder."))
    assert log(run)[0]["gates"] != log(run)[-1]["gates"]
    _, _, fresh = TRAIN.published_parts(TRAIN.Args(lm=str(llama), encoder=str(trained[0])))
    assert all(torch.equal(fresh[name], value) for name, value in ears.items() if name.startswith(("encoder.", "representation.")))
    train(tmp_path, scenes_data, "--init", run, "--stage", "sft", "--name", "tuned")
    model, tokenizer = checkpoint.load_run(tmp_path / "runs" / "tuned")
    assert tokenizer.decode(tokenizer.encode("bell then dog")) == "bell then dog" and model.config.audio_id == tokenizer.audio_id >= 1200
    from af_min import evaluate
    import sample
    assert len(evaluate.report(tmp_path / "runs" / "tuned", [(scenes_data, 1.0)], items=2)) > 5
    recording = next((scenes_data / "audio").glob("test-*.wav"))
    capsys.readouterr()
    run_main(sample, tmp_path, ["--run", "runs/tuned", "--audio", recording, "--max-new", 3])
    assert capsys.readouterr().out.endswith("\n")


def test_stages_whose_work_is_done_are_left_out_and_a_kill_does_not_change_that(llama, trained, scenes_data, tmp_path):
    flags = ["--lm", llama, "--encoder", trained[0]]
    train(tmp_path, scenes_data, *flags, "--name", "whole")
    whole = tmp_path / "runs" / "whole"
    assert sorted({line["stage"] for line in log(whole)}) == ["pretrain", "sft"]
    code, printed = spawn(tmp_path, micro.__file__, "--kill", "pretrain:3", "--data", scenes_data, "--checkpoint-every", 2, "--name", "cut", *flags)
    assert code < 0, printed
    run_main(TRAIN, tmp_path, ["--resume", "--name", "cut"])                       # its flags are remembered
    resumed, whole = (weights(tmp_path / "runs" / name / "model.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_without_an_encoder_one_is_trained_first(llama, scenes_data, tmp_path):
    train(tmp_path, scenes_data, "--lm", llama, "--name", "new", "--steps", 1)
    assert [line["stage"] for line in log(tmp_path / "runs" / "new")] == ["clap", "pretrain", "sft"]


@pytest.mark.parametrize("flags, says", [
    (["--lm", "LM", "--stage", "sft"], "--clap FILE or --encoder RUN"), (["--clap", "x.pth"], "--lm DIR"), (["--encoder", "RUN"], "--lm DIR"),
    (["--lm", "LM", "--encoder", "runs/none"], "--encoder runs/none: no trained model"), (["--lm", "LM", "--init", "RUN"], "use one of the two"),
    (["--lm", "LM", "--clap", "x", "--encoder", "RUN"], "use one of the two"), (["--lm", "nowhere", "--encoder", "RUN"], "nowhere"),
    (["--lm", "LM", "--clap", "none.pth"], "none.pth")])
def test_parts_that_do_not_fit_together_are_named(llama, trained, scenes_data, tmp_path, capsys, flags, says):
    from test_train_mistakes import mistake
    flags = [{"LM": llama, "RUN": trained[0]}.get(flag, flag) for flag in flags]
    assert says in mistake(capsys, TRAIN, tmp_path, "--preset", "micro", "--no-evaluate", "--data", scenes_data, *flags)
    assert not (tmp_path / "runs").exists(), "nothing is begun"
