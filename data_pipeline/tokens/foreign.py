"""Roles of the special tokens of a tokenizer.json that was trained elsewhere, and its chat template.

tokenizer.json itself does not say which token ends a document. Hugging Face's files beside it do, the first of
tokenizer_config.json, special_tokens_map.json, generation_config.json and config.json that names one. A data run copies
tokenizer.json as it is, and writes a tokenizer_config.json beside it that holds the roles alone, so that later commands
need no other file.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.files import write_atomic
from configs.loader import ConfigError
from data_pipeline.tokens.tokenizer import (
    FIM_CONTROLS,
    HUGGINGFACE_FILE,
    INFO_FILE,
    ROLES_FILE,
    SENTENCEPIECE_FILE,
    Tokenizer,
)

if TYPE_CHECKING:
    import tokenizers

    from configs.tokenizer import TokenizerConfig

TEMPLATE_FILE = "chat_template.jinja"
_MODEL_FILES = ("generation_config.json", "config.json")
_SHOWN = 8  # special tokens that a message lists


class NoRoles(ValueError):
    """A tokenizer.json whose files do not say which of its tokens ends a document."""


@dataclass(frozen=True)
class Roles:
    """Ids of the tokens of each role, -1 for none: unknown text, begin and end of a document, padding; a template.

    `bos` is what the tokenizer puts before a text. `named` are the tokens that the files name, such as `bos_token`,
    even one that the tokenizer puts before no text.
    """

    unk: int
    bos: int
    eos: int
    pad: int
    chat_template: str | None = None
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Named:
    """Tokens that a config names for roles; None keeps the one that the tokenizer's files name."""

    end: str | None = None
    begin: str | None = None  # "" for none
    padding: str | None = None


def find_roles(
    folder: Path,
    fast: "tokenizers.Tokenizer",
    described: Mapping[str, Any],
    special: Sequence[str],
    named: Named,
    complete: bool = True,
) -> Roles:
    """Returns the roles of a tokenizer in `folder`; `described` is its tokenizer.json, `special` its special tokens.

    If no file says which token ends a document, or one names several, then none does, and with `complete` that raises
    NoRoles. Raises ValueError for a token that the vocabulary lacks.
    """
    config = _json(folder / ROLES_FILE)
    told = _json(folder / "special_tokens_map.json") | {
        key: value for key, value in config.items() if value is not None
    }

    def id_of(token: str, where: str) -> int:
        found = fast.token_to_id(token)
        if found is None:
            raise ValueError(
                f"{where} = {token!r} is no token of {folder / HUGGINGFACE_FILE}; name one that it has, such as "
                f"{_listed(special)}"
            )
        return int(found)

    def role(name: str, given: str | None, key: str) -> int:
        if given is not None:
            return id_of(given, key)
        token = _content(told.get(f"{name}_token"))
        return -1 if token is None else id_of(token, f"{folder}: {name}_token")

    eos = role("eos", named.end, "tokenizer.end_of_document")
    if eos < 0:
        try:
            eos = _eos_of_model(folder, fast, special)
        except NoRoles:
            if complete:
                raise
    pad = role("pad", named.padding, "tokenizer.padding")
    bos = _begin(fast, config, told, id_of) if named.begin is None else -1
    if named.begin:
        bos = id_of(named.begin, "tokenizer.begin_of_document")
    model = described["model"]
    unk = fast.token_to_id(model["unk_token"]) if model.get("unk_token") else model.get("unk_id")
    called = {key: _content(value) for key, value in told.items() if key.endswith("_token")}
    tokens = {key: token for key, token in called.items() if token is not None and fast.token_to_id(token) is not None}
    if named.begin:
        tokens["bos_token"] = named.begin
    unk = -1 if unk is None else int(unk)
    return Roles(unk, bos, eos, pad if pad >= 0 else eos, template_in(folder, config), tokens)


def _begin(
    fast: "tokenizers.Tokenizer", config: Mapping[str, Any], told: Mapping[str, Any], id_of: Callable[[str, str], int]
) -> int:
    """Returns the id that the tokenizer itself puts before a text, -1 if it puts none."""
    adds, token = config.get("add_bos_token"), _content(told.get("bos_token"))
    if adds is not None:
        return id_of(token, "bos_token") if adds and token is not None else -1
    plain, whole = (fast.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next((n for n in range(len(whole)) if whole[n : n + len(plain)] == plain), 0)
    return int(whole[0]) if at == 1 else -1


def _eos_of_model(folder: Path, fast: "tokenizers.Tokenizer", special: Sequence[str]) -> int:
    """Returns the id that generation_config.json or config.json names as the end; raises NoRoles if none does."""
    for name in _MODEL_FILES:
        told = _json(folder / name).get("eos_token_id")
        ids = told if isinstance(told, list) else [told] if isinstance(told, int) else []
        if len(ids) == 1 and fast.id_to_token(ids[0]) is not None:
            return int(ids[0])
        if len(ids) > 1:
            tokens = ", ".join(repr(fast.id_to_token(one)) for one in ids)
            raise NoRoles(
                f"{folder / name} names several tokens that end a text, {tokens}; set tokenizer.end_of_document to the "
                "one that ends a document"
            )
    raise NoRoles(
        f"nothing beside tokenizer {folder / HUGGINGFACE_FILE} says which token ends a document (eos_token in "
        f"{ROLES_FILE}, or eos_token_id in {' or '.join(_MODEL_FILES)}); set tokenizer.end_of_document to one of its "
        f"tokens, such as {_listed(special)}"
    )


def template_in(folder: Path, config: Mapping[str, Any] | None = None) -> str | None:
    """Returns the chat template in a folder, whose tokenizer_config.json is `config`; None if there is none.

    A file of its own comes before a key, as in transformers; of several named ones, the one named default is taken.
    Raises ConfigError if the file is not UTF-8.
    """
    file = folder / TEMPLATE_FILE
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file} is not UTF-8 ({error}); fetch it again, or save it as UTF-8") from None
    found = (_json(folder / ROLES_FILE) if config is None else config).get("chat_template")
    if isinstance(found, list):
        named = (one for one in found if isinstance(one, dict) and one.get("name") == "default")
        found = next((one.get("template") for one in named), None)
    return found if isinstance(found, str) else None


