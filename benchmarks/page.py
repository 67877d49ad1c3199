"""Sections of BENCHMARKS.md that the benchmarks write."""

from pathlib import Path

PAGE = Path(__file__).parents[1] / "BENCHMARKS.md"


def write(section: str, text: str, page: Path = PAGE) -> None:
    """Put the text between the section's markers, or at the end."""
    begin, end = f"<!-- {section} -->", f"<!-- /{section} -->"
    before, found, rest = page.read_text().partition(begin)
    after = rest.partition(end)[2] if found else "\n"
    page.write_text(f"{before.rstrip()}\n\n{begin}\n{text}\n{end}{after}")
