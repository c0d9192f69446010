"""`trivium import`: converts a Hugging Face directory of one of the known families to Trivium's weights.

OUT gets `model.safetensors` with Trivium's names (bit-identical, in the dtype of the files), `model.toml` with the
`[model]` section for a training config, and the tokenizer's files. `trivium generate`, `chat` and `export` accept OUT
in place of a run. Nothing is downloaded, no tokenizer is converted, and pickled weights are not loaded.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from configs.cli import command_parser, entrypoint
from configs.files import file_sha256, write_atomic
from configs.loader import ConfigError, plain
from data_pipeline.tokens.tokenizer import HUGGINGFACE_FILE, SENTENCEPIECE_FILE, SPACE, Tokenizer
from export.publishing import RECORD, partly_written


def main(argv: Sequence[str] | None = None) -> int:
    """Converts the directory that the command line names and returns 0."""
    parser = command_parser(
        prog="trivium import",
        description="Turns a Hugging Face directory with safetensors, of a family in docs/families.md, into weights.",
        example="trivium import ~/models/tinyllama runs/imported/tinyllama",
    )
    parser.add_argument("directory", metavar="DIR", type=Path, help="a folder with config.json and safetensors")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; it must not exist")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="maximum size of a file of weights (default 5)")
    parser.add_argument("--dry-run", action="store_true", help="check the config and the tensors, write nothing")
    args = parser.parse_args(argv)
    try:
        print(import_directory(args.directory, args.out, args.max_shard_gb, args.dry_run))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from None
    return 0


def import_directory(directory: Path, out: Path, max_shard_gb: float = 5.0, dry_run: bool = False) -> str:
    """Converts `directory` into `out` and returns a sentence that says so.

    Raises ValueError (ConfigError among them) that names every file, key and tensor that is wrong.
    """
    import tomli_w

    from export.hf_folder import open_hf_folder, read_json
    from export.model_source import GENERATION, IMPORTED, TOKEN_IDS, TOKENIZER_FILES
    from export.tensors import write_tensors

    if out.exists():
        raise ConfigError(f"{out} exists already; name a new folder")
    opened = open_hf_folder(directory)
    family, model = opened.family, opened.model
    tokenizer = tokenizer_sha256(directory)
    stated = read_json(directory / GENERATION) if (directory / GENERATION).is_file() else {}
    # An empty generation_config.json says nothing, and does not take back what config.json says.
    ids = opened.raw | {name: value for name, value in stated.items() if value is not None}
    what = f"{family.architecture}, {model.num_parameters():,} parameters{_said_of_kept(opened.fit.kept)}"
    if dry_run:
        return f"{what}: every tensor is there; nothing was written"

    with partly_written(out, "OUT") as partial:
        write_tensors(partial, opened.converted(), int(max_shard_gb * 1e9))
        for name in (*TOKENIZER_FILES, GENERATION):
            if (directory / name).is_file():
                shutil.copyfile(directory / name, partial / name)
        tree = {
            "model": plain(model),
            "import": {
                "source": str(directory),
                "architecture": family.architecture,
                "max_positions": family.longest_row(opened.raw),
                "tokenizer_sha256": tokenizer,
                "token_ids": {name: ids[name] for name in TOKEN_IDS if ids.get(name) is not None},
                "no_token_ids": [name for name in TOKEN_IDS if name in ids and ids[name] is None],
                "kept": {key: opened.raw[key] for key in family.kept_keys if opened.raw.get(key) is not None},
            },
        }
        write_atomic(partial / IMPORTED, tomli_w.dumps(tree).encode())
        partial.rename(out)
    said = f"{what}: written to {out}; its [model] section is in {out / IMPORTED}"
    if ids.get("eos_token_id") is None:
        said += f"; no file of {directory} names an eos_token_id, so that nothing says where its texts end"
    return said


def _said_of_kept(names: Sequence[str]) -> str:
    """Returns a clause about tensors that take no part in what Trivium computes; "" if there are none."""
    if not names:
        return ""
    layers = sorted({match[0] for name in names if (match := re.search(r"layers\.\d+", name))})
    where = ", ".join(layers) if layers else names[0]
    return f" (and {len(names)} tensors of {where}, which are not used, and are kept for an export)"


def tokenizer_sha256(directory: Path) -> str:
    """Returns the SHA-256 of the folder's tokenizer that Trivium can use, or "" if it has none.

    Raises ConfigError if it cannot be the model's: the folder is an export of Trivium with another one, or its
    tokenizer.json has another vocabulary.
    """
    file, record, fast = (directory / name for name in (SENTENCEPIECE_FILE, RECORD, HUGGINGFACE_FILE))
    if not file.is_file():
        if not _is_usable(fast):
            return ""
        file = fast
    found = file_sha256(file)
    exported = json.loads(record.read_text(encoding="utf-8")).get("files", {}) if record.is_file() else {}
    if exported.get(file.name, found) != found:
        raise ConfigError(
            f"{file} is not the one that {directory} was exported with; restore that one, or export the model again"
        )
    if file == fast:
        return found
    vocabulary = json.loads(fast.read_text(encoding="utf-8"))["model"]["vocab"] if fast.is_file() else None
    if isinstance(vocabulary, dict):
        import sentencepiece

        theirs = {number: piece for piece, number in vocabulary.items()}
        try:
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError:
            raise ConfigError(f"{file} is not a sentencepiece model; fetch it again, or remove it") from None
        for number in range(pieces.vocab_size()):
            piece = pieces.id_to_piece(number)
            if theirs.get(number, piece) not in (piece, piece.replace(SPACE, " ")):
                raise ConfigError(
                    f"{file} and {fast} have different vocabularies (token {number} is {piece!r} and "
                    f"{theirs[number]!r}), so one of them is another model's; put the right one there"
                )
    if not _is_usable(file):  # it puts a space before a text, for example, as LLaMA's does
        return file_sha256(fast) if _is_usable(fast) else ""
    return found


def _is_usable(file: Path) -> bool:
    """Whether Trivium can use a tokenizer: it has the file, which keeps texts as they are and says what ends one."""
    try:
        Tokenizer.load(file)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    entrypoint(main)