def locate(path: str, key: str = "tokenizer.file") -> Path:
    """Returns the file of a tokenizer that a config names; raises ConfigError if there is none, or it is unusable.

    In a folder with both kinds of files, tokenizer.model counts if Trivium can use it, else tokenizer.json.
    """
    given = Path(path)
    files = [given] if not given.is_dir() else [given / SENTENCEPIECE_FILE, given / HUGGINGFACE_FILE]
    files = [file for file in files if file.is_file()]
    if not files:
        raise ConfigError(
            f"{key} = {path!r} is no tokenizer, seen from {Path.cwd()}; name a folder with {HUGGINGFACE_FILE} or "
            f"{SENTENCEPIECE_FILE}, or such a file"
        )
    if len(files) > 1:
        try:
            Tokenizer.load(files[0])
        except ValueError:
            return files[1]
    return files[0]


def files_beside(file: Path) -> list[Path]:
    """Returns a tokenizer's file and those beside it that can say something about it."""
    names = (INFO_FILE, ROLES_FILE, "special_tokens_map.json", *_MODEL_FILES, TEMPLATE_FILE)
    return [file, *(path for name in names if (path := file.with_name(name)).is_file())]


def load_named(settings: "TokenizerConfig", controls: Sequence[str] = ()) -> Tokenizer:
    """Loads the tokenizer that `tokenizer.file` names, with the roles that the config gives it.

    Raises ConfigError if it cannot be the tokenizer of a data run, or lacks one of the `controls`.
    """
    file = locate(settings.file or "")
    named = Named(settings.end_of_document, settings.begin_of_document, settings.padding)
    try:
        tokenizer = Tokenizer.load(file, named=named)
    except ValueError as error:
        raise ConfigError(f"tokenizer.file = {settings.file!r}: {error}") from None
    if not tokenizer.foreign and named != Named():
        raise ConfigError(
            f"tokenizer.file = {settings.file!r} was trained by Trivium, and has its own begin and end of a document; "
            "leave out tokenizer.end_of_document, tokenizer.begin_of_document and tokenizer.padding"
        )
    if missing := [name for name in controls if name not in tokenizer.special_ids]:
        use = "mixture.fim needs them" if set(missing) <= set(FIM_CONTROLS) else "they are needed"
        raise ConfigError(
            f"tokenizer.file = {settings.file!r} has no {', '.join(missing)}, and {use}; leave mixture.fim out, or "
            "name a tokenizer that has them as special tokens"
        )
    return tokenizer


def adopt(settings: "TokenizerConfig", out: Path) -> dict[str, Any]:
    """Copies the tokenizer that `tokenizer.file` names to folder `out`; returns the content of info.json.

    Raises ConfigError as `load_named` does.
    """
    tokenizer = load_named(settings)
    file = Path(tokenizer.origin)
    known = _json(file.with_name(INFO_FILE))
    info = {
        "kind": known.get("kind", "huggingface" if file.suffix == ".json" else "sentencepiece"),
        "vocab_size": tokenizer.vocab_size,
        "special_ids": tokenizer.special_ids,
        "sha256": tokenizer.sha256,
        "taken_from": settings.file,
        **({"settings": known["settings"]} if "settings" in known else {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, out / (HUGGINGFACE_FILE if file.suffix == ".json" else SENTENCEPIECE_FILE))
    if tokenizer.foreign:
        write_atomic(out / ROLES_FILE, roles_file(tokenizer))
    write_atomic(out / INFO_FILE, (json.dumps(info, indent=1, ensure_ascii=False) + "\n").encode())
    return info


def roles_file(tokenizer: Tokenizer) -> bytes:
    """Returns the content of a tokenizer_config.json that holds a foreign tokenizer's roles and chat template."""
    content: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokenizer.symbols,
        "add_bos_token": tokenizer.bos_id >= 0,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        content["chat_template"] = tokenizer.chat_template
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _content(token: Any) -> str | None:
    """Returns the spelling of a token in a config, where it may be an object; None if there is none."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) and found else None


def _json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, {} if there is no such file. Raises ValueError if it is damaged."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); restore it, or remove it") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object; restore it, or remove it")
    return found


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(map(repr, names[:_SHOWN])) + more) or "its last one"
