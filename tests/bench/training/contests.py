"""Contests: contenders that take turns in one session, what their steps took, and how Trivium compares."""

import json
import os
import socket
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pretrain.flops import flops_per_token
from tests.bench.training.contenders import Contender
from tests.bench.training.models import SIZES

ROOT = Path(__file__).parents[3]
DOCUMENTS = (1, 4)  # in a row
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # relative: roundings of the same operations in another order
OURS, LITGPT, PRODUCTS = "trivium", "litgpt", "products"
Record = dict[str, Any]  # what JSON has of a measurement


@dataclass(frozen=True)
class Contest:
    """Contenders of the same model, precision and batch.

    `documents` are the kinds of rows that eager Trivium is timed on, by documents in a row; all others get one.
    """

    name: str
    contenders: tuple[Contender, ...]
    documents: tuple[int, ...] = (1,)

    def has(self, who: str) -> bool:
        return any(one.who == who for one in self.contenders)


def contests(quick: bool, precisions: Sequence[str]) -> list[Contest]:
    """Lists all contests; a quick one has small batches and compiles nothing.

    All together take some ten minutes a precision.
    """
    made = []
    kinds = (False,) if quick else (False, True)
    dense, mixture = (("5M",), "small MoE") if quick else (("34M", "120M"), "MoE")
    for precision in precisions:
        for size in dense:
            base = Contender(OURS, size, precision)
            ours = [replace(base, compiled=c) for c in kinds]
            peers = [replace(base, who="transformers", compiled=c) for c in kinds] + _with_fp32_weights(base, kinds)
            peers += [replace(base, who="plain", compiled=c) for c in kinds]
            products, name = replace(base, who=PRODUCTS), f"dense {size} {precision}"
            made.append(Contest(name, (*ours, *peers, products), DOCUMENTS if size == dense[0] else (1,)))
            # The memory of 24 GiB that a small machine has would not hold all contenders of 120M parameters at once.
            others = [replace(base, who=LITGPT, compiled=c) for c in kinds]
            made.append(Contest(f"{name}, litgpt", (*ours, *others, products)))
        base = Contender(OURS, mixture, precision)
        all_ = [*(replace(base, compiled=c) for c in kinds), replace(base, who="transformers")]
        all_ += [*_with_fp32_weights(base, (False,)), replace(base, who=PRODUCTS)]
        made.append(Contest(f"MoE {precision}", tuple(all_)))
        base = Contender(OURS, dense[0], precision)
        made.append(Contest(f"ranks {precision}", (base, replace(base, ranks=2), replace(base, who="plain", ranks=2))))
    return made


def _with_fp32_weights(base: Contender, kinds: Sequence[bool]) -> list[Contender]:
    """Lists transformers under autocast, eager and compiled by `kinds`, for a contest in bf16."""
    if base.precision != "bf16":
        return []
    return [replace(base, who="transformers", autocast=True, compiled=compiled) for compiled in kinds]


class Running:
    """The processes of a contender, run by `python`. Ranks share `cores` evenly."""

    def __init__(self, contender: Contender, cores: int, python: str):
        self.contender, self.first_loss = contender, float("nan")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        threads = max(1, cores // contender.ranks)
        self.processes = []
        for rank in range(contender.ranks):
            env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
            if contender.ranks > 1:
                world = {"RANK": rank, "WORLD_SIZE": contender.ranks, "LOCAL_RANK": rank}
                world |= {"LOCAL_WORLD_SIZE": contender.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                env |= {name: str(value) for name, value in world.items()}
            command = [python, "-m", "tests.bench.training.worker", json.dumps(contender.plain()), str(threads)]
            pipe = subprocess.PIPE
            self.processes.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, env=env, text=True))

    def ask(self, what: str, documents: int) -> list[dict[str, Any]]:
        """Asks all ranks for a step or a profile and returns their answers in order of rank."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(f"{what} {documents}\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            answer = process.stdout.readline()
            if not answer:
                raise SystemExit(f"{self.contender.label} ended with status {process.wait()}; its error is above")
            answers.append(json.loads(answer))
        return answers

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self.processes:
            process.wait()


def run(contest: Contest, rounds: int, cores: int, pythons: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Runs a contest and returns a record for each contender and kind of row.

    `pythons` are those of contenders that have an environment of their own, by `who`.

    Raises SystemExit if first losses disagree, since then contenders computed different things.
    """
    running: list[Running] = []
    timed: dict[tuple[int, int], list[dict[str, float]]] = {}
    try:
        for i, contender in enumerate(contest.contenders):  # one after the other: compiling wants the cores
            print(f"  {contender.label}: first step", file=sys.stderr, flush=True)
            running.append(Running(contender, cores, str(pythons.get(contender.who, sys.executable))))
            kinds = contest.documents if contender.who == OURS and not contender.compiled else (1,)
            for documents in kinds:
                timed[i, documents] = []
                answers = running[-1].ask("step", documents)
                if documents == 1 and contender.who != PRODUCTS:  # ranks of a peer have the losses of their rows
                    running[-1].first_loss = statistics.mean(answer["loss"] for answer in answers)
                    _check(contest, running[0], running[-1])
        for round_ in range(rounds):
            print(f"  round {round_ + 1} of {rounds}", file=sys.stderr, flush=True)
            for (i, documents), spent in timed.items():
                answers = running[i].ask("step", documents)
                slowest, all_ = max(a["seconds"] for a in answers), sum(a["cpu_seconds"] for a in answers)
                spent.append({"seconds": slowest, "cpu_seconds": all_})
        profiled = [key for key in timed if contest.contenders[key[0]].who != PRODUCTS]
        shares = {key: running[key[0]].ask("profile", key[1])[0] for key in profiled}
    finally:
        for one in running:
            one.close()
    return [
        _record(contest, contest.contenders[i], documents, spent, shares.get((i, documents), {}))
        for (i, documents), spent in timed.items()
    ]


