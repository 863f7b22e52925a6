"""A comparison as a table for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Json = dict[str, Any]
GIB, MIB = 1 << 30, 1 << 20
_NONE = "-"


def table(answer: Json, asked: Sequence[str]) -> str:
    """Exact's own figures first, then one line for each choice as it was written; columns of which nobody has
    a figure are left out."""
    from service.cli import table_lines

    rows = rows_of(answer, asked)
    columns = [(head, show) for head, show in COLUMNS if any(show(row) != _NONE for _, row in rows)]
    cells = [[name, *(show(row) for _, show in columns)] for name, row in rows]
    return "\n".join(table_lines(["ATTENTION", *(head for head, _ in columns)], cells))


def rows_of(answer: Json, asked: Sequence[str]) -> list[tuple[str, Json]]:
    """Exact, and every choice that was run and is not exact itself."""
    found = [("exact", answer["reference"])]
    for name, result in zip(asked, answer["results"], strict=True):
        if result["error"] is None and result["requested"] != "exact":
            found.append((name, result))
    return found


def notes(answer: Json, asked: Sequence[str]) -> list[str]:
    """What a table cannot say: the document, failures, fallbacks and warnings."""
    cut = f" ({answer['truncated_tokens']:,} cut off)" if answer["truncated_tokens"] else ""
    readings = answer["stats"]["readings"]
    told = [f"\n{answer['model']}, {answer['tokens']:,} tokens{cut}, {readings} readings"]
    if any(_error("estimate")(row) is not None for _, row in rows_of(answer, asked)):
        told.append("errors are those of the worst layer")
    for name, result in zip(asked, answer["results"], strict=True):
        if result["error"] is not None:
            told.append(f"{name}: {result['error']['detail']}")
            continue
        if result["attention"]["fallback_reason"] is not None:
            told.append(f"{name}: ran as exact: {result['attention']['fallback_reason']}")
        if result["attention"].get("plan") is not None:
            told.append(f"{name}: {_planned(result['attention'])}")
        if result["perplexity_missing"] is not None:
            told.append(f"{name}: no perplexity: {result['perplexity_missing']}")
        told += [f"{name}: {warning}" for warning in result["warnings"]]
    return told


def _planned(attention: Json) -> str:
    """What ``auto`` ran: layers by attention, why, and whether the budget was kept."""
    counts = Counter(
        " ".join([each["backend"], *(f"{name}={value}" for name, value in each["params"].items())])
        for each in attention["plan"]
    )
    layers = ", ".join(f"{count} x {what}" for what, count in counts.most_common())
    told = f"{attention['plan_reason']}: {layers}"
    budget = attention["budget"]
    if budget is None or not budget["rows"]:
        return told
    estimate = "no number" if budget["estimate"] is None else f"{budget['estimate']:.4f}"
    kept = "within" if budget["within"] else "above"
    repaired = len(budget["repaired_layers"])
    told += f"; estimated error {estimate}, {kept} {budget['max_error']:g}"
    return told + (f", {repaired} layers repaired" if repaired else "")


def _error(name: str) -> Callable[[Json], Any]:
    def found(row: Json) -> Any:
        measured = row["attention"]["measured_error"]
        return None if measured is None else measured[name]

    return found


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _change(row: Json) -> str:
    change, error = row["perplexity_change"], row["perplexity_change_se"]
    if change is None:
        return _NONE
    return f"{100 * change:+.2f} %" + ("" if error is None else f" ± {100 * error:.2f}")


def _memory(row: Json) -> str:
    memory = row["memory"]
    if memory is None:
        return _NONE
    held = memory["peak_bytes"]
    shown, mark = (memory["estimated_bytes"], "~") if held is None else (held, "")
    return f"{mark}{shown / GIB:.2f} GiB" if shown >= GIB else f"{mark}{shown / MIB:.0f} MiB"


def _of(found: Callable[[Json], Any], shown: Callable[[Any], str]) -> Callable[[Json], str]:
    def show(row: Json) -> str:
        value = found(row)
        return _NONE if value is None else shown(value)

    return show


def _field(name: str, shown: Callable[[Any], str]) -> Callable[[Json], str]:
    return _of(lambda row: row[name], shown)


COLUMNS: tuple[tuple[str, Callable[[Json], str]], ...] = (
    ("ERROR", _of(_error("estimate"), "{:.4f}".format)),
    ("95 % UPPER", _of(_error("approx_upper_95"), "{:.4f}".format)),
    ("PERPLEXITY", _field("perplexity", "{:.3f}".format)),
    ("CHANGE", _change),
    ("AGREE", _field("next_token_agreement", _share)),
    ("KL", _field("kl", "{:.4f}".format)),
    ("COSINE", _field("cosine", "{:.5f}".format)),
    ("VECTOR ERROR", _field("token_vector_error", "{:.4f}".format)),
    ("PREFILL", _field("prefill_ms", "{:,.0f} ms".format)),
    ("FIRST TOKEN", _field("time_to_first_token_ms", "{:,.0f} ms".format)),
    ("EXACT/THIS", _field("speedup", "{:.2f}".format)),
    ("MEMORY", _memory),
    ("DENSITY", _of(lambda row: row["attention"]["density"], _share)),
)
