"""Which files of a folder belong to a format, by their names; which folders of a code tree hold no code of its own.

Extensions and languages follow GitHub's linguist (languages.yml, vendor.yml, generated.rb), the common ones only. A
file that a pattern names is read whatever its extension.
"""

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
# Other people's code, and what tools wrote.
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
    """Whether a file that a searched folder holds is of the source's format."""
    return extension(path) in (source.extensions or _EXTENSIONS[source.format])


def extension(path: str) -> str:
    """With its dot, in lower case; that of the content where a file is compressed."""
    name = path.rsplit("/", 1)[-1].lower()
    for ending in _COMPRESSED:
        name = name.removesuffix(ending)
    return f".{name.rsplit('.', 1)[-1]}" if "." in name.lstrip(".") else ""


def language_of(path: str) -> str:
    """The programming language that the extension stands for; "" for an unknown one."""
    return _LANGUAGE_OF.get(extension(path), "")


def entered(folder: str, source: SourceConfig) -> str:
    """Why a folder of that name is not entered; "" for one that is."""
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
