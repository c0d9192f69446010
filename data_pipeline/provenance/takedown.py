"""`trivium data takedown CONFIG LIST --out FOLDER`: finds documents to be removed and makes a plan without them.

LIST has a document id or an address on each line; one that begins with "#" is a comment, unless a document has that id.
For each document the command prints the number of rows and, with --run, of training steps that contain it. It writes to
FOLDER a plan of the same mixture over the same token stores without these documents (with --after CHECKPOINT, a plan
for the rest of that run, see `replan`), and takedown.json, which lists what was found where. Existing files are not
changed, so the token stores still contain the documents' tokens.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.cli import command_parser, entrypoint
from configs.data import DataConfig
from configs.files import new_folder, write_atomic
from configs.folders import check_writable
from configs.loader import ConfigError, load
from data_pipeline.core.console import say, wide_console
from data_pipeline.core.stage import has_finished
from data_pipeline.mixture.plan_files import build_stages
from data_pipeline.mixture.rows import open_plans
from data_pipeline.personal_data.hiding import hide
from data_pipeline.provenance.lookup import StoredDocument, data_spans, given, locations, plans, steps, stored, uses
from data_pipeline.provenance.replan import rest, used
from data_pipeline.reading.charsets import decode_whole, marked_charset
from data_pipeline.reading.document_urls import url_key
from data_pipeline.reading.ids import published_id

_SHOWN = 8  # ids listed for one line of the list


def read_list(path: Path) -> list[str]:
    """Reads the distinct lines of a list, in UTF-8 or in the encoding that its byte order mark names.

    They keep the white space around them, which may belong to an id: see `named`. Lines that begin with "#" are among
    them, since they are comments only if no document has such an id. Raises ConfigError if the list is missing, empty,
    or in another encoding.
    """
    if not path.is_file():
        raise ConfigError(f"LIST {path} does not exist; give a file with a document id or an address on each line")
    content = path.read_bytes()
    try:
        text = decode_whole(content, marked_charset(content) or "utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"LIST {path} is not valid {error.encoding} at byte {error.start}; convert it to UTF-8"
        ) from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    wanted = [line for line in dict.fromkeys(lines) if line.strip()]
    if not wanted:
        raise _names_none(path)
    return wanted


def named(run_dir: Path, lines: Sequence[str]) -> list[str]:
    """Removes the white space around lines, except where it belongs to an id that records of the run have."""
    ids = {line: published_id(line) for line in lines if line != line.strip()}
    known = {location.id for location in locations(run_dir, set(ids.values()))} if ids else set()
    whole = {line for line, own in ids.items() if own in known or given(run_dir, own)}
    return list(dict.fromkeys(line if line in whole else line.strip() for line in lines))


def _names_none(path: Path) -> ConfigError:
    return ConfigError(f"LIST {path} names no document; write an id or an address on each line")


def touched(run_dir: Path, wanted: Sequence[str], found: Sequence[StoredDocument], run: Path | None) -> dict[str, Any]:
    """Returns the content of takedown.json for a list: personal data in the list does not appear in it.

    documents         those `found` in token stores, with their rows in each plan and, given `run`, their steps
    dropped_earlier   ids of documents that were dropped before tokens were made
    given_to_several  ids that several records share -> the ids that their documents have instead
    not_found         lines that match nothing
    """
    trained_on = data_spans(run) if run else []
    entries: dict[StoredDocument, dict[str, Any]] = {
        one: {
            "id": one.id,
            "split": one.split,
            "source": one.source,
            "store": one.store,
            "document": one.document,
            "tokens": one.tokens,
            "rows": {},
            **({"steps": []} if run else {}),
        }
        for one in found
    }
    for name, plan in plans(run_dir, trained_on).items():
        for one, segments in uses(plan, found).items():
            samples = sorted({sample for sample, _, _ in segments})
            entries[one]["rows"][name] = samples
            if run:
                entries[one]["steps"] += steps(trained_on, plan, samples)
    kept, addresses = {one.id for one in found}, {one.url for one in found}
    ids = {line: published_id(line) for line in wanted}
    earlier = {location.id for location in locations(run_dir, set(ids.values()) - kept)}
    missing = [
        line
        for line in wanted
        if ids[line] not in kept | earlier and not (_is_address(line) and url_key(line) in addresses)
    ]
    alike = {ids[line]: shared for line in missing if (shared := given(run_dir, ids[line]))}
    missing = [line for line in missing if not line.startswith("#")]
    return {
        "documents": list(entries.values()),
        "dropped_earlier": sorted(earlier),
        "given_to_several": alike,
        "not_found": [hide(line) if _is_address(line) else ids[line] for line in missing if ids[line] not in alike],
    }


def _is_address(line: str) -> bool:
    return "://" in line


def without(config: DataConfig, found: Sequence[StoredDocument], out: Path, after: Path | None) -> int:
    """Writes the config's plans without the documents `found` to folder `out`; returns their number of rows.

    Raises ValueError if too few tokens are left.
    """
    run_dir = Path(config.run.dir)
    gone: dict[str, set[tuple[str, int]]] = {}
    for one in found:
        gone.setdefault(f"{one.split}/{one.source}", set()).add((one.store, one.document))
    stages, begin = config.plans(), None
    if after is not None:
        begin = used(after)
        stages = rest(stages, begin[0].first_sample + begin[1])
    build_stages(run_dir / "tokens", run_dir / "tokenizer", out, stages, gone, begin)
    return sum(plan.num_samples for plan in open_plans(out).values())


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(
        "trivium data takedown",
        "Lists the rows and steps that contain the listed documents, and makes a plan without them.",
        "trivium data takedown configs/data/demo.toml remove.txt --out runs/demo/plan_clean --run runs/demo/pretrain",
        DataConfig,
    )
    parser.add_argument("config", metavar="CONFIG", help="the TOML file of the data run")
    parser.add_argument("list", metavar="LIST", type=Path, help="a file with a document id or an address on each line")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="dotted overrides of the config's keys")
    parser.add_argument("--out", required=True, type=Path, help="folder of the new plan; it must not exist")
    parser.add_argument("--run", type=Path, help="directory of a training run, to list its steps")
    parser.add_argument("--after", type=Path, help="the checkpoint of a training run that is to go on without them")
    parser.add_argument("--dry-run", action="store_true", help="print what would be removed, write nothing")
    args = parser.parse_intermixed_args(argv)
    config = load(DataConfig, args.config, args.overrides)
    wanted = read_list(args.list)
    if args.out.exists() and not args.dry_run:
        raise ConfigError(f"--out {args.out} exists already; name a new folder, nothing is overwritten")
    check_writable(args.out.parent, "--out", args.out)
    run_dir, console = Path(config.run.dir), wide_console()
    if not has_finished(run_dir, "plan"):
        raise ConfigError(f"run.dir = {str(run_dir)!r} holds no plan yet; run: trivium data run {args.config}")
    try:
        wanted = named(run_dir, wanted)
        found = stored(run_dir, list(map(published_id, wanted)), list(filter(_is_address, wanted)))
        report = touched(run_dir, wanted, found, args.run)
        if all(line.startswith("#") for line in wanted) and not any(report.values()):
            raise _names_none(args.list)
        for entry in report["documents"]:
            in_steps = f", {len(entry['steps'])} steps" if args.run else ""
            say(
                f"{entry['id']}: {entry['split']}/{entry['source']}, {entry['tokens']:,} tokens in "
                f"{sum(map(len, entry['rows'].values()))} rows{in_steps}",
                console,
            )
        for line, alike in report["given_to_several"].items():
            say(
                f"{line}: nothing is removed, since {len(alike)} records share this id; list the documents to be "
                f"removed by their own ids: {', '.join(alike[:_SHOWN])}{', ...' if len(alike) > _SHOWN else ''}",
                console,
            )
        for name, what in (("dropped_earlier", "dropped before tokens were made"), ("not_found", "not found")):
            for line in report[name]:
                say(f"{line}: {what}", console)
        if args.dry_run:
            return 0
        if not found:
            known = not report["not_found"] and not report["given_to_several"]
            print(
                "none of the listed documents is in the run's tokens, so no plan is written"
                + ("" if known else "; list ids as `trivium data sample` and `explain` show them, or addresses"),
                file=sys.stdout if known else sys.stderr,
            )
            return 0 if known else 1
        with new_folder(args.out) as folder:
            rows = without(config, found, folder, args.after)
            write_atomic(folder / "takedown.json", (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    except ConfigError:
        raise
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    say(f"a plan of {rows:,} rows without {len(found)} documents: {args.out}", console)
    return 0


if __name__ == "__main__":
    entrypoint(main)
