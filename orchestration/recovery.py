"""Where the time of a restart goes, from the last step before it to the first one after."""

from collections.abc import Mapping

PARTS = {
    "detection": "detected",
    "teardown": "down",
    "scheduling": "scheduled",
    "imports": "imported",
    "process_group": "grouped",
    "load": "loaded",
    "first_step": "first step",
}
"""Each part by the moment at which it ends; the first one begins at the last step that was seen."""


def recovery_parts(marks: Mapping[str, float]) -> dict[str, float]:
    """Seconds of each part, and of all as "total", from moments in seconds since the epoch.

    A moment that is not there, since the driver came after it, leaves its part out; one before the last step (a clock
    of another node) counts as no time.
    """
    parts: dict[str, float] = {}
    began = last = marks.get("last step")
    for part, moment in PARTS.items():
        when = marks.get(moment)
        if when is None:
            continue
        if last is not None:
            parts[part] = max(0.0, when - last)
        last = when if last is None else max(last, when)
    if began is not None and last is not None and "detected" in marks:
        parts["total"] = last - began
    return parts


def recovery_line(parts: Mapping[str, float]) -> str:
    """One line for the log."""
    each = ", ".join(f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in parts.items() if part != "total")
    return f"back after {parts['total']:.1f} s: {each}"
