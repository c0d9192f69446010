"""The tokenizer stage, which trains a tokenizer, and the tokens stage, which encodes documents into token stores.

The work itself is in `tokenizer` and `store`; the steps here run it in datatrove's executor and count documents. The
tokenizer is trained by one task; each shard of documents becomes one token store.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datatrove.data import DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from configs.loader import plain
from configs.mixture import MixtureConfig
from configs.tokenizer import TokenizerConfig
from data_pipeline.core.ledger import Tally
from data_pipeline.core.progress import ProgressFile
from data_pipeline.core.run_context import RunContext
from data_pipeline.core.shards import TRAIN, shard_path, shards_under
from data_pipeline.core.stage import KeepEarlier, Stage, file_hashes, read_manifest
from data_pipeline.tokens.foreign import adopt, files_beside, load_named
from data_pipeline.tokens.store import build
from data_pipeline.tokens.tokenizer import FIM_CONTROLS, Tokenizer
from data_pipeline.tokens.tokenizer_training import train


def tokenizer_stage(context: RunContext, documents: Stage, keep: KeepEarlier) -> Stage:
    """Returns the stage that trains a tokenizer on the training split of all sources, or takes one that exists.

    Raises ConfigError if `tokenizer.file` names one that cannot be used. For `keep` see `Stage`.
    """
    config, taken = context.config, ""
    if config.tokenizer.file is not None:
        file = Path(load_named(config.tokenizer, _controls(config.mixture)).origin)
        taken = file_hashes(files_beside(file), context.run_dir / "logs" / "tokenizer.json")
    return Stage(
        "tokenizer",
        partial(_tokenizer, context),
        plain(config.tokenizer) | ({"controls": controls} if (controls := _controls(config.mixture)) else {}),
        ("tokens.tokenizer_training", "tokens.foreign"),
        needs=(documents,),
        counted_against=documents,
        inputs=taken,
        packages=("sentencepiece", "tokenizers"),
        keep=keep,
    )


def tokens_stage(context: RunContext, documents: Stage, tokenizer: Stage, keep: KeepEarlier) -> Stage:
    """Returns the stage that encodes each shard of documents into a token store; for `keep` see `Stage`."""
    return Stage(
        "tokens",
        partial(_tokens, context),
        {},
        ("tokens.store", "tokens.sentencepiece_tokenizer", "tokens.huggingface_tokenizer"),
        needs=(documents, tokenizer),
        counted_against=documents,
        packages=("sentencepiece", "tokenizers"),
        keep=keep,
    )


class TrainTokenizer(PipelineStep):
    """datatrove step of a single task that trains the tokenizer on the files `inputs`, or takes the one it is given."""

    name = "Train tokenizer"
    type = "🔤 - TOKENIZER"

    def __init__(
        self, inputs: Sequence[str], out: str, settings: TokenizerConfig, controls: Sequence[str], progress: str
    ) -> None:
        super().__init__()
        self.inputs = list(inputs)
        self.out = out
        self.settings = settings
        self.controls = list(controls)
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress = ProgressFile(self.progress, rank)
        if self.settings.file is not None:
            adopt(self.settings, Path(self.out))
        else:
            inputs = [Path(path) for path in self.inputs]
            train(inputs, Path(self.out), self.settings, controls=self.controls, progress=progress.advance)
        progress.close()
        yield from ()


class Tokenize(PipelineStep):
    """datatrove step that encodes each shard of documents, `<split>/<source>/<name>`, into a store of the same name."""

    name = "Tokenize"
    type = "🔢 - TOKENS"

    def __init__(
        self, documents: str, shards: Sequence[str], tokenizer: str, out: str, tallies: str, progress: str
    ) -> None:
        super().__init__()
        self.documents = documents
        self.shards = list(shards)
        self.tokenizer = tokenizer
        self.out = out
        self.tallies = tallies
        self.progress = progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        progress, tally = ProgressFile(self.progress, rank), Tally()
        tokenizer = Tokenizer.load(self.tokenizer)
        for shard in self.shards[rank::world_size]:
            out = Path(self.out) / shard
            out.parent.mkdir(parents=True, exist_ok=True)
            source = out.parent.name
            written = build(shard_path(self.documents, shard), out, tokenizer, progress.advance)
            tally.came_in(source, written.text_bytes, written.documents)
            tally.kept(source, written.text_bytes, documents=written.documents)
            tally.note(source, "tokens", written.tokens)
        tally.save(Path(self.tallies) / f"{rank:05d}.json")
        progress.close()
        yield from ()


def _controls(mixture: MixtureConfig | None) -> list[str]:
    """Returns the control symbols of fill-in-the-middle if the mixture uses it, else an empty list."""
    return list(FIM_CONTROLS) if mixture and any(plan.fim for plan in mixture.plans().values()) else []


def _document_shards(context: RunContext) -> list[str]:
    """Lists the shards of documents, the largest first, so that no big one is left to the end."""
    folder = context.run_dir / "documents"
    return sorted(shards_under(folder), key=lambda shard: -shard_path(folder, shard).stat().st_size)


def _tokenizer(context: RunContext, folder: Path, logs: Path) -> Tally:
    """Runs the tokenizer stage; held-out documents are counted as dropped, since training does not read them.

    A tokenizer that exists is trained on none, and all documents are counted as kept for the tokens stage.
    """
    tally = Tally()
    for source, counts in (read_manifest(context.run_dir / "documents") or {})["sources"].items():
        notes, kept = counts["notes"], counts["passed_on"]
        if not kept["documents"]:  # such as canaries, which the documents stage drops
            continue
        documents, size = notes.get("held out", 0), notes.get("held-out bytes", 0)
        tally.came_in(source, kept["bytes"], kept["documents"])
        tally.dropped(source, "held_out", size, documents)
        tally.kept(source, kept["bytes"] - size, documents=kept["documents"] - documents)
    shards = [shard for shard in _document_shards(context) if shard.startswith(f"{TRAIN}/")]
    inputs = [str(shard_path(context.run_dir / "documents", shard)) for shard in shards]
    controls = _controls(context.config.mixture)
    step = TrainTokenizer(inputs, str(folder), context.config.tokenizer, controls, str(logs / "progress"))
    context.pipeline("tokenizer", logs, [step], 1, tally.total().kept.bytes, alone=True)
    return tally


def _tokens(context: RunContext, folder: Path, logs: Path) -> Tally:
    """Runs the tokens stage, one task per shard of documents."""
    shards = _document_shards(context)
    step = Tokenize(
        str(context.run_dir / "documents"),
        shards,
        str(context.run_dir / "tokenizer"),
        str(folder),
        str(logs / "tallies"),
        str(logs / "progress"),
    )
    context.pipeline("tokens", logs, [step], len(shards), context.text_bytes())
    tally = Tally.load_all(logs / "tallies")
    for source in context.config.sources:
        tally.of(source)  # also a source without documents, so that the plan stage knows its name
    return tally
