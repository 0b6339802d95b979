"""A small trained model of DeepSeek-V3's architecture, so that accuracy has a text to be measured on.

Its tokens are bytes; byte 0, which no source file has, begins and ends a text. It was trained by
`python -m dsopt.models.train_tiny` on the source of Python's standard library, which every machine has. What it was
trained on, and how, is in `training.json` beside its weights. Python versions differ in that text, so figures are
comparable within one version; `Text.sha256` tells whether two texts are the same.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# the folder of the trained checkpoint, in transformers' layout
PATH = Path(__file__).with_name("tiny_checkpoint")

END = 0  # the byte between files

CONFIG: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 32,
    "v_head_dim": 128,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_mtp_layers": 0,
    "initializer_range": 0.04,  # about half of 1 / sqrt(hidden_size), as in DeepSeek-V3
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": END,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}

HELDOUT = """
    bisect colorsys contextlib csv filecmp fnmatch fractions getopt graphlib heapq json linecache queue sched
    shelve shlex textwrap timeit
""".split()

MODULES = """
    __future__ _collections_abc _markupbase _pydecimal _pyio _strptime _threading_local _weakrefset abc
    argparse ast asyncio base64 bdb bz2 calendar cmd code codecs codeop collections compileall concurrent
    configparser copy copyreg ctypes dataclasses datetime difflib dis doctest email enum fileinput ftplib
    functools genericpath gettext glob gzip hashlib hmac html http imaplib importlib inspect io ipaddress
    keyword locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode
    operator optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib posixpath pprint
    profile pstats pty py_compile pyclbr pydoc quopri random re reprlib rlcompleter runpy secrets
    selectors shutil signal site smtplib socket socketserver sqlite3 ssl stat statistics string stringprep
    struct subprocess symtable sysconfig tabnanny tarfile tempfile threading token tokenize tomllib trace
    traceback tracemalloc tty turtle types typing unittest urllib uuid venv warnings wave weakref
    webbrowser wsgiref xml xmlrpc zipapp zipfile zipimport zoneinfo
""".split()


@dataclass(frozen=True)
class Text:
    """Files as bytes, each between two bytes END.

    tokens: (num_tokens,) uint8.
    sha256: of those bytes.
    files: names below the standard library's folder, in order.
    """

    tokens: torch.Tensor
    sha256: str
    files: tuple[str, ...]


def text(modules: list[str]) -> Text:
    """The source of the standard library's modules, packages with all their submodules but tests.

    A module that this Python does not have is left out. Raises FileNotFoundError where none has a source file.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [file for name in modules for file in _sources(root, name)]
    if not files:
        raise FileNotFoundError(f"no source of the standard library in {root}")
    data = bytes([END]) + b"".join(file.read_bytes() + bytes([END]) for file in files)
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    names = tuple(file.relative_to(root).as_posix() for file in files)
    return Text(tokens, hashlib.sha256(data).hexdigest(), names)


def _sources(root: Path, name: str) -> list[Path]:
    if (root / f"{name}.py").is_file():
        return [root / f"{name}.py"]
    files = sorted((root / name).rglob("*.py"))
    return [file for file in files if not {"test", "tests"}.intersection(file.relative_to(root).parts)]


def encode(string: str) -> torch.Tensor:
    """The tokens of a string, (1, num_tokens) int64: END, then its bytes in UTF-8."""
    return torch.tensor([[END, *string.encode()]])


def decode(tokens: torch.Tensor) -> str:
    """The string of tokens; bytes that are no UTF-8 become U+FFFD, END is left out."""
    return bytes(token for token in tokens.flatten().tolist() if token != END).decode(errors="replace")
