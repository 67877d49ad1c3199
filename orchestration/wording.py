"""Numbers of things, in words."""


def counted(number: int, noun: str) -> str:
    """`1 image`, `2 images`, `0 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
