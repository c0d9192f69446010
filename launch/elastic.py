"""Elastic start of a training run: with fewer nodes than its config was written for, in the nearest legal layout.

Which layout that is, `configs.nearest_layout` says; it depends on the config and the number of nodes alone, so each
node finds the same. The run goes on from its newest checkpoint, which any layout can read, with the same global batch
and the same samples. `python -m launch.elastic`, which jobs of Slurm run first, prints how many of the job's nodes have
work to do.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from configs.cli import command_parser, entrypoint
from configs.config_kind import OVERRIDE
from configs.layout import Layout
from configs.loader import ConfigError, filled_tree, validate
from configs.nearest_layout import NearestLayout, nearest_layout
from configs.train import PretrainConfig
from launch.bootstrap import TRAINING


@dataclass(frozen=True)
class ElasticStart:
    """Start of a command on the nodes that are there: arguments, ranks, and a sentence if the layout is another one.

    The last nodes may have fewer ranks than the others, or none.
    """

    arguments: tuple[str, ...]
    ranks: int
    said: str

    def ranks_on(self, node: int, per_node: int) -> int:
        """The number of ranks on a node."""
        return max(0, min(per_node, self.ranks - node * per_node))

    def nodes(self, per_node: int) -> int:
        """The number of nodes that have ranks."""
        return -(-self.ranks // per_node)


def elastic_start(
    module: str, arguments: Sequence[str], nodes: int, per_node: int, wanted: int | None = None
) -> ElasticStart:
    """Returns how to start a command on `nodes` nodes of `per_node` ranks, where `wanted` are the nodes of the cluster.

    Raises ConfigError if the command is not `trivium train` with a model in its config, or no layout is legal.
    """
    if module not in ("train", TRAINING["train"]) or not arguments or arguments[0].startswith("-"):
        raise ConfigError(
            f"min_nodes needs the model's sizes to choose a layout, and only the configs of `train` have them, not "
            f"those of {module}; leave min_nodes out, and set parallel.* by hand"
        )
    overrides = [word for word in arguments[1:] if OVERRIDE.match(word)]
    tree = filled_tree(PretrainConfig, arguments[0], overrides)
    if tree.get("init"):
        raise ConfigError(
            "min_nodes needs the model's sizes to choose a layout, and [init] takes them from another run; leave "
            "min_nodes out, and set parallel.* by hand"
        )
    config = validate(PretrainConfig, tree, origin=arguments[0])
    found = nearest_layout(nodes * per_node, config.parallel, config.model, config.train)
    said = _sentence(config, found, nodes, per_node, wanted)
    return ElasticStart((*arguments, *found.overrides), found.layout.world_size, said)


def _sentence(config: PretrainConfig, found: NearestLayout, nodes: int, per_node: int, wanted: int | None) -> str:
    """Returns a sentence on how the start differs from one on all nodes; "" if it does not."""
    missing = wanted is not None and nodes < wanted
    if not (missing or found.changed or found.idle):
        return ""
    parallel, layout = config.parallel, found.layout
    here = f"{nodes} of {wanted} nodes" if wanted else f"{nodes} node{'s' * (nodes > 1)}"
    before = Layout.of(wanted * per_node, parallel, config.model, config.train) if wanted else None
    parts = [f"{here} with {found.ranks} ranks: {f'{before} becomes' if before else 'the layout is'} {layout}"]
    if found.changed:
        parts.append(f"with {' '.join(found.overrides)}")
    if found.idle:
        most = found.ranks // (layout.tp * layout.cp * layout.pp)
        why = "no nearer layout has work for them"
        if most > layout.dp:
            why = f"dp {most} is not possible with train.global_batch_size = {config.train.global_batch_size}"
            why += f" and parallel.ep = {layout.ep}" if layout.ep > 1 else ""
        parts.append(f"{found.idle} of {found.ranks} ranks stay idle, since {why}")
    held = parallel.tp * parallel.pp * parallel.ep / (layout.tp * layout.pp * layout.ep)
    if held > 1:
        parts.append(f"a rank may hold up to {held:.3g} times as much of the model, see `trivium rehearse`")
    parts.append("the global batch and its samples stay the same")
    return "; ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the number of nodes that have ranks, and on stderr the sentence about the layout."""
    parser = command_parser(
        prog="python -m launch.elastic",
        description="Prints how many nodes a training run can use, of those that are there.",
        example="python -m launch.elastic 3 4 8 pretrain.train CONFIG",
    )
    parser.add_argument("nodes", type=int, help="nodes that are there")
    parser.add_argument("wanted", type=int, help="nodes of the cluster")
    parser.add_argument("per_node", type=int, help="ranks on each node")
    parser.add_argument("words", nargs="...", help="module, config and overrides")
    args = parser.parse_args(argv)
    start = elastic_start(args.words[0], args.words[1:], args.nodes, args.per_node, args.wanted)
    if start.said:
        print(start.said, file=sys.stderr)
    print(start.nodes(args.per_node))
    return 0


if __name__ == "__main__":
    entrypoint(main)