def _check(contest: Contest, first: Running, last: Running) -> None:
    tolerance = LOSS_TOLERANCE[last.contender.precision]
    if abs(last.first_loss - first.first_loss) > tolerance * first.first_loss:
        raise SystemExit(
            f"{contest.name}: the first loss of {last.contender.label} is {last.first_loss:.6f}, but "
            f"{first.contender.label} has {first.first_loss:.6f}: they do not compute the same thing"
        )


def _record(
    contest: Contest, contender: Contender, documents: int, spent: list[dict[str, float]], shares: dict[str, float]
) -> dict[str, Any]:
    size = SIZES[contender.size]
    tokens = size.rows * size.length
    flops = flops_per_token(size.config, 0 if contender.who == PRODUCTS else size.length // documents)
    record: dict[str, Any] = {"contest": contest.name, "label": contender.label, "documents": documents}
    record |= contender.plain() | {"shares": shares}
    for clock in ("seconds", "cpu_seconds"):
        times = [one[clock] for one in spent]
        median = statistics.median(times)
        record[clock] = [round(one, 4) for one in times]
        record[f"tokens_per_{clock.removesuffix('s')}"] = round(tokens / median, 1)
        record[f"gflop_per_{clock.removesuffix('s')}"] = round(flops * tokens / median / 1e9, 2)
    return record


def compare(records: list[dict[str, Any]], clock: str) -> None:
    """Adds, by `clock` (second or cpu_second), ratios of speeds and the share of the rate of products.

    An eager contender is compared with the best eager peer, a compiled one with the best of all; in bf16 also with the
    best of those whose weights, gradients and moments are in fp32, as its own are.
    """
    by_contest: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_contest.setdefault(record["contest"], []).append(record)
    speed = f"tokens_per_{clock}"
    for group in by_contest.values():
        rate = next((one[f"gflop_per_{clock}"] for one in group if one["who"] == PRODUCTS), None)
        for one in group:
            one["share_of_products"] = round(one[f"gflop_per_{clock}"] / rate, 3) if rate else None
            if one["who"] != OURS:
                continue
            peers = [
                peer
                for peer in group
                if peer["who"] not in (OURS, PRODUCTS)
                and (peer["ranks"], peer["documents"]) == (one["ranks"], one["documents"])
                and (one["compiled"] or not peer["compiled"])
            ]
            alike = [peer for peer in peers if peer["precision"] == "fp32" or peer["autocast"]]
            for suffix, those in (("", peers), ("_with_fp32_weights", alike)):
                best = max(those, key=lambda peer: peer[speed], default=None)
                one[f"best_peer{suffix}"] = best and best["label"]
                one[f"ratio{suffix}"] = best and round(one[speed] / best[speed], 3)
            alone = next(
                other
                for other in group
                if (other["who"], other["compiled"], other["documents"], other["ranks"])
                == (OURS, one["compiled"], 1, 1)
            )
            one["of_one_rank_and_document"] = round(one[speed] / alone[speed], 3)
