"""Language identification: lid.176 in Trivium's compiled code against fastText's own, on the same text."""

import fasttext

from configs.sources import LanguageConfig
from data_pipeline.language.identification import Identifier, model_path
from tests.bench.data_pipeline.measure import Result, cpu_seconds, size_mb, texts


def run(source: str, megabytes: float) -> Result:
    beginnings = [" ".join(text[: LanguageConfig().max_chars].split()) for text in texts(source, megabytes)]
    identify, model = Identifier(model_path(), LanguageConfig().max_chars), fasttext.load_model(str(model_path()))
    identify(beginnings[0])
    ours = cpu_seconds(lambda: [identify(text) for text in beginnings], times=5)
    theirs = cpu_seconds(lambda: [model.predict(text) for text in beginnings], times=5)
    labels = [(identify(text)[0], model.predict(text)[0][0].removeprefix("__label__")) for text in beginnings]
    said = f"equal labels in {sum(mine == its for mine, its in labels)} of {len(labels)} documents"
    return Result(f"language, {source}", size_mb(beginnings), ours, theirs, None, "fastText's predict", said)
