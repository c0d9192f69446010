"""`trivium import`: a Hugging Face Llama or Mixtral directory to Trivium's weights.

OUT gets `model.safetensors` under Trivium's names (bit for bit, in the dtype of the files), `model.toml` with
the `[model]` section for a training config, and the tokenizer's own files. `trivium generate`, `chat` and
`export` take OUT where they take a run. Leaves out downloading, tokenizer conversion, and pickled weights.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from configs.loader import ConfigError, command_parser, entrypoint, plain, write_atomic

TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        prog="trivium import",
        description="Turns a Hugging Face directory (Llama or Mixtral, safetensors) into Trivium weights.",
        example="trivium import ~/models/tinyllama runs/imported/tinyllama",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="where to write; must not exist yet")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="start a new file beyond this size")
    parser.add_argument("--dry-run", action="store_true", help="check config and tensors' names, write nothing")
    args = parser.parse_args(argv)
    try:
        print(import_directory(args.directory, args.out, args.max_shard_gb, args.dry_run))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


def import_directory(directory: Path, out: Path, max_shard_gb: float = 5.0, dry_run: bool = False) -> str:
    """Converts `directory` into `out`; returns what was done. Errors: ValueError naming key or tensor."""
    import tomli_w

    from export.families import family_of, from_hf
    from export.folder import begin, discard
    from export.hf_config import from_hf_config
    from export.source import IMPORTED
    from export.tensors import open_tensors, write_tensors

    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    try:
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{directory} has no config.json; name a Hugging Face model directory") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{directory / 'config.json'} is not valid JSON: {error}") from None
    model = from_hf_config(raw)
    names, read = open_tensors(directory)
    what = f"{family_of(model).architecture}, {model.num_parameters():,} parameters"
    if dry_run:
        for _ in from_hf(read, names, model):
            pass
        return f"{what}: every tensor is there; nothing was written"

    partial = begin(out)
    try:
        write_tensors(partial, from_hf(read, names, model), int(max_shard_gb * 1e9))
        for name in TOKENIZER_FILES:
            if (directory / name).is_file():
                shutil.copyfile(directory / name, partial / name)
        tree = {
            "model": plain(model),
            "import": {
                "source": str(directory),
                "architecture": family_of(model).architecture,
                "max_positions": int(raw.get("max_position_embeddings") or 2048),
            },
        }
        write_atomic(partial / IMPORTED, tomli_w.dumps(tree).encode())
        partial.rename(out)
    finally:
        discard(partial)
    return f"{what}: written to {out}; its [model] section is in {out / IMPORTED}"


if __name__ == "__main__":
    entrypoint(main)
