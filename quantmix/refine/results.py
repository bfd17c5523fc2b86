"""The file that a run of `refine` leaves after each measured mix, so that none is measured twice.

    {"schema": 1, "kind": "quantmix-refinement",
     "conditions": {"model": "<fingerprint>", "base": "<fingerprint of the source's data>",
                    "engine": "ik pip 0.1.5", "corpus": "<sha256>", "imatrix": "<sha256>" or null,
                    "n_ctx": 512},
     "unread": ["blk.0.attn_k_b.weight", …],
     "scores": {"<mix>@<first>+<count>": {"kld": […], "ln_ratio": […], "base_nll": […],
                                          "seconds": 9.1}},
     "failed": {"<mix>": "why"}}

`<mix>` is a hash of tensor → type. A score says nothing of what it was measured for, so it serves
every later run under the same conditions, with other rounds, parts or types. `unread` are tensors
that the engine's graph never reads, null until the engine has said.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from quantmix.engine.variants import STRETCHES
from quantmix.errors import BadFile
from quantmix.files import write_text
from quantmix.refine.search import Place, Score

SCHEMA: Final = 1
KIND: Final = "quantmix-refinement"


@dataclass
class Results:
    """Scores of mixes under one set of conditions; `take` adds one."""

    conditions: dict[str, Any]
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unread: list[str] | None = None

    def score(self, mix: Mapping[str, str], place: Place) -> Score | None:
        """Return the score of a mix, None when it is not known."""
        row = self.scores.get(key(mix, place))
        if row is None:
            return None
        return Score(tuple(row["kld"]), tuple(row["ln_ratio"]), tuple(row["base_nll"]))

    def take(self, event: Mapping[str, Any]) -> None:
        """Add what an event of the worker tells: a score, why there is none, or what is unread."""
        if "unread" in event:
            self.unread = list(event["unread"])
        elif "score" in event:
            self.scores[event["key"]] = event["score"]
        elif "why" in event:
            self.failed[event["key"].partition("@")[0]] = event["why"]

    def to_json(self) -> dict[str, Any]:
        """Return the document."""
        return {
            "schema": SCHEMA,
            "kind": KIND,
            "conditions": self.conditions,
            "unread": self.unread,
            "scores": self.scores,
            "failed": self.failed,
        }

    def save(self, path: Path) -> None:
        """Write the file; the old one stays until the new one is complete."""
        write_text(path, json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n")


def key(mix: Mapping[str, str], place: Place) -> str:
    """Return the name of a score."""
    return f"{mix_key(mix)}@{place.first}+{place.count}"


def mix_key(mix: Mapping[str, str]) -> str:
    """Return a hash of tensor → type."""
    text = "\n".join(f"{name}={kind}" for name, kind in sorted(mix.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def load(path: Path, conditions: dict[str, Any]) -> Results:
    """Return the results in `path`, empty ones when it is not there.

    Raises:
        BadFile: not such a file, or of other conditions.
    """
    if not path.exists():
        return Results(conditions)
    try:
        doc = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as err:
        raise BadFile(f"{path} cannot be read as results of refine: {err}") from err
    if not isinstance(doc, dict) or doc.get("kind") != KIND or doc.get("schema") != SCHEMA:
        raise BadFile(f"{path} holds no results of refine: give another --probes file")
    found = from_json(doc, str(path))
    theirs = found.conditions
    different = [k for k, v in conditions.items() if theirs.get(k) != v]
    if different:
        raise BadFile(
            f"{path} was measured with another {', '.join(different)}: give another --probes "
            "file, or the same conditions to go on with it"
        )
    return found


def from_json(doc: Mapping[str, Any], name: str) -> Results:
    """Return the results that `to_json` made a document of.

    Raises:
        BadFile: it is damaged.
    """
    try:
        found = Results(dict(doc["conditions"]), dict(doc["scores"]), dict(doc["failed"]))
        found.unread = doc.get("unread") and [str(n) for n in doc["unread"]]
        for place, row in found.scores.items():
            count = int(place.rpartition("+")[2])
            for name_of, each in (("kld", STRETCHES), ("ln_ratio", 1), ("base_nll", 1)):
                if len(row[name_of]) != count * each:
                    raise BadFile(
                        f"{name} is damaged: {place} has {len(row[name_of])} numbers in {name_of}, "
                        f"not {count * each}: give another --probes file"
                    )
                if not all(math.isfinite(x) for x in row[name_of]):
                    raise BadFile(f"{name} holds a score that is no finite number")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        if isinstance(err, BadFile):
            raise
        raise BadFile(f"{name} is damaged: {err!r}: give another --probes file") from err
    return found
