"""What dsopt made of a graph, kept on disk: a second process skips capture, census, passes and choosing kernels.

One file a graph, named by a hash of everything that the result depends on: Dynamo's graph, its inputs' dtypes, sizes,
strides and shared memory, what is known of symbolic sizes, the options, dsopt's own sources, the versions and the
processor. A file holds the graph between the passes and `lower`, the passes' records, and the kernels chosen. Weights'
values are no part of it. What cannot be read, is of another version or gives other values is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx import GraphModule

from dsopt.capture import add_guard, fake_inputs, shape_facts, shape_guards
from dsopt.files import write_text
from dsopt.graphcodec import Refused, decode_condition, dumped, encode_condition, loaded
from dsopt.graphkey import key_of
from dsopt.op import Choice, Refusal
from dsopt.pipeline import LEFT_OUT
from dsopt.report import GraphReport
from dsopt.rewrite import Log

LIMIT = 256 * 2**20
_log = logging.getLogger(__name__)


def folder() -> Path | None:
    """Where graphs are kept: `$DSOPT_CACHE_DIR`, else `dsopt/graphs` in the user's cache; None for DSOPT_CACHE=0."""
    if os.environ.get("DSOPT_CACHE") == "0":
        return None
    if given := os.environ.get("DSOPT_CACHE_DIR"):
        return Path(given)
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "dsopt" / "graphs"


def files() -> list[tuple[float, int, Path]]:
    """(when it was last used, bytes, path) of each kept graph, the one used longest ago first."""
    found = []
    if (place := folder()) is not None:
        for path in place.glob("*.graph"):
            with contextlib.suppress(OSError):  # another process may have dropped it
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
    return sorted(found)


