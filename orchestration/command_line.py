"""What the commands of slotforge share: their arguments, and how they speak."""

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from orchestration.recipe_files import recipe_names
from orchestration.terminal import complain

console = Console(soft_wrap=True)

RecipeName = Annotated[str, typer.Argument(help=f"a name ({', '.join(recipe_names())}) or a path to a YAML file")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="FIELD=VALUE", help="change a field, e.g. train.batch_size=256")
]


def say(text: str) -> None:
    """A line as it stands: brackets in it are not Rich's markup."""
    console.print(text, highlight=False, markup=False)


def fail(message: str, code: int) -> NoReturn:
    """Ends the command with a sentence and an exit code."""
    complain(message)
    sys.exit(code)
