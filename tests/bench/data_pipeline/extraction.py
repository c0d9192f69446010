"""HTML to text: resiliparse with trafilatura as the fallback, as extract has it, against trafilatura alone."""

from datatrove.pipeline.extractors import Trafilatura
from fastwarc.warc import ArchiveIterator, WarcRecordType

from data_pipeline.extractors import main_text
from tests.bench.data_pipeline.measure import DEMO, Result, cpu_seconds


def run(megabytes: float) -> Result:
    pages = []
    with (DEMO / "web.warc.gz").open("rb") as file:
        for record in ArchiveIterator(file, record_types=WarcRecordType.response):
            pages.append(record.reader.read().decode("utf-8", errors="replace"))
    size = sum(len(page.encode()) for page in pages) / 1e6
    pages = pages[:: max(1, int(size / megabytes))]
    size = sum(len(page.encode()) for page in pages) / 1e6
    peer = Trafilatura()
    peer.extract(pages[0])
    ours = cpu_seconds(lambda: [main_text(page) for page in pages], times=3)
    theirs = cpu_seconds(lambda: [peer.extract(page) for page in pages])
    fallbacks = sum(main_text(page)[1] == "trafilatura" for page in pages)
    said = f"{fallbacks} of {len(pages)} pages by the fallback"
    return Result("HTML extraction", size / ours, size / theirs, 15, "datatrove's Trafilatura", said)
