"""File extensions of each format and programming language, and folder names of vendored or generated code.

Extensions and languages follow GitHub's linguist (languages.yml, vendor.yml, generated.rb), the common ones only. They
apply to files found by searching a folder; a file that a pattern names is read whatever its extension.
"""

from typing import Literal

from configs.sources import SourceConfig

LANGUAGES = {
    "Python": (".py", ".pyi", ".pyx"),
    "C": (".c", ".h"),
    "C++": (".cpp", ".cc", ".cxx", ".hpp", ".hh", ".hxx"),
    "CUDA": (".cu", ".cuh"),
    "C#": (".cs",),
    "Java": (".java",),
    "Kotlin": (".kt", ".kts"),
    "Scala": (".scala",),
    "Go": (".go",),
    "Rust": (".rs",),
    "Swift": (".swift",),
    "Objective-C": (".m", ".mm"),
    "JavaScript": (".js", ".mjs", ".cjs", ".jsx"),
    "TypeScript": (".ts", ".tsx"),
    "PHP": (".php",),
    "Ruby": (".rb",),
    "Perl": (".pl", ".pm"),
    "Lua": (".lua",),
    "R": (".r",),
    "Julia": (".jl",),
    "Haskell": (".hs",),
    "OCaml": (".ml", ".mli"),
    "Erlang": (".erl",),
    "Elixir": (".ex", ".exs"),
    "Clojure": (".clj",),
    "Fortran": (".f", ".f90", ".f95"),
    "Assembly": (".s", ".asm"),
    "Shell": (".sh", ".bash"),
    "PowerShell": (".ps1",),
    "SQL": (".sql",),
    "HTML": (".html", ".htm"),
    "CSS": (".css", ".scss", ".less"),
    "TeX": (".tex",),
    "Markdown": (".md",),
    "reStructuredText": (".rst",),
    "JSON": (".json",),
    "YAML": (".yml", ".yaml"),
    "TOML": (".toml",),
    "CMake": (".cmake",),
}
_LANGUAGE_OF = {extension: language for language, extensions in LANGUAGES.items() for extension in extensions}
_EXTENSIONS = {
    "jsonl": (".jsonl", ".ndjson"),
    "warc": (".warc",),
    "parquet": (".parquet",),
    "text": (".txt", ".text", ".md", ".rst"),
    "html": (".html", ".htm", ".xhtml"),
    "code": tuple(_LANGUAGE_OF),
}
_COMPRESSED = (".gz", ".zst")
# Endings of compressed files and archives that are not read.
_NOT_READ = (
    *(".bz2", ".xz", ".lzma", ".lz4", ".br", ".z", ".zip", ".7z", ".rar", ".snappy"),
    *(".tar", ".tgz", ".tbz2", ".txz"),
)
Format = Literal["jsonl", "parquet", "text", "code"]
_KNOWN: tuple[Format, ...] = ("jsonl", "parquet", "text", "code")
# Folders (in lower case) that hold other people's code, and folders whose content was written by tools.
_VENDORED = frozenset(
    {
        *("node_modules", "bower_components", "vendor", "vendors", "vendored", "_vendor", "third_party", "third-party"),
        *("thirdparty", "3rdparty", "external", "externals", "extern", "godeps", "site-packages", "pods", "carthage"),
        *(".venv", "venv"),
    }
)
_GENERATED = frozenset(
    {
        *("build", "dist", "out", "target", "generated", "gen", "__generated__", "__pycache__", ".next", ".nuxt"),
        *(".gradle", ".tox", ".eggs", "cmake-build-debug", "cmake-build-release", "deriveddata"),
    }
)
_VERSION_CONTROL = frozenset({".git", ".hg", ".svn"})


def wanted(path: str, source: SourceConfig) -> bool:
    """Whether a file in a searched folder has one of the extensions of the source's format, compressed or not."""
    name = _unpacked(path)
    return extension(name.removesuffix(not_read(path))) in (source.extensions or _EXTENSIONS[source.format])


def not_read(path: str) -> str:
    """Returns the ending of a file's name if it is one of a compression or archive that is not read, else ""."""
    name = _unpacked(path)
    return next((ending for ending in _NOT_READ if name.endswith(ending)), "")


def _unpacked(path: str) -> str:
    """Returns a file's name in lower case without .gz or .zst."""
    name = path.rsplit("/", 1)[-1].lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return name


def extension(path: str) -> str:
    """Returns a file's extension with its dot, in lower case, without .gz or .zst; "" if it has none."""
    name = _unpacked(path)
    return f".{name.rsplit('.', 1)[-1]}" if "." in name.lstrip(".") else ""


def language_of(path: str) -> str:
    """Returns the programming language that a file's extension stands for, or "" for an unknown extension."""
    return _LANGUAGE_OF.get(extension(path), "")


def skip_reason(folder: str, source: SourceConfig) -> str:
    """Returns the reason why a folder of this name is not searched, or "" if it is searched."""
    name = folder.lower()
    if source.format != "code":
        return ""
    if name in _VERSION_CONTROL:
        return "version_control"
    if source.skip_vendored and name in _VENDORED:
        return "vendored_folder"
    if source.skip_generated and name in _GENERATED:
        return "generated_folder"
    return ""


def format_of(name: str) -> Format | None:
    """Returns the format that the extension of a file's name or pattern tells, None if it tells none."""
    ending = extension(name.rstrip("*"))
    return next((kind for kind in _KNOWN if ending in _EXTENSIONS[kind]), None)