class Entry:
    """One graph's place in the cache, or the reason why it has none, which becomes `report.uncached`.

    kernels: name of a node -> the label of the kernel chosen for it and those refused before it, once `load` succeeded.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        report: GraphReport,
        passes: Sequence[str] | None,
        prefer: Mapping[str, str],
    ):
        self.report = report
        self.kernels: dict[str, Choice] = {}
        self._content: dict[str, Any] | None = None
        self._path: Path | None = None
        with self._or_reason():
            place = folder()
            for variable in ("DSOPT_DUMP", "DSOPT_FUEL"):
                if os.environ.get(variable):
                    raise Refused(f"{variable} is set")
            if place is None:
                raise Refused("DSOPT_CACHE=0")
            self._mode, self._inputs = fake_inputs(gm, example_inputs)
            self._guards = len(shape_guards(self._mode))
            key = key_of(gm, example_inputs, self._inputs, self._sizes(), passes, prefer)
            self._path = place / f"{key}.graph"

    def load(self) -> GraphModule | None:
        """The graph as the passes left it, its values those of this process's inputs; None if it is not kept.

        Fills the report with what the passes did.
        """
        if self._path is None:
            return None
        try:
            content = _read(self._path)
            for guard in content["guards"]:
                add_guard(self._mode, lambda symbols, guard=guard: decode_condition(guard, symbols))
            graph = loaded(content, self._inputs, self._mode)
            if self._sizes() != content["sizes"]:
                raise ValueError("its shape guards are not those of its capture")
            kernels = _choices(content)
            passes = [Log(order=None, **log) for log in content["passes"]]
            self.report.counted = {f: list(sites) for f, sites in content["counted"].items()}
            self.report.nodes_before = int(content["nodes_before"])
            self.report.passes, self.kernels, self.report.cached = passes, kernels, True
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with a file, the graph can be made without it
            _log.debug("%s is made anew: %s: %s", self._path, type(error).__name__, error)
            return None
        self._content = content
        with contextlib.suppress(OSError):
            os.utime(self._path)
        return graph

    def keep(self, graph: GraphModule) -> None:
        """Remembers a graph that the passes are done with, and the report on them; `save` writes both."""
        if self._path is None:
            return
        with self._or_reason():
            values = [node.meta.get("val") for node in graph.graph.nodes]
            if self._sizes(values) != self._sizes():
                raise Refused("the graph has symbolic sizes that its inputs do not have")
            if failed := [log.name for log in self.report.passes if _failed(log)]:
                raise Refused(f"a pass failed: {', '.join(failed)}")
            self._content = {
                **dumped(graph),
                # what capture found to depend on sizes, which Dynamo has to check in every process
                "guards": [encode_condition(g) for g in shape_guards(self._mode)[self._guards :]],
                "sizes": self._sizes(),
                "nodes_before": self.report.nodes_before,
                "counted": self.report.counted,
                "passes": [
                    {
                        "name": log.name,
                        "family": log.family,
                        "rewrites": log.rewrites,
                        "hits": log.hits,
                        "misses": log.misses,
                    }
                    for log in self.report.passes
                ],
            }

    def save(self, graph: GraphModule) -> None:
        """Writes the file once the graph is lowered, if there is none or other kernels were chosen than it says."""
        kernels = {n.name: n.meta["choice"] for n in graph.graph.nodes if "choice" in n.meta}
        if self._content is None or (self.report.cached and kernels == self.kernels):
            return
        table = list(dict.fromkeys(kernels.values()))
        self._content["kernels"] = {name: table.index(choice) for name, choice in kernels.items()}
        self._content["choices"] = [
            [label, [[r.kernel, r.reason] for r in refused]] for label, refused in table
        ]
        with self._or_reason():
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                body = json.dumps(self._content, separators=(",", ":"))
                write_text(self._path, f"{_checksum(body)}\n{body}")
                _drop_oldest(LIMIT)
            except OSError as error:
                raise Refused(f"its file cannot be written: {error}") from error

    def _sizes(self, values: Sequence[Any] = ()) -> list[str]:
        """What is known of the symbolic sizes of the inputs, and of some more values."""
        return shape_facts(self._mode, _symbolic([*self._inputs, *values]))

    @contextlib.contextmanager
    def _or_reason(self) -> Iterator[None]:
        """Whatever goes wrong inside becomes the reason why the graph is not kept."""
        try:
            yield
        except Exception as error:
            is_reason = isinstance(error, Refused)
            self.report.uncached = str(error) if is_reason else f"{type(error).__name__}: {error}"
            self._path = self._content = None
            _log.debug("%s is not kept: %s", self.report.name, self.report.uncached)


def _failed(log: Log) -> bool:
    return any(miss["reason"].startswith(LEFT_OUT) for miss in log.misses)


def _read(path: Path) -> dict[str, Any]:
    """A file's content. Raises OSError, or ValueError for one that is cut short or changed."""
    checksum, _, body = path.read_text().partition("\n")
    if _checksum(body) != checksum:
        raise ValueError("its checksum is wrong")
    return json.loads(body)


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _choices(content: Mapping[str, Any]) -> dict[str, Choice]:
    table = [(label, tuple(Refusal(*r) for r in refused)) for label, refused in content["choices"]]
    return {name: table[i] for name, i in content["kernels"].items()}


def _drop_oldest(limit: int) -> None:
    """Removes the files used longest ago until the others have at most `limit` bytes."""
    found = files()
    total = sum(size for _, size, _ in found)
    for _, size, path in found:
        if total <= limit:
            break
        path.unlink(missing_ok=True)
        total -= size


def _symbolic(values: Sequence[Any]) -> list[Any]:
    """The symbolic numbers among some values and the sizes of the tensors among them."""
    found = []
    for value in torch.utils._pytree.tree_leaves(values):
        numbers = [value]
        if isinstance(value, torch.Tensor):
            numbers = [*value.shape, *value.stride(), value.storage_offset()]
        found += [x for x in numbers if isinstance(x, (torch.SymInt, torch.SymFloat, torch.SymBool))]
    return found
