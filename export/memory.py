"""Memory that comparing a model's outputs takes, held against what the machine has free, before anything is written."""

from pathlib import Path

from configs.loader import ConfigError
from configs.model import ModelConfig
from configs.model_size import layer_parameters

COPIES, BYTES = 2, 4  # Trivium's decoder and transformers' model, each in fp32
SHARE = 0.8  # of what is free; activations and a file of weights take the rest


def fewest_layers(model: ModelConfig) -> int:
    """Returns how many first layers make a model of the same kind: those up to the first with experts, or one."""
    return next((layer.index for layer in model.layers if layer.moe), 0) + 1


def check_layers(model: ModelConfig, layers: int | None) -> None:
    """Raises ConfigError if the first `layers` alone, which are to be compared, are no model of the same kind."""
    least = fewest_layers(model)
    if layers is not None and layers < least:
        raise ConfigError(
            f"verify.layers = {layers} leaves out every layer with experts, of which layer {least - 1} is the first; "
            f"set verify.layers={least} or more"
        )


def check_memory(model: ModelConfig, layers: int | None, free: int | None) -> None:
    """Raises ConfigError if the compared layers do not fit into `free` bytes twice, naming a number that does.

    With `layers` None all are compared. None for `free` means that it is not known, and nothing is checked.
    """
    count = min(layers or model.num_layers, model.num_layers)
    needed = _bytes(model, count)
    if free is None or needed <= SHARE * free:
        return
    least = fewest_layers(model)
    fitting = next((n for n in range(count - 1, least - 1, -1) if _bytes(model, n) <= SHARE * free), None)
    said = (
        f"comparing the outputs of {count} layers takes {needed / 1e9:.1f} GB, twice the model in fp32, and this "
        f"machine has {free / 1e9:.1f} GB free"
    )
    if fitting is None:
        few = "one layer" if least == 1 else f"the first {least}"
        raise ConfigError(f"{said}, too little even for {few}; export on a machine with more memory")
    raise ConfigError(f"{said}; set verify.layers={fitting} to compare the first layers and all tensors")


def free_memory() -> int | None:
    """Returns the bytes of memory that the machine can still give, None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _bytes(model: ModelConfig, layers: int) -> int:
    model = model.without_mtp()  # modules of multi-token prediction are not compared
    within = sum(layer_parameters(layer) for layer in model.layers)
    compared = sum(layer_parameters(layer) for layer in model.layers[:layers])
    return COPIES * BYTES * (model.num_parameters() - within + compared)
